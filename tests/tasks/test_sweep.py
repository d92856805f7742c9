"""Proposals, ends and the report of a sweep, on a real study and a real MLflow on SQLite."""

import json
import random
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from uuid import uuid4

import mlflow
import optuna
import pytest
from distributed import Scheduler, get_client, get_worker
from mlflow import MlflowClient
from optuna import Study
from optuna.distributions import IntDistribution
from optuna.trial import TrialState
from PIL import Image
from prefect import task
from prefect.exceptions import Pause
from prefect.logging import disable_run_logger
from prefect.testing.utilities import prefect_test_harness

import tasks.dask_cluster
from flows.command_line import PATIENCE_S
from gan.bundle import verify_bundle
from gan.evaluation.scores import load_floors
from gan.recipes import vanilla
from tasks.dask_cluster import (
    MAX_SQLITE_WRITERS,
    count_workers,
    make_runner,
    require_store,
    run_trials,
)
from tasks.promotion import Decision
from tasks.registry import RegisteredVersion
from tasks.run_folder import RunFolderError, lock_of
from tasks.search_space import Range, Space, build_distributions, find_middle, suggest
from tasks.sweep import (
    SCORE,
    STARTUP_TRIALS,
    Sweep,
    SweepError,
    begin_trial,
    describe_end,
    end_open_trials,
    open_study,
    own_sweep_folder,
    propose_trials,
    rank,
    record_death,
    run_trial,
)
from tasks.sweep_report import make_table, plot_best, weigh, write_page
from tasks.tracking import EXPERIMENT
from tests.mlflow_store import mlflow_store, new_run

CONFIG = replace(vanilla(), epochs=2, batch_size=6000)
SPACE: Space = {
    "learning_rate": Range(low=0.0001, high=0.001, log=True),
    "beta1": [0.0, 0.5, 0.9],
}


@pytest.fixture(scope="module", autouse=True)
def _store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with mlflow_store(tmp_path_factory.mktemp("store"), EXPERIMENT), disable_run_logger():
        yield


@pytest.mark.parametrize("left", [0, 1, 20, 0.5, -2, -1])
def test_a_journal_that_broke_off_in_the_middle_of_a_line_goes_on(
    left: float, tmp_path: Path
) -> None:
    space = build_distributions(SPACE, CONFIG)
    open_study(tmp_path).enqueue_trial(find_middle(space))
    journal = tmp_path / "trials.journal"
    whole = journal.read_bytes()
    open_study(tmp_path).enqueue_trial(find_middle(space))
    added = journal.read_bytes().removeprefix(whole)
    at = int(left * len(added)) if left == 0.5 else int(left)
    journal.write_bytes(whole + added[:at])
    for num in (2, 3):
        open_study(tmp_path).enqueue_trial(find_middle(space))
        assert len(open_study(tmp_path).trials) == num
    lines = journal.read_bytes().splitlines(keepends=True)
    assert all(json.loads(line) for line in lines)
    assert lines[-1].endswith(b"\n")


@pytest.fixture(scope="module")
def _prefect() -> Iterator[None]:
    with prefect_test_harness(server_startup_timeout=PATIENCE_S):
        yield


@pytest.fixture
def free_address(monkeypatch: pytest.MonkeyPatch, pytestconfig: pytest.Config) -> str:
    """Where a scheduler can be started, whose workers find the project."""
    monkeypatch.setenv("PYTHONPATH", str(pytestconfig.rootpath))
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return f"tcp://127.0.0.1:{probe.getsockname()[1]}"


@pytest.fixture
def sweep(tmp_path: Path) -> Sweep:
    folder = tmp_path / "runs" / uuid4().hex  # MLflow knows runs by the names of their folders
    folder.mkdir(parents=True)
    return Sweep(
        folder=folder,
        config=CONFIG,
        distributions=build_distributions(SPACE, CONFIG),
        device="cpu",
        threads=1,
        mlflow_run_id=new_run(EXPERIMENT),
        tracking_uri=mlflow.get_tracking_uri(),
    )


