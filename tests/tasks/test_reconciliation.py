"""A real Prefect API and a real MLflow store that do not agree, and how they come to."""

import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from datetime import timedelta
from pathlib import Path
from uuid import UUID, uuid4

import pytest
from mlflow import MlflowClient
from prefect import flow, server
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.objects import FlowRun, State
from prefect.exceptions import TerminationSignal
from prefect.logging import disable_run_logger
from prefect.runtime import flow_run
from prefect.states import (
    AwaitingRetry,
    Cancelled,
    Cancelling,
    Completed,
    Crashed,
    Failed,
    Running,
    Scheduled,
)
from prefect.testing.utilities import prefect_test_harness

from deployments.worker import take_up_runs
from flows.command_line import PATIENCE_S
from tasks.reconciliation import (
    BY_A_USER,
    MAX_STARTS,
    count_starts,
    end_left_runs,
    interrupted_by,
    take_up_crashed_runs,
)
from tasks.run_folder import SCRATCH, lock_of
from tasks.tracking import EXPERIMENT, end_tracking
from tests.mlflow_store import mlflow_store, new_run


@flow
def nothing() -> None:
    """A flow for runs that are only recorded."""


@pytest.fixture(scope="module")
def prefect() -> Iterator[SyncPrefectClient]:
    with (
        prefect_test_harness(server_startup_timeout=PATIENCE_S),
        get_client(sync_client=True) as client,
        disable_run_logger(),
    ):
        yield client


@pytest.fixture(scope="module", autouse=True)
def _store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with mlflow_store(tmp_path_factory.mktemp("store"), EXPERIMENT):
        yield


@pytest.fixture(autouse=True)
def runs_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the runs' folders."""
    monkeypatch.setenv("MNIST_GAN_RUNS_DIR", str(tmp_path / "runs"))
    return tmp_path / "runs"


def track(flow_run_id: UUID, host: str = socket.gethostname()) -> str:
    """An MLflow run that is left open; its id."""
    name = str(flow_run_id)
    return new_run(EXPERIMENT, prefect_flow_run_id=name, run_folder=name, host=host)


def status(run_id: str) -> str:
    return MlflowClient().get_run(run_id).info.status


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        (Completed(), "FINISHED"),
        (Cancelled(), "KILLED"),
        (Failed(), "FAILED"),
        (Crashed(), "FAILED"),
        (Running(), "RUNNING"),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_run_ends_like_its_flow_run(
    state: State[None], expected: str, prefect: SyncPrefectClient
) -> None:
    run_id = track(prefect.create_flow_run(nothing, state=state).id)
    end_left_runs.fn()
    assert status(run_id) == expected


