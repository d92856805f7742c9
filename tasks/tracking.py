"""One MLflow run a flow run, and what is written down in it at its start."""

from __future__ import annotations

import os
import platform
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import mlflow
import torch
from filelock import FileLock
from mlflow import MlflowClient
from mlflow.data.http_dataset_source import HTTPDatasetSource
from mlflow.data.meta_dataset import MetaDataset
from mlflow.entities import Run
from mlflow.exceptions import MlflowException
from prefect import Flow, get_run_logger, runtime
from prefect.client.schemas.objects import FlowRun, State
from prefect.exceptions import Pause, TerminationSignal
from prefect.settings import PREFECT_UI_URL
from requests import RequestException

from gan.bundle import name_architecture
from gan.config import TrainConfig
from gan.evaluation.judge import JUDGE_ID
from gan.training import name_device
from tasks.data import DatasetRef
from tasks.run_folder import make_folder
from tasks.run_view import save_view
from tasks.services import ServiceError, find_silent_service, without_password
from tasks.storage import S3_AWAY

EXPERIMENT = "mnist-gan"
MODEL_NAME = "mnist-gan-generator"
PATIENCE_S = 60.0
"""How long the end of what is done waits for an MLflow that is away."""
AWAY = (MlflowException, RequestException, ServiceError, OSError, *S3_AWAY)
"""What is raised while the server, or its store, is away."""
MNIST_ADDRESS = "https://ossci-datasets.s3.amazonaws.com/mnist/"


def open_experiment(runs_dir: Path) -> None:
    """Set MLflow's experiment; makes it, its view and the local database if they are not there."""
    make_folder(runs_dir)
    # Two processes that create the local database at the same time would spoil each other's.
    with FileLock(runs_dir / ".mlflow.lock"):
        experiment = mlflow.set_experiment(EXPERIMENT)
    save_view(MlflowClient(), experiment.experiment_id)


@contextmanager
def tracked_run(
    config: TrainConfig,
    dataset: DatasetRef,
    device: str,
    folder: Path,
    *,
    devices: int = 1,
    tags: Mapping[str, str] = MappingProxyType({}),
) -> Iterator[str]:
    """Keep a training's MLflow run open; gives its id. See `open_run`.

    Written down at once: every parameter of the config, and what the run stands on (data, judge,
    commit, library versions, devices).
    """
    noted = {
        **tags,
        "recipe": config.recipe,
        "dataset_digest": dataset.digest,
        "judge": JUDGE_ID,
        "device": device,
        "devices": str(devices),
        "processor": name_device(torch.device(device)),
    }
    with open_run(describe(config), flat_parameters(config), noted, folder) as run_id:
        mlflow.log_input(
            MetaDataset(  # type: ignore[abstract]  # MLflow uses it so itself
                HTTPDatasetSource(MNIST_ADDRESS),
                name="mnist",
                digest=dataset.digest.removeprefix("sha256:")[:12],
            ),
            context="training",
        )
        yield run_id


@contextmanager
def open_run(
    name: str,
    parameters: Mapping[str, object],
    tags: Mapping[str, str],
    folder: Path,
    way_out: str | None = None,
) -> Iterator[str]:
    """Keep one MLflow run open; gives its id. It ends as the code inside does: FINISHED, KILLED
    where a user or the system ended or paused it, FAILED after any other exception.

    What is taken up again, known by its folder, goes on in the run that it had. The tags say
    besides the given ones which code ran where, and for which Prefect flow run.

    Raises:
        ServiceError: MLflow went away; says so, and the way out, which by default is to resume.
    """
    # A server that is away shall be noticed in seconds; what must arrive is sent again by us.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    open_experiment(folder.parent)
    known = find_run("run_folder", folder.name)
    noted = {
        **tags,
        "git_commit": git_commit(),
        "host": socket.gethostname(),
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "mlflow": mlflow.__version__,
        "run_folder": folder.name,
        "prefect_flow_run_id": runtime.flow_run.get_id() or "",
        "prefect_flow_run_name": runtime.flow_run.get_name() or "",
        "prefect_flow_run_url": flow_run_url(),
    }
    # With its tags from the first moment: by them it is found again, whenever its process dies.
    run = mlflow.start_run(known, run_name=name, tags=noted, log_system_metrics=True)
    try:
        mlflow.log_params(dict(parameters))
        yield run.info.run_id
    except BaseException as error:
        signal = find_signal(error)
        asked = signal or isinstance(error, Pause)
        _end_run(run.info.run_id, "KILLED" if asked else "FAILED")
        if not asked and isinstance(error, AWAY):
            said = str(error) if isinstance(error, ServiceError) else find_silent_service()
            if said:
                resume = (
                    f"what is trained is kept in {folder}, and the same command with --resume, "
                    f"or `prefect flow-run retry {runtime.flow_run.get_id()}`, hands it in"
                )
                raise ServiceError(f"{said}; {way_out or resume}") from error
        raise
    _end_run(run.info.run_id, "FINISHED", PATIENCE_S)