def leave_checkpoints(sweep: Sweep, number: int) -> Path:
    """What a trial has on the disk while it runs, here in the place of a real one."""
    checkpoints = sweep.trial_folder(number) / "checkpoints"
    checkpoints.mkdir(parents=True, exist_ok=True)
    (checkpoints / "step-1").touch()
    return checkpoints


def pretend(sweep: Sweep, number: int) -> dict[str, object]:
    """Do one trial as a worker does, with a score that comes from its settings; gives these."""
    study = open_study(sweep.folder, sweep.config.seed + number)
    trial = begin_trial(sweep.folder, number, study)
    values = suggest(trial, sweep.distributions)
    trial.report(values["learning_rate"], 1)
    study.tell(trial, values["learning_rate"] + values["beta1"])
    return values


def test_first_trial_is_the_middle_and_each_is_proposed_once(sweep: Sweep) -> None:
    assert propose_trials.fn(sweep, 3) == [0, 1, 2]
    assert propose_trials.fn(sweep, 3) == [0, 1, 2]
    assert pretend(sweep, 0) == find_middle(sweep.distributions)
    assert propose_trials.fn(sweep, 4) == [1, 2, 3]
    assert propose_trials.fn(sweep, 2) == [1, 2, 3]


def test_what_an_ended_trial_left_on_the_disk_goes_when_the_sweep_goes_on(sweep: Sweep) -> None:
    propose_trials.fn(sweep, 2)
    pretend(sweep, 0)
    ended, open_one = leave_checkpoints(sweep, 0), leave_checkpoints(sweep, 1)
    assert propose_trials.fn(sweep, 2) == [1]
    assert not ended.exists()
    assert open_one.exists()


def test_trial_of_a_dead_worker_is_begun_again_with_its_settings(sweep: Sweep) -> None:
    propose_trials.fn(sweep, 2)
    first = begin_trial(sweep.folder, 1, open_study(sweep.folder, 1))
    values = suggest(first, sweep.distributions)
    first.report(0.5, 1)
    again = begin_trial(sweep.folder, 1, open_study(sweep.folder, 2))
    assert again.number == 1
    assert suggest(again, sweep.distributions) == values
    assert open_study(sweep.folder).trials[1].intermediate_values == {1: 0.5}


def test_an_interrupted_sweep_proposes_what_an_uninterrupted_one_does(
    sweep: Sweep, tmp_path: Path
) -> None:
    num = STARTUP_TRIALS + 4
    propose_trials.fn(sweep, num)
    straight = [pretend(sweep, number) for number in range(num)]
    other = replace(sweep, folder=tmp_path)
    broken = []
    for number in range(num):
        propose_trials.fn(other, num)
        if random.random() < 0.5:
            study = open_study(other.folder, number)
            suggest(begin_trial(other.folder, number, study), sweep.distributions)
        broken.append(pretend(other, number))
    assert broken == straight
    third = replace(sweep, folder=tmp_path / "third", config=replace(CONFIG, seed=1))
    third.folder.mkdir()
    propose_trials.fn(third, num)
    assert [pretend(third, number) for number in range(num)] != straight


def test_only_a_sweep_of_the_same_space_is_resumed(tmp_path: Path) -> None:
    wide = build_distributions(SPACE, CONFIG)
    narrow = build_distributions({"beta1": [0.5]}, CONFIG)
    with own_sweep_folder(tmp_path, CONFIG, wide, resume=False) as folder:
        pass
    with own_sweep_folder(tmp_path, CONFIG, wide, resume=True) as again:
        assert again == folder
    for config, space in ((CONFIG, narrow), (replace(CONFIG, epochs=3), wide)):
        with (
            pytest.raises(RunFolderError, match="nothing to resume"),
            own_sweep_folder(tmp_path, config, space, resume=True),
        ):
            pass
    with (
        lock_of(folder),
        pytest.raises(RunFolderError, match="another process is working in"),
        own_sweep_folder(tmp_path, CONFIG, wide, resume=True),
    ):
        pass