@pytest.mark.parametrize("known", [True, False], ids=["known to Prefect", "unknown to it"])
def test_run_whose_process_died_here_has_failed(
    known: bool, prefect: SyncPrefectClient, runs_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flow_run_id = prefect.create_flow_run(nothing, state=Running()).id if known else uuid4()
    run_id = track(flow_run_id)
    folder = runs_dir / str(flow_run_id)
    (folder / SCRATCH).mkdir(parents=True)
    with lock_of(folder):
        end_left_runs.fn()
        assert status(run_id) == "RUNNING", "its process holds the lock"
    end_left_runs.fn()
    if known:
        assert status(run_id) == "RUNNING", "it may have been started again just now"
        monkeypatch.setattr("tasks.reconciliation.TIME_TO_START", timedelta(0))
        end_left_runs.fn()
    assert status(run_id) == "FAILED"
    assert not (folder / SCRATCH).exists()
    if known:
        assert prefect.read_flow_run(flow_run_id).state_name == "Crashed"


@pytest.mark.parametrize(
    ("state", "ends"),
    [
        (Cancelled(), ["KILLED", "KILLED", "FINISHED"]),
        (Crashed(), ["FAILED", "FINISHED", "FINISHED"]),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_hook_ends_runs_like_the_flow_run(
    state: State[None], ends: list[str], prefect: SyncPrefectClient
) -> None:
    """One under way, one that was done in the last moment, one that is an ended trial of it."""
    run = prefect.create_flow_run(nothing, state=state)
    open_, done, trial = (track(run.id) for _ in range(3))
    MlflowClient().set_terminated(done)
    MlflowClient().set_terminated(trial)
    MlflowClient().set_tag(trial, "trial", "0")
    end_tracking(nothing, run, state)
    assert [status(each) for each in (open_, done, trial)] == ends


def test_run_that_a_signal_crashed_after_all_its_work_is_completed(
    prefect: SyncPrefectClient,
) -> None:
    by_hand, other = (prefect.create_flow_run(nothing, state=Crashed()) for _ in range(2))
    MlflowClient().set_terminated(track(by_hand.id))
    take_up_crashed_runs.fn()
    assert prefect.read_flow_run(by_hand.id).state_name == "Completed"
    assert prefect.read_flow_run(other.id).state_name == "Crashed"


@pytest.mark.parametrize(
    ("state", "before", "after"),
    [
        (Cancelled(), "FAILED", "KILLED"),
        (Failed(), "KILLED", "FAILED"),
        (Crashed(), "KILLED", "FAILED"),
        (Crashed(), "FINISHED", "FINISHED"),
        (Completed(), "FAILED", "FINISHED"),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_run_that_ended_otherwise_than_its_flow_run_ends_like_it(
    state: State[None], before: str, after: str, prefect: SyncPrefectClient
) -> None:
    """As where it is started again and cancelled before it comes to tell MLflow."""
    flow_run_id = prefect.create_flow_run(nothing, state=Running()).id
    run_id = track(flow_run_id)
    MlflowClient().set_terminated(run_id, before)
    prefect.set_flow_run_state(flow_run_id, state, force=True)
    end_left_runs.fn()
    assert status(run_id) == after


def test_worker_that_died_does_not_crash_its_living_sweep(
    prefect: SyncPrefectClient, runs_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.reconciliation.TIME_TO_START", timedelta(0))
    sweep_id = prefect.create_flow_run(nothing, state=Running()).id
    name, host = str(sweep_id), socket.gethostname()
    trial = new_run(
        EXPERIMENT, prefect_flow_run_id=name, run_folder=f"{name}-0003", host=host, trial="3"
    )
    for folder in (runs_dir / name, runs_dir / f"{name}-0003"):
        folder.mkdir(parents=True)
        with lock_of(folder):
            pass
    with lock_of(runs_dir / name):
        end_left_runs.fn()
        assert status(trial) == "RUNNING"
        assert prefect.read_flow_run(sweep_id).state_name == "Running"
    end_left_runs.fn()
    assert status(trial) == "FAILED"
    assert prefect.read_flow_run(sweep_id).state_name == "Crashed"


def test_run_that_was_only_silent_is_running_again(
    prefect: SyncPrefectClient, runs_dir: Path
) -> None:
    flow_run_id = prefect.create_flow_run(nothing, state=Crashed()).id
    run_id = track(flow_run_id)
    folder = runs_dir / str(flow_run_id)
    folder.mkdir(parents=True)
    with lock_of(folder):
        for _ in range(MAX_STARTS):
            end_left_runs.fn()
            assert prefect.read_flow_run(flow_run_id).state_name == "Running"
            assert status(run_id) == "RUNNING"
            prefect.set_flow_run_state(flow_run_id, Crashed(), force=True)
    assert count_starts(prefect, prefect.read_flow_run(flow_run_id)) == 1
    end_left_runs.fn()
    assert status(run_id) == "FAILED"


@pytest.mark.usefixtures("prefect")
def test_temporary_files_of_killed_processes_go(runs_dir: Path) -> None:
    for name in ("promotion", "living"):
        (runs_dir / name / SCRATCH / "left").mkdir(parents=True)
        with lock_of(runs_dir / name):
            pass
    with lock_of(runs_dir / "living"):
        end_left_runs.fn()
    assert [path.parent.name for path in runs_dir.glob(f"*/{SCRATCH}")] == ["living"]


def test_run_that_is_being_cancelled_is_left_to_prefect(
    prefect: SyncPrefectClient, runs_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.reconciliation.TIME_TO_START", timedelta(0))
    flow_run_id = prefect.create_flow_run(nothing, state=Cancelling()).id
    run_id = track(flow_run_id)
    folder = runs_dir / str(flow_run_id)
    folder.mkdir(parents=True)
    with lock_of(folder):
        pass
    end_left_runs.fn()
    assert prefect.read_flow_run(flow_run_id).state_name == "Cancelling"
    assert status(run_id) == "RUNNING"


@pytest.mark.parametrize("relative", [False, True], ids=["absolute", "relative"])
def test_whoever_was_in_a_folder_that_is_resumed_has_failed(
    relative: bool, prefect: SyncPrefectClient, runs_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(runs_dir.parent)
    flow_run_id = prefect.create_flow_run(nothing, state=Running()).id
    run_id = track(flow_run_id)
    folder = runs_dir / str(flow_run_id)
    folder.mkdir(parents=True)
    with lock_of(folder):
        end_left_runs.fn(folder.relative_to(runs_dir.parent) if relative else folder)
    assert prefect.read_flow_run(flow_run_id).state_name == "Crashed"
    assert status(run_id) == "FAILED"


def test_run_of_another_machine_is_not_judged_by_a_folder_here(
    prefect: SyncPrefectClient, runs_dir: Path
) -> None:
    flow_run_id = prefect.create_flow_run(nothing, state=Running()).id
    run_id = track(flow_run_id, host="elsewhere")
    folder = runs_dir / str(flow_run_id)
    folder.mkdir(parents=True)
    lock_of(folder).acquire().lock.release()
    end_left_runs.fn()
    assert status(run_id) == "RUNNING"


def test_the_first_run_of_all_finds_nothing_to_end(
    prefect: SyncPrefectClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id = track(prefect.create_flow_run(nothing, state=Completed()).id)
    for module in ("tracking", "reconciliation"):
        monkeypatch.setattr(f"tasks.{module}.EXPERIMENT", "not made yet")
    end_left_runs.fn()
    assert status(run_id) == "RUNNING", "it belongs to another experiment"


@pytest.fixture
def deployed(prefect: SyncPrefectClient) -> FlowRun:
    """A run of a deployment that is a training."""
    prefect.create_work_pool(WorkPoolCreate(name="pool", type="process"), overwrite=True)
    flow_id = prefect.create_flow(nothing)
    deployment = prefect.create_deployment(flow_id, "d", work_pool_name="pool", tags=["training"])
    return prefect.create_flow_run_from_deployment(deployment, tags=["training"])


def start_and_crash(prefect: SyncPrefectClient, run: FlowRun) -> None:
    for state in (Running(), Crashed()):
        prefect.set_flow_run_state(run.id, state, force=True)


def test_deployed_training_that_crashed_is_scheduled_again_a_few_times(
    prefect: SyncPrefectClient, deployed: FlowRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.reconciliation.LATE_REPORTS", timedelta())
    by_hand = prefect.create_flow_run(nothing, state=Crashed(), tags=["training"])
    asked: State[None] = Scheduled(name="AwaitingRetry", message=BY_A_USER)
    for _ in range(MAX_STARTS):
        prefect.set_flow_run_state(deployed.id, asked, force=True)
    states = []
    for _ in range(MAX_STARTS):
        start_and_crash(prefect, deployed)
        take_up_crashed_runs.fn()
        states.append(prefect.read_flow_run(deployed.id).state_name)
    assert states == ["AwaitingRetry"] * (MAX_STARTS - 1) + ["Crashed"]
    assert prefect.read_flow_run(by_hand.id).state_name == "Crashed", "no worker would run it"


def test_retry_on_prefects_pages_is_known_by_its_words() -> None:
    pages = (Path(server.__file__).parent / "ui").rglob("*.js")
    assert any(f"`AwaitingRetry`,message:`{BY_A_USER}`" in page.read_text() for page in pages)


@pytest.mark.parametrize(
    ("meanwhile", "left"), [(Running(), "Running"), (Crashed(), "AwaitingRetry")]
)
def test_crash_is_left_alone_until_it_is_old_enough_and_then_looked_at_again(
    prefect: SyncPrefectClient,
    deployed: FlowRun,
    monkeypatch: pytest.MonkeyPatch,
    meanwhile: State[None],
    left: str,
) -> None:
    """A worker may report it twice, and a user may have retried the run by then."""
    monkeypatch.setattr("tasks.reconciliation.LATE_REPORTS", timedelta(seconds=2))
    start_and_crash(prefect, deployed)
    with ThreadPoolExecutor() as other:
        done = other.submit(copy_context().run, take_up_crashed_runs.fn)
        time.sleep(1)
        prefect.set_flow_run_state(deployed.id, meanwhile, force=True)
        time.sleep(1.5)
        assert prefect.read_flow_run(deployed.id).state_name == meanwhile.name
        done.result()
    assert prefect.read_flow_run(deployed.id).state_name == left


def test_run_that_was_retried_while_another_was_waited_for_is_left_alone(
    prefect: SyncPrefectClient, deployed: FlowRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.reconciliation.LATE_REPORTS", timedelta(seconds=2))
    assert deployed.deployment_id
    other = prefect.create_flow_run_from_deployment(deployed.deployment_id, tags=["training"])
    for run in (deployed, other):
        start_and_crash(prefect, run)
    with ThreadPoolExecutor() as pool:
        done = pool.submit(copy_context().run, take_up_crashed_runs.fn)
        time.sleep(1)
        for run in (deployed, other):
            prefect.set_flow_run_state(run.id, Running(), force=True)
        done.result()
    assert {prefect.read_flow_run(run.id).state_name for run in (deployed, other)} == {"Running"}


@pytest.mark.parametrize("trial", [False, True], ids=["training", "sweep whose first trial ended"])
def test_run_whose_process_died_after_all_its_work_is_completed(
    trial: bool,
    prefect: SyncPrefectClient,
    runs_dir: Path,
    deployed: FlowRun,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tasks.reconciliation.LATE_REPORTS", timedelta())
    run_id = track(deployed.id)
    folder = runs_dir / str(deployed.id)
    (folder / "checkpoints").mkdir(parents=True)
    with lock_of(folder):
        pass
    MlflowClient().set_terminated(run_id)
    if trial:
        MlflowClient().set_tag(run_id, "trial", "0")
    start_and_crash(prefect, deployed)
    take_up_crashed_runs.fn()
    left = prefect.read_flow_run(deployed.id).state_name
    assert left == ("AwaitingRetry" if trial else "Completed")
    assert bool(list(folder.iterdir())) == trial, "the lock and the checkpoints' folder are gone"


def test_stack_that_starts_again_takes_up_only_what_is_not_done(
    prefect: SyncPrefectClient, deployed: FlowRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deployments.worker.POOL", "pool")
    assert deployed.deployment_id
    runs = {}
    for name in ("Completed", "AwaitingRetry", "Cancelled", "Crashed"):
        runs[name] = prefect.create_flow_run_from_deployment(deployed.deployment_id).id
        prefect.set_flow_run_state(runs[name], Running(), force=True)
        for _ in range(MAX_STARTS - 1 if name == "Crashed" else 0):
            for state in (AwaitingRetry(), Running()):
                prefect.set_flow_run_state(runs[name], state, force=True)
    MlflowClient().set_terminated(track(runs["Completed"]))
    prefect.set_flow_run_state(runs["Cancelled"], Cancelling(), force=True)
    take_up_runs(prefect)
    assert {name: prefect.read_flow_run(run).state_name for name, run in runs.items()} == {
        name: name for name in runs
    }


def behind(signal: BaseException) -> OSError:
    """What a library may raise that is interrupted, and fails as it tidies up."""
    error = OSError(39, "Directory not empty")
    error.__context__ = signal
    return error


@pytest.mark.parametrize(
    ("error", "name"),
    [
        (KeyboardInterrupt(), "Ctrl-C"),
        (TerminationSignal(15), "SIGTERM"),
        (behind(KeyboardInterrupt()), "Ctrl-C"),
    ],
)
def test_signal_cancels_what_is_not_done(
    error: BaseException,
    name: str,
    prefect: SyncPrefectClient,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = prefect.create_flow_run(nothing, state=Running())
    run_id = track(run.id)
    monkeypatch.setattr(flow_run, "get_id", lambda: str(run.id))
    state = interrupted_by(error, tmp_path)
    assert status(run_id) == "KILLED", "Prefect runs no hook for a state that a flow gives"
    assert state.is_cancelled()
    assert state.message == f"Ended by {name}; what was done is kept in {tmp_path}."


@pytest.mark.parametrize("store", ["http://127.0.0.1:1", "sqlite:///none.db"])
def test_signal_cancels_where_mlflow_is_away_or_new(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    assert interrupted_by(KeyboardInterrupt(), tmp_path).is_cancelled()


def test_signal_that_comes_when_all_is_done_changes_nothing(
    prefect: SyncPrefectClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = prefect.create_flow_run(nothing, state=Running())
    MlflowClient().set_terminated(track(run.id))
    monkeypatch.setattr(flow_run, "get_id", lambda: str(run.id))
    (tmp_path / "checkpoints").mkdir()
    assert interrupted_by(KeyboardInterrupt(), tmp_path).is_completed()
    assert not (tmp_path / "checkpoints").exists()


def test_error_without_a_signal_goes_on(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="Directory not empty"):
        interrupted_by(behind(ZeroDivisionError()), tmp_path)


def test_prefects_supervisor_decides_where_there_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFECT_FLOW_RUN_EXECUTE_SIGTERM_BEHAVIOR", "reschedule")
    with pytest.raises(TerminationSignal):
        interrupted_by(TerminationSignal(15), tmp_path)
