"""A bare worker and a Prefect server, set up as the README says, either ended in mid-run."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from uuid import UUID

import httpx
import psutil
import pytest
import torch
from mlflow import MlflowClient
from mlflow.entities import Run
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import FlowRun
from prefect.states import Suspended

from deployments.stack import ROOT
from gan.bundle import WEIGHTS, save_bundle
from gan.data import load_mnist
from gan.recipes import configure
from gan.training import TrainState, train
from tasks.tracking import EXPERIMENT
from tests.deployments.local_stack import free_ports, wait_for
from tests.long import in_a_hurry, takes_minutes, takes_minutes_in_float32
from tests.prefect_home import prefect_home

pytestmark = [pytest.mark.slow, pytest.mark.chaos]

NUM_EPOCHS = 1 if in_a_hurry else 8
PARAMETERS = {"recipe": "vanilla", "batch_size": 1000, "num_samples": 200, "epochs": NUM_EPOCHS}
SEED = 1
ENOUGH_S = 900
"""For a whole training that was disturbed, on a slow machine."""
PROGRAMS = Path(sys.executable).parent


class SharedServer:
    """Programs on loopback, each started and ended by itself."""

    def __init__(self, home: Path, data_dir: Path) -> None:
        self.home = home
        port = free_ports()["PREFECT_SERVER_API_PORT"]
        self.url = f"http://127.0.0.1:{port}/api"
        kept = {
            k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "MLFLOW_", "AWS_"))
        }
        self.variables = kept | {
            "HOME": str(home),
            "PATH": f"{PROGRAMS}:{os.environ['PATH']}",
            "PREFECT_HOME": prefect_home(home / "prefect"),
            "PREFECT_API_URL": self.url,
            "PREFECT_SERVER_API_PORT": port,
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": (
                "prefect.server.concurrency.lease_storage.filesystem"
            ),
            "PREFECT_WORKER_QUERY_SECONDS": "2",
            "DO_NOT_TRACK": "1",
            "NO_PROXY": "127.0.0.1",
            "MLFLOW_TRACKING_URI": f"sqlite:///{home}/mlflow.db",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "MNIST_GAN_DATA_DIR": str(data_dir),
            "MNIST_GAN_RUNS_DIR": str(home / "runs"),
            "MNIST_GAN_CHECKPOINT_EVERY_S": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONUNBUFFERED": "1",
        }
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.api = SyncPrefectClient(api=self.url)
        self.mlflow = MlflowClient(self.variables["MLFLOW_TRACKING_URI"])
        # Workers start in the checkout, where MLflow would otherwise put the runs' files.
        self.mlflow.create_experiment(EXPERIMENT, artifact_location=str(home / "artifacts"))

    def start(self, name: str, *words: str, **variables: str) -> None:
        with (self.home / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                words,
                cwd=ROOT,
                env=self.variables | variables,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def start_server(self) -> None:
        self.start("server", "prefect", "server", "start", "--host", "127.0.0.1")

        def ready() -> bool | None:
            with suppress(httpx.TransportError):
                return httpx.get(f"{self.url}/ready").is_success or None
            return None

        wait_for(ready, seconds=60, what="the server")

    def start_worker(self, name: str = "worker", *options: str) -> None:
        command = ("prefect", "worker", "start", "--pool", "gpu", "--name", name, *options)
        self.start(name, *command, MNIST_GAN_ROOT=str(ROOT))

    def end(self, name: str, signum: signal.Signals) -> None:
        """Ask a worker to end, and again if it does not, as a supervisor would: Prefect's was seen
        to go on for minutes after its first SIGTERM, and answers the second with SIGKILL."""
        for seconds in (20, 20):
            self.processes[name].send_signal(signum)
            with suppress(subprocess.TimeoutExpired):
                self.processes[name].wait(timeout=seconds)
                return
        raise AssertionError(f"{name} does not end")

    def command(self, *words: str) -> str:
        done = subprocess.run(
            words, check=False, cwd=ROOT, env=self.variables, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def train(self, deployment: str = "default") -> UUID:
        return self.run_deployment(f"train-gan/{deployment}", PARAMETERS | {"seed": SEED})

    def run_deployment(self, name: str, parameters: dict[str, object]) -> UUID:
        given = [word for key, value in parameters.items() for word in ("-p", f"{key}={value}")]
        said = self.command("prefect", "deployment", "run", name, *given)
        found = re.search(r"UUID: (\S+)", said)
        assert found
        return UUID(found[1])

    def process_of(self, run: UUID) -> psutil.Process:
        """The process of a flow run."""
        (process,) = [
            process
            for process in psutil.process_iter()
            if _environment(process).get("PREFECT__FLOW_RUN_ID") == str(run)
            and "prefect.engine" in process.cmdline()
        ]
        return process

    def worker_of(self, run: UUID) -> str:
        """The name of the worker that a flow run's process belongs to."""
        above = {process.pid for process in self.process_of(run).parents()}
        (name,) = [name for name, process in self.processes.items() if process.pid in above]
        return name

    def states(self, run: UUID) -> list[str]:
        """The names of all states that a flow run had, in order."""
        return [state.name or "" for state in self.api.read_flow_run_states(run)]

    def wait_for_checkpoint(self, run: UUID | str) -> None:
        folder = self.home / "runs" / str(run) / "checkpoints"
        wait_for(
            lambda: len(list(folder.glob("step-*"))) > 1 or None, seconds=180, what="a checkpoint"
        )

    def result(self, run: UUID, seconds: float) -> FlowRun:
        """The run once it is over; one that crashed is expected to be taken up again."""

        def ask() -> FlowRun | None:
            found = self.api.read_flow_run(run)
            over = found.state and found.state.is_final() and not found.state.is_crashed()
            return found if over else None

        return wait_for(
            ask, seconds=seconds, what=lambda: f"the end; {self.api.read_flow_run(run).state}"
        )