def test_sweep_is_found_again_whatever_the_disk_did_to_notes(tmp_path: Path) -> None:
    space = build_distributions(SPACE, CONFIG)
    with own_sweep_folder(tmp_path, CONFIG, space, resume=False) as folder:
        pass
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "sweep.json").write_bytes(b"\xff")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))  # as a full disk
    try:
        with pytest.raises(OSError), own_sweep_folder(tmp_path, CONFIG, space, resume=True):  # noqa: PT011
            pass
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    with own_sweep_folder(tmp_path, CONFIG, space, resume=True) as again:
        assert again == folder


def test_best_are_those_with_the_lowest_score(sweep: Sweep) -> None:
    propose_trials.fn(sweep, 4)
    with pytest.raises(SweepError, match="none of 4 trials came to its end"):
        rank(open_study(sweep.folder))
    for number in range(4):
        pretend(sweep, number)
    scores = [trial.value for trial in rank(open_study(sweep.folder))]
    assert len(scores) == 4
    assert scores == sorted(scores)


def test_trial_that_takes_its_workers_with_it_has_failed(sweep: Sweep) -> None:
    propose_trials.fn(sweep, 3)
    trial = begin_trial(sweep.folder, 0, open_study(sweep.folder))
    run_id = new_run(EXPERIMENT)
    trial.set_user_attr("mlflow_run_id", run_id)
    trial.report(3.0, 1)
    checkpoints = leave_checkpoints(sweep, 0)
    record_death(sweep, 0, "4 workers died of it")
    assert not checkpoints.exists()
    begin_trial(sweep.folder, 1, open_study(sweep.folder))
    record_death(sweep, 1, "4 workers died of it")
    record_death(sweep, 2, "4 workers died as they started")
    ended = open_study(sweep.folder).trials
    assert [trial.state for trial in ended] == [TrialState.FAIL] * 3
    assert "as they started" in describe_end(ended[2])
    assert propose_trials.fn(sweep, 3) == []
    run = MlflowClient().get_run(run_id)
    assert run.info.status == "FAILED"
    assert run.data.tags["trial_reason"] == "4 workers died of it"
    assert run.data.metrics[SCORE] == 3.0


def test_interrupted_sweep_ends_the_runs_of_its_open_trials(sweep: Sweep) -> None:
    propose_trials.fn(sweep, 1)
    run_id = new_run(EXPERIMENT)
    trial = begin_trial(sweep.folder, 0, open_study(sweep.folder))
    trial.set_user_attr("mlflow_run_id", run_id)
    end_open_trials(sweep)
    assert MlflowClient().get_run(run_id).info.status == "KILLED"
    assert propose_trials.fn(sweep, 1) == [0]


def test_sqlite_is_refused_for_many_writers() -> None:
    require_store("sqlite:///mlflow.db", MAX_SQLITE_WRITERS)
    require_store("http://host:5000", 1000)
    with pytest.raises(SweepError, match="takes 8 writers at once, not 9; set MLFLOW_TRACKING_URI"):
        require_store("sqlite:///mlflow.db", MAX_SQLITE_WRITERS + 1)


def test_workers_that_nobody_asked_for_are_no_more_than_the_store_takes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for cores, on_sqlite in ((2, 2), (12, MAX_SQLITE_WRITERS)):
        monkeypatch.setattr(tasks.dask_cluster, "CPU_COUNT", cores)
        assert count_workers("cpu", "sqlite:///mlflow.db") == on_sqlite
        assert count_workers("cpu", "http://host:5000") == cores
        assert count_workers("cuda", "http://host:5000") == 1


