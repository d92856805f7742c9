"""The real stack as a user starts it, on free ports, and what the tests ask it."""

import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, closing, suppress
from functools import cached_property
from pathlib import Path
from typing import TypeVar
from uuid import UUID

import boto3
import psutil
import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import (
    DeploymentFilter,
    DeploymentFilterId,
    FlowRunFilter,
    FlowRunFilterId,
    FlowRunFilterState,
    FlowRunFilterStateName,
)
from prefect.client.schemas.objects import FlowRun, State
from prefect.client.schemas.responses import DeploymentResponse

from deployments.stack import NUM_S3_PORTS, ROOT

READY_S = 150
T = TypeVar("T")


def wait_for(ask: Callable[[], T | None], *, seconds: float, what: str | Callable[[], str]) -> T:
    """Ask until there is an answer that is not None, or fail.

    `what` says what was waited for; as a function it is called in the end, to say how things are.
    """
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if (answer := ask()) is not None:
            return answer
        time.sleep(0.25)
    pytest.fail(f"waited {seconds:g} s in vain for {what if isinstance(what, str) else what()}")


def free_ports() -> dict[str, str]:
    """Ports for a stack, all of them free, and those of the S3 store in a row."""
    first = 21_000 + os.getpid() % 1_000 * 10
    while True:
        first += NUM_S3_PORTS + 2
        with suppress(OSError):
            for port in range(first, first + NUM_S3_PORTS + 2):
                socket.create_server(("127.0.0.1", port)).close()
            names = ("PREFECT_SERVER_API_PORT", "MLFLOW_PORT", "S3_PORT")
            return {name: str(first + place) for place, name in enumerate(names)}