@pytest.fixture(scope="module")
def shared(mnist_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SharedServer]:
    shared = SharedServer(tmp_path_factory.mktemp("shared"), mnist_dir.parent)
    try:
        shared.start_server()
        shared.command("prefect", "work-pool", "create", "gpu", "--type", "process")
        for limit in ("gpu", "promotion"):
            shared.command("prefect", "gcl", "create", limit, "--limit", "1")
        shared.command("prefect", "--no-prompt", "deploy", "--all")
        file = "deployments/automations.yaml"
        shared.command("prefect", "automation", "create", "--from-file", file)
        shared.start_worker()
        with shared.api:
            yield shared
    finally:
        for name in reversed(shared.processes):
            with suppress(subprocess.TimeoutExpired):
                shared.end(name, signal.SIGTERM)
        home = str(shared.home)
        for process in [p for p in psutil.process_iter() if _environment(p).get("HOME") == home]:
            with suppress(psutil.Error):
                process.kill()
        for process in shared.processes.values():
            process.wait()


def _environment(process: psutil.Process) -> dict[str, str]:
    with suppress(psutil.Error):
        return process.environ()
    return {}


@pytest.fixture(scope="module")
def undisturbed(mnist_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The weights that the same training ends with where nothing happens to it."""
    config = configure("vanilla", epochs=NUM_EPOCHS, batch_size=1000, seed=SEED)
    state = TrainState(config, torch.device("cpu"))
    for _ in train(state, load_mnist(mnist_dir, "cpu").train):
        pass
    folder = tmp_path_factory.mktemp("undisturbed") / "bundle"
    save_bundle(state.sampler, folder)
    return (folder / WEIGHTS).read_bytes()


def check_result(shared: SharedServer, run: FlowRun, undisturbed: bytes) -> None:
    """Completed once, with every epoch once in MLflow, one version, and the same weights."""
    assert run.state_name == "Completed", run.state
    experiment = shared.mlflow.get_experiment_by_name("mnist-gan")
    tag = f"tags.run_folder = '{run.id}'"
    (tracked,) = shared.mlflow.search_runs([experiment.experiment_id], tag)
    assert tracked.info.status == "FINISHED"
    points = shared.mlflow.get_metric_history(tracked.info.run_id, "d_loss")
    assert [point.step for point in points] == [*range(1, NUM_EPOCHS + 1)]
    assert len(shared.mlflow.search_model_versions(f"run_id = '{tracked.info.run_id}'")) == 1
    folder = shared.home / "runs" / str(run.id)
    assert (folder / "bundle" / WEIGHTS).read_bytes() == undisturbed


@takes_minutes_in_float32
def test_server_that_restarts_in_mid_run_costs_nothing(
    shared: SharedServer, undisturbed: bytes
) -> None:
    run = shared.train()
    shared.wait_for_checkpoint(run)
    shared.end("server", signal.SIGTERM)
    time.sleep(5)
    shared.start_server()
    finished = shared.result(run, seconds=ENOUGH_S)
    check_result(shared, finished, undisturbed)
    assert finished.run_count == 1


@takes_minutes
@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM])
def test_run_goes_on_from_its_checkpoint_when_the_worker_is_back(
    shared: SharedServer, undisturbed: bytes, signum: signal.Signals
) -> None:
    """SIGTERM to a worker kills the flow's process without a word: silence must tell."""
    run = shared.train()
    shared.wait_for_checkpoint(run)
    shared.end("worker", signum)
    time.sleep(2)
    shared.start_worker()
    finished = shared.result(run, seconds=ENOUGH_S)
    check_result(shared, finished, undisturbed)
    assert finished.run_count == 2
    assert "Crashed" in shared.states(run)


@takes_minutes
def test_cancelled_run_goes_on_when_it_is_retried(shared: SharedServer, undisturbed: bytes) -> None:
    run = shared.train()
    shared.wait_for_checkpoint(run)
    shared.command("prefect", "flow-run", "cancel", str(run))
    # The worker has the last word on a run that it ended.
    wait_for(lambda: shared.states(run).count("Cancelled") == 2 or None, seconds=60, what="its end")
    shared.command("prefect", "flow-run", "retry", str(run))
    finished = shared.result(run, seconds=ENOUGH_S)
    check_result(shared, finished, undisturbed)
    assert finished.run_count == 2


@takes_minutes
def test_paused_run_ends_within_moments_and_goes_on_when_it_is_resumed(
    shared: SharedServer, undisturbed: bytes
) -> None:
    """As the button of Prefect's page does it."""
    run = shared.train()
    shared.wait_for_checkpoint(run)
    shared.api.set_flow_run_state(run, Suspended(timeout_seconds=300), force=True)
    process = shared.process_of(run)
    wait_for(lambda: None if process.is_running() else True, seconds=60, what="its end")
    assert shared.states(run)[-1] == "Suspended"
    (tracked,) = shared.mlflow.search_runs(
        [shared.mlflow.get_experiment_by_name(EXPERIMENT).experiment_id],
        f"tags.run_folder = '{run}'",
    )
    assert tracked.info.status == "KILLED"
    shared.api.resume_flow_run(run)
    check_result(shared, shared.result(run, seconds=ENOUGH_S), undisturbed)
    assert shared.states(run).count("Running") == 2


@takes_minutes
def test_crashed_run_that_is_retried_at_once_ends_well_whatever_the_worker_says(
    shared: SharedServer, undisturbed: bytes
) -> None:
    """For some seconds the worker still reports the old process, and crashes the run again."""
    run = shared.train()
    shared.wait_for_checkpoint(run)
    shared.process_of(run).kill()
    wait_for(lambda: "Crashed" in shared.states(run) or None, seconds=60, what="its crash")
    shared.command("prefect", "flow-run", "retry", str(run))
    check_result(shared, shared.result(run, seconds=ENOUGH_S), undisturbed)


@takes_minutes
def test_failed_run_goes_on_when_it_is_retried(shared: SharedServer, undisturbed: bytes) -> None:
    run = shared.train()
    shared.wait_for_checkpoint(run)
    in_the_way = shared.home / "runs" / str(run) / "bundle"
    in_the_way.touch()
    failed = shared.result(run, seconds=ENOUGH_S)
    assert failed.state_name == "Failed", failed.state
    in_the_way.unlink()
    shared.command("prefect", "flow-run", "retry", str(run))
    wait_for(
        lambda: shared.api.read_flow_run(run).run_count > 1 or None, seconds=60, what="its retry"
    )
    finished = shared.result(run, seconds=ENOUGH_S)
    check_result(shared, finished, undisturbed)
    assert finished.run_count == 2


@pytest.fixture
def two_workers(shared: SharedServer) -> Iterator[SharedServer]:
    """Two workers, each for one run at a time, and two slots to train in."""
    shared.end("worker", signal.SIGTERM)
    shared.command("prefect", "gcl", "update", "gpu", "--limit", "2")
    for name in ("one", "two"):
        shared.start_worker(name, "--limit", "1")
    try:
        yield shared
    finally:
        for name in ("one", "two"):
            shared.end(name, signal.SIGTERM)
        shared.command("prefect", "gcl", "update", "gpu", "--limit", "1")
        shared.start_worker()


@takes_minutes
def test_workers_of_one_pool_share_the_runs(two_workers: SharedServer, undisturbed: bytes) -> None:
    runs = [two_workers.train("default"), two_workers.train("weekly")]
    for run in runs:
        two_workers.wait_for_checkpoint(run)
    assert {two_workers.worker_of(run) for run in runs} == {"one", "two"}
    for run in runs:
        finished = two_workers.result(run, seconds=ENOUGH_S)
        check_result(two_workers, finished, undisturbed)
        assert finished.run_count == 1


@takes_minutes
def test_a_run_goes_on_at_another_worker_where_its_own_is_gone(
    two_workers: SharedServer, undisturbed: bytes
) -> None:
    run = two_workers.train()
    two_workers.wait_for_checkpoint(run)
    lost = two_workers.worker_of(run)
    process = two_workers.process_of(run)
    two_workers.end(lost, signal.SIGKILL)
    with suppress(psutil.NoSuchProcess):
        process.kill()
    finished = two_workers.result(run, seconds=400)
    check_result(two_workers, finished, undisturbed)
    assert finished.run_count == 2


@takes_minutes
def test_sweep_that_was_killed_goes_on_and_repeats_no_finished_trial(shared: SharedServer) -> None:
    """Half a minute later the worker still reports the old process, and crashes the run again: it
    is then taken up once more, by the schedule of `reconcile-runs` at the latest."""
    space = '{"batch_size": [1000, 2000]}'
    given = {"recipe": "vanilla", "trials": 2, "epochs": 2, "workers": 1, "num_samples": 200}
    run = shared.run_deployment("sweep-gan/default", given | {"space": space})
    shared.wait_for_checkpoint(f"{run}-0001")
    before = trials_of(shared, run)
    assert before["0"].info.status == "FINISHED"
    shared.process_of(run).kill()
    finished = shared.result(run, seconds=1200)
    assert finished.state_name == "Completed", finished.state
    assert finished.run_count > 1
    trials = trials_of(shared, run)
    assert trials.keys() == {"0", "1"}
    assert trials["0"].info.end_time == before["0"].info.end_time
    assert trials["1"].info.run_id == before["1"].info.run_id
    assert trials["1"].info.status == "FINISHED"


def trials_of(shared: SharedServer, run: UUID) -> dict[str, Run]:
    """The MLflow runs of a sweep's trials, by number."""
    experiment = shared.mlflow.get_experiment_by_name("mnist-gan")
    tag = f"tags.prefect_flow_run_id = '{run}' and tags.trial != ''"
    found = shared.mlflow.search_runs([experiment.experiment_id], tag)
    trials = {each.data.tags["trial"]: each for each in found}
    assert len(trials) == len(found), "one MLflow run a trial"
    return trials