@pytest.mark.slow
@pytest.mark.usefixtures("_prefect")
def test_trial_that_is_whole_and_one_that_is_pruned(
    sweep: Sweep, mnist_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MNIST_GAN_DATA_DIR", str(mnist_dir.parent))
    propose_trials.fn(sweep, STARTUP_TRIALS + 2)
    run_trial(sweep, 0)
    for number in range(1, STARTUP_TRIALS + 1):
        pretend(sweep, number)  # scores that no training reaches
    run_trial(sweep, STARTUP_TRIALS + 1)
    leave_checkpoints(sweep, 0)
    run_trial(sweep, 0)  # has ended, and is left alone, but for what a killed worker left
    trials = open_study(sweep.folder).trials
    whole, pruned = trials[0], trials[-1]
    assert whole.state == TrialState.COMPLETE
    assert list(whole.intermediate_values) == [1, 2]
    assert whole.value == whole.intermediate_values[2]
    assert verify_bundle(sweep.trial_folder(0) / "bundle") == whole.user_attrs["digest"]
    assert pruned.state == TrialState.PRUNED
    assert list(pruned.intermediate_values) == [1]
    for trial, end in ((whole, "complete"), (pruned, "pruned")):
        run = MlflowClient().get_run(trial.user_attrs["mlflow_run_id"])
        assert run.info.status == "FINISHED"
        assert run.data.tags["trial_end"] == end
        assert run.data.tags["mlflow.parentRunId"] == sweep.mlflow_run_id
        assert not (sweep.trial_folder(trial.number) / "checkpoints").exists()
    reason = MlflowClient().get_run(pruned.user_attrs["mlflow_run_id"]).data.tags["trial_reason"]
    assert reason.startswith("its score in epoch 1, ")


@pytest.fixture
def mixed(sweep: Sweep) -> Study:
    """Trials of every end; the score hangs on the learning rate alone, but for a trace."""
    study = open_study(sweep.folder)
    values = iter(range(100))
    for number in range(20):
        params = {"learning_rate": 0.0001 + 0.00004 * number, "beta1": (0.0, 0.5, 0.9)[number % 3]}
        state = {3: TrialState.FAIL, 5: TrialState.PRUNED}.get(number, TrialState.COMPLETE)
        study.add_trial(
            optuna.create_trial(
                params=params,
                distributions=dict(sweep.distributions),
                state=state,
                value=None if state == TrialState.FAIL else 100 - next(values),
                intermediate_values={1: 5.0},
                user_attrs={"reason": "it | broke\nin two"} if number == 3 else {},
            )
        )
    return study


def test_report_has_all_trials_what_matters_and_the_middle(mixed: Study, tmp_path: Path) -> None:
    floors = load_floors()
    table, weights = make_table(mixed, {19: floors}), weigh(mixed)
    assert list(table["trial"]) == list(range(20))
    assert table["end"].value_counts().to_dict() == {"complete": 18, "fail": 1, "pruned": 1}
    assert table["frechet_distance"].dropna().to_dict() == {19: floors.frechet_distance}
    assert list(weights) == ["learning_rate", "beta1"]
    assert sum(weights.values()) == pytest.approx(1)
    version = RegisteredVersion(name="generator", version=7, alias="challenger")
    decision = Decision(version=7, champion=1, promoted=False, reason="asked for never")
    page = write_page(mixed, table, weights, 19, version, decision)
    assert page.startswith("# Sweep: trial 19 of 20 is generator version 7")
    assert "the middle of the space 100.0000" in page
    rows = [line for line in page.splitlines() if line.startswith("| ")]
    assert len(rows) == 2 + 20 + 2 + 2
    assert len({row.count("|") for row in rows[:22]}) == 1
    assert "it / broke in two" in page
    plot_best(mixed, tmp_path / "best.png")
    with Image.open(tmp_path / "best.png") as picture:
        assert picture.size == (1350, 750)


def test_whole_numbers_stay_whole_beside_a_trial_that_died_before_it_had_any(
    sweep: Sweep,
) -> None:
    study = open_study(sweep.folder)
    batches = {"batch_size": IntDistribution(1, 60_000)}
    for state, value, params in (
        (TrialState.COMPLETE, 2.5, {"batch_size": 12_345}),
        (TrialState.FAIL, None, {}),
    ):
        study.add_trial(
            optuna.create_trial(
                state=state,
                value=value,
                params=params,
                distributions={name: batches[name] for name in params},
            )
        )
    table = make_table(study, {})
    assert "12345," in table.to_csv()
    version = RegisteredVersion(name="generator", version=7, alias="challenger")
    decision = Decision(version=7, champion=1, promoted=False, reason="asked for never")
    page = write_page(study, table, {}, 0, version, decision)
    assert "| 0 | complete | 2.5 |  | 12345 | 0 |" in page
    assert "| 1 | fail |  |  |  | 0 |" in page


@pytest.mark.parametrize("end", [TrialState.PRUNED, TrialState.FAIL])
def test_a_middle_that_did_not_come_to_its_end_is_no_measure(sweep: Sweep, end: TrialState) -> None:
    """Workers that are faster may have ended trials enough for it to be pruned."""
    study = open_study(sweep.folder)
    early = {1: 9.0} if end == TrialState.PRUNED else {}
    value = early.get(1)
    study.add_trial(optuna.create_trial(state=end, value=value, intermediate_values=early))
    study.add_trial(optuna.create_trial(value=0.5))
    version = RegisteredVersion(name="generator", version=7, alias="challenger")
    decision = Decision(version=7, champion=1, promoted=False, reason="asked for never")
    page = write_page(study, make_table(study, {}), {}, 1, version, decision)
    assert "the best frechet_2k is 0.5000 (trial 1), no middle." in page


def test_few_trials_tell_nothing_of_importance(sweep: Sweep) -> None:
    propose_trials.fn(sweep, 2)
    pretend(sweep, 0)
    assert weigh(open_study(sweep.folder)) == {}


@contextmanager
def dask_running(address: str, *workers: Sequence[str]) -> Iterator[subprocess.Popen[bytes]]:
    """A real scheduler with a worker for each of these lists of options; gives the scheduler."""
    start = partial(subprocess.Popen, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    dask, quiet = [sys.executable, "-m", "dask"], "--no-dashboard"
    with ExitStack() as processes:
        scheduler = processes.enter_context(start([*dask, "scheduler", "--host", address, quiet]))
        processes.callback(scheduler.terminate)
        for options in workers:
            worker = processes.enter_context(start([*dask, "worker", address, quiet, *options]))
            processes.callback(worker.terminate)
        yield scheduler


def count_open(dask_scheduler: Scheduler) -> int:
    """What Dask was given to do and has not done."""
    return sum(each.state not in ("memory", "released") for each in dask_scheduler.tasks.values())


@task(name="trial")
def occupy(sweep: Sweep, number: int) -> None:
    """Stands in for a training on a GPU that may not be here: takes its time, and notes it."""
    handed = get_client().run_on_scheduler(count_open)
    note = {"worker": get_worker().name, "handed": handed, "begin": time.time()}
    time.sleep(1)
    note["end"] = time.time()
    (sweep.folder / f"{number}.json").write_text(json.dumps(note))


@pytest.mark.slow
@pytest.mark.usefixtures("_prefect")
def test_each_gpu_has_one_trial_at_a_time(
    sweep: Sweep, free_address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tasks.dask_cluster, "run_trial", occupy)
    threads = ["--nthreads", "3"]
    gpu = [*threads, "--resources", "GPU=1"]
    runner = make_runner(free_address, "cuda", 1, 3)
    with dask_running(
        free_address, [*gpu, "--name", "a"], [*gpu, "--name", "b"], [*threads, "--name", "none"]
    ):
        run_trials(replace(sweep, device="cuda"), list(range(6)), runner)
    notes = [json.loads(path.read_text()) for path in sweep.folder.glob("*.json")]
    assert len(notes) == 6
    assert {note["worker"] for note in notes} == {"a", "b"}
    assert max(note["handed"] for note in notes) == 2, "none waits on a worker that may die"
    notes.sort(key=lambda note: (note["worker"], note["begin"]))
    for earlier, later in pairwise(notes):
        assert earlier["worker"] != later["worker"] or earlier["end"] <= later["begin"]


@task(name="trial")
def wait_for_stop(sweep: Sweep, number: int) -> None:
    """Stands in for a training that would take a minute: ends at the stop sign, and notes it."""
    (sweep.folder / "begun").touch()
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if sweep.stop_sign.exists():
            (sweep.folder / "stopped").touch()
            return
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.usefixtures("_prefect")
def test_a_pause_does_not_wait_for_the_end_of_a_trial_but_has_it_stop(
    sweep: Sweep, free_address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pause() -> None:
        if (sweep.folder / "begun").exists():
            raise Pause

    monkeypatch.setattr(tasks.dask_cluster, "run_trial", wait_for_stop)
    monkeypatch.setattr(tasks.dask_cluster, "heed_pause", pause)
    sweep.stop_sign.touch()  # that of a former pause
    with dask_running(free_address, ["--nthreads", "1"]), pytest.raises(Pause):
        run_trials(sweep, [0], make_runner(free_address, "cpu", 1, 3))
    assert (sweep.folder / "stopped").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("_prefect")
def test_workers_without_a_gpu_are_no_help(
    sweep: Sweep, free_address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tasks.dask_cluster, "WORKERS_S", 10)
    sentence = f"scheduler at {free_address} has no worker with the resource GPU"
    with dask_running(free_address, []), pytest.raises(SweepError, match=sentence):
        run_trials(replace(sweep, device="cuda"), [0], make_runner(free_address, "cuda", 1, 3))


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("tls://127.0.0.1:1", "TLS expects a .* check your TLS configuration"),
        ("tcp://127.0.0.1:99999999999999999999", "int too large"),
        ("127.0.0.1", "missing port number"),
    ],
)
def test_address_that_cannot_be_connected_to_is_said_with_the_reason(
    address: str, reason: str, sweep: Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = SimpleNamespace(api_url="http://127.0.0.1:1/api")
    monkeypatch.setattr(tasks.dask_cluster, "get_client", lambda **_: server)
    sentence = rf"^Dask's scheduler at {address} does not answer: .*{reason}.*$"
    with pytest.raises(SweepError, match=sentence):
        run_trials(sweep, [0], make_runner(address, "cpu", 1, 3))


@pytest.mark.slow
@pytest.mark.chaos
@pytest.mark.usefixtures("_prefect")
def test_lost_scheduler_is_said_and_its_trial_left_to_be_taken_up(
    sweep: Sweep, free_address: str, mnist_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MNIST_GAN_DATA_DIR", str(mnist_dir.parent))
    propose_trials.fn(sweep, 1)
    long = replace(sweep, config=replace(CONFIG, epochs=1000))

    def strike() -> None:
        deadline = time.monotonic() + 60
        while not open_study(sweep.folder).trials[0].intermediate_values:
            if time.monotonic() > deadline:
                break
            time.sleep(0.5)
        scheduler.kill()

    with (
        dask_running(free_address, ["--nthreads", "1"]) as scheduler,
        ThreadPoolExecutor(1) as killer,
    ):
        killer.submit(strike)
        runner = make_runner(free_address, "cpu", 1, 3)
        with pytest.raises(SweepError, match=f"scheduler at {free_address} went away; .* --resume"):
            run_trials(long, [0], runner)
    assert open_study(sweep.folder).trials[0].state == TrialState.RUNNING
    assert propose_trials.fn(sweep, 1) == [0]