class LocalStack:
    """`python -m deployments.stack` as a user starts it, in another folder than theirs."""

    def __init__(self, home: Path, **variables: str) -> None:
        self.folder = home / "stack"
        self.log = home / "stack.log"
        kept = {
            k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "MLFLOW_", "AWS_"))
        }
        self.variables = kept | free_ports() | {"HOME": str(home)} | variables
        self.process: subprocess.Popen[bytes] | None = None
        self.clients = ExitStack()

    def start(self) -> "LocalStack":
        self.forget_clients()
        # It ends with the tests, even where they are killed.
        setpriv = ["setpriv", "--pdeathsig", "INT"] if shutil.which("setpriv") else []
        command = [sys.executable, "-m", "deployments.stack", "--folder", str(self.folder)]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                setpriv + command,
                cwd=ROOT,
                env=self.variables,
                stdout=log,
                stderr=log,
                start_new_session=True,
                # A shell that started the tests in the background has it ignored.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
            )
        return self

    def forget_clients(self) -> None:
        self.clients.close()
        for name in ("user", "prefect", "mlflow"):
            self.__dict__.pop(name, None)

    @property
    def output(self) -> str:
        return self.log.read_text()

    def wait_until_ready(self) -> "LocalStack":
        assert self.process is not None

        def ready() -> bool | None:
            if self.process is not None and self.process.poll() is not None:
                pytest.fail(f"the stack ended while starting:\n{self.output}")
            return True if "In another terminal" in self.output else None

        wait_for(ready, seconds=READY_S, what=lambda: f"the stack; it says:\n{self.output}")
        return self

    def end(self, signum: signal.Signals = signal.SIGINT) -> int:
        """Send a signal, as Ctrl-C does; gives the exit code once the command is back."""
        assert self.process is not None
        self.forget_clients()
        self.process.send_signal(signum)
        return self.process.wait(timeout=30)

    def processes(self, **variables: str) -> list[psutil.Process]:
        """Every process that this stack has started, however far down, with these variables."""
        wanted = (variables | {"STACK_FOLDER": str(self.folder)}).items()
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if wanted <= process.environ().items():
                    found.append(process)
        return found

    def wait_until_gone(self, seconds: float = 15) -> None:
        wait_for(
            lambda: None if self.processes() else True,
            seconds=seconds,
            what=lambda: f"the end of {self.processes()}",
        )

    @cached_property
    def user(self) -> dict[str, str]:
        """The environment of a user who has typed what the stack told them to type."""
        script = f". {shlex.quote(str(self.folder / 'activate'))} && env -0"
        done = subprocess.run(["sh", "-c", script], check=True, capture_output=True, text=True)
        return dict(line.split("=", 1) for line in done.stdout.split("\0") if line)

    @cached_property
    def prefect(self) -> SyncPrefectClient:
        return self.clients.enter_context(SyncPrefectClient(api=self.user["PREFECT_API_URL"]))

    @cached_property
    def mlflow(self) -> MlflowClient:
        return MlflowClient(self.user["MLFLOW_TRACKING_URI"])

    def deployment(self, name: str) -> DeploymentResponse:
        """One of the deployments of train-gan."""
        return self.prefect.read_deployment_by_name(f"train-gan/{name}")

    def runs_of(self, name: str, *states: str) -> list[FlowRun]:
        """The flow runs of a deployment of train-gan, in these states if any are given."""
        state = FlowRunFilterState(name=FlowRunFilterStateName(any_=list(states) or None))
        deployment = DeploymentFilterId(any_=[self.deployment(name).id])
        return self.prefect.read_flow_runs(
            flow_run_filter=FlowRunFilter(state=state),
            deployment_filter=DeploymentFilter(id=deployment),
        )

    def final_state(self, flow_run_id: UUID, seconds: float = 150) -> State[None]:
        """Wait for the end of a flow run."""

        def ask() -> State[None] | None:
            state = self.prefect.read_flow_run(flow_run_id).state
            return state if state is not None and state.is_final() else None

        return wait_for(
            ask, seconds=seconds, what=lambda: f"the end of a run; the stack:\n{self.output}"
        )

    def tasks_of(self, flow_run_id: UUID) -> set[str]:
        """The tasks of a run that have begun, without the ends of their names."""
        mine = FlowRunFilter(id=FlowRunFilterId(any_=[flow_run_id]))
        found = self.prefect.read_task_runs(flow_run_filter=mine)
        return {task.name.rpartition("-")[0] for task in found}

    def tracked(self, flow_run_id: UUID) -> list[Run]:
        """The MLflow runs that say they belong to a flow run."""
        experiment = self.mlflow.get_experiment_by_name("mnist-gan")
        if experiment is None:
            return []
        tag = f"tags.prefect_flow_run_id = '{flow_run_id}'"
        return list(self.mlflow.search_runs([experiment.experiment_id], tag))

    def s3_objects(self) -> dict[str, int]:
        """Key and size of everything in the store's bucket."""
        user = self.user
        client = boto3.client(
            "s3",
            endpoint_url=user["AWS_ENDPOINT_URL_S3"],
            region_name=user["AWS_DEFAULT_REGION"],
            aws_access_key_id=user["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=user["AWS_SECRET_ACCESS_KEY"],
        )
        with closing(client):
            pages = client.get_paginator("list_objects_v2").paginate(Bucket="gan-models")
            return {o["Key"]: o["Size"] for page in pages for o in page.get("Contents", [])}

    def run_deployment(self, name: str, parameters: dict[str, object]) -> UUID:
        """Ask for a run as a user does in the other terminal."""
        given = [word for key, value in parameters.items() for word in ("-p", f"{key}={value}")]
        done = self.command("prefect", "deployment", "run", name, *given)
        assert done.returncode == 0, done.stdout
        found = re.search(r"UUID: (\S+)", done.stdout)
        assert found
        return UUID(found[1])

    def command(self, *words: str) -> subprocess.CompletedProcess[str]:
        """What a user types in the other terminal."""
        return subprocess.run(
            words,
            check=False,
            cwd=ROOT,
            env=self.user,
            capture_output=True,
            text=True,
            timeout=120,
        )