def find_signal(error: BaseException) -> KeyboardInterrupt | TerminationSignal | None:
    """The signal that ended what raised an error, if one did.

    It may lie behind another: a library that is interrupted may fail again as it tidies up.
    """
    behind: BaseException | None = error
    while behind:
        if isinstance(behind, KeyboardInterrupt | TerminationSignal):
            return behind
        behind = behind.__cause__ or behind.__context__
    return None


def _end_run(run_id: str, status: str, patience_s: float = 0) -> None:
    deadline = time.monotonic() + patience_s
    end = partial(mlflow.end_run, status)
    while True:
        try:
            end()
        except AWAY as error:
            if time.monotonic() > deadline:
                said = without_password(str(error))
                get_run_logger().warning("MLflow was not told that the run is %s: %s", status, said)
                return
        else:
            return
        time.sleep(1)
        # As an active run it is forgotten by now, whatever the server answered.
        end = partial(MlflowClient().set_terminated, run_id, status)


def find_run(tag: str, value: str) -> str | None:
    """The MLflow run with this value of a tag, if there is one."""
    runs = mlflow.search_runs(
        experiment_names=[EXPERIMENT],
        filter_string=f"tags.{tag} = '{value}'",
        max_results=1,
        output_format="list",
    )
    return runs[0].info.run_id if runs else None


def find_done(flow_run_id: str) -> list[Run]:
    """The MLflow run of a flow run, if all was done in it; without the trials of a sweep."""
    return [run for run in _find_runs(flow_run_id, "FINISHED") if "trial" not in run.data.tags]


def end_tracking(flow: Flow[..., Any], flow_run: FlowRun, state: State[Any]) -> None:
    """A hook for flow runs that are cancelled or crash: their MLflow runs end like them.

    Also one that was done a moment before its flow run was cancelled; but one that was done before
    a crash leaves nothing to do, and its flow run is completed by whoever reconciles.
    """
    end_runs(str(flow_run.id), "FAILED" if state.is_crashed() else "KILLED")
    if not state.is_crashed():
        for run in find_done(str(flow_run.id)):
            MlflowClient().set_terminated(run.info.run_id, "KILLED")


def end_runs(flow_run_id: str, status: str) -> None:
    """End what MLflow still takes for running in a flow run."""
    for run in _find_runs(flow_run_id, "RUNNING"):
        MlflowClient().set_terminated(run.info.run_id, status)


def _find_runs(flow_run_id: str, status: str) -> list[Run]:
    runs = mlflow.search_runs(
        experiment_names=[EXPERIMENT],
        filter_string=f"tags.prefect_flow_run_id = '{flow_run_id}' and status = '{status}'",
        output_format="list",
    )
    return list(runs)


def describe(config: TrainConfig) -> str:
    """A run's name: what it does, in a few words."""
    epochs = "1 epoch" if config.epochs == 1 else f"{config.epochs} epochs"
    return f"{config.recipe}, {epochs}, seed {config.seed}"


def flat_parameters(config: TrainConfig) -> dict[str, object]:
    """Every field of the config by its own name, the networks' fields among them."""
    fields = asdict(config)
    architecture = name_architecture(config.networks)
    return {"architecture": architecture, **fields.pop("networks"), **fields}


def git_commit() -> str:
    """The commit of this code, with `-dirty` behind it if files differ from it; or `unknown`."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def flow_run_url() -> str:
    """The flow run's page, or nothing where no lasting server has one."""
    base, flow_run_id = PREFECT_UI_URL.value(), runtime.flow_run.get_id()
    base = without_password(base or "")
    return f"{base}/runs/flow-run/{flow_run_id}" if base and flow_run_id else ""
