import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from threading import Event

import mlflow
import pytest
import torch
from prefect.exceptions import Pause, TerminationSignal
from prefect.states import Suspended

from gan.data import DATASET_DIGEST
from gan.recipes import RECIPES, quick, vanilla
from gan.training import name_device
from tasks.data import DatasetRef
from tasks.services import ServiceError
from tasks.tracking import EXPERIMENT, describe, find_run, flat_parameters, git_commit, tracked_run
from tests.mlflow_server import MlflowServer
from tests.mlflow_store import mlflow_store

DATASET = DatasetRef(folder=Path("raw"), digest=DATASET_DIGEST, sources=())


@pytest.fixture(scope="module", autouse=True)
def _store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with mlflow_store(tmp_path_factory.mktemp("store"), EXPERIMENT):
        yield


def test_run_ends_as_finished_with_what_it_stands_on(tmp_path: Path) -> None:
    with tracked_run(quick(), DATASET, "cpu", tmp_path) as run_id:
        pass
    run = mlflow.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params["loss"] == quick().loss
    assert run.data.params["width"] == str(quick().networks.width)
    assert run.data.tags["dataset_digest"] == DATASET_DIGEST
    assert run.data.tags["judge"] == "mnist-judge-1"
    assert run.data.tags["processor"] == name_device(torch.device("cpu"))
    assert {"torch", "python", "device", "devices", "git_commit"} <= run.data.tags.keys()


def test_exception_ends_the_run_as_failed(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), tracked_run(quick(), DATASET, "cpu", tmp_path) as run_id:
        raise ZeroDivisionError
    assert mlflow.get_run(run_id).info.status == "FAILED"
    assert mlflow.active_run() is None


def test_a_run_is_known_by_its_tags_from_the_first_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []

    def log_params(_: object) -> None:
        run = mlflow.active_run()
        assert run
        found.append(mlflow.get_run(run.info.run_id).data.tags)

    monkeypatch.setattr(mlflow, "log_params", log_params)
    with tracked_run(quick(), DATASET, "cpu", tmp_path) as run_id:
        pass
    with tracked_run(quick(), DATASET, "cpu", tmp_path) as again:
        pass
    assert again == run_id
    for tags in found:
        assert tags["run_folder"] == tmp_path.name
        assert {"prefect_flow_run_id", "host", "recipe", "git_commit"} <= tags.keys()


@pytest.mark.parametrize("recipe", RECIPES.values())
def test_every_field_is_a_parameter_of_its_own(recipe: object) -> None:
    config = recipe()  # type: ignore[operator]
    parameters = flat_parameters(config)
    assert all(isinstance(value, str | int | float) for value in parameters.values())
    assert parameters["latent_dim"] == config.networks.latent_dim
    assert parameters["epochs"] == config.epochs
    assert "networks" not in parameters


def test_name_says_what_is_done() -> None:
    assert describe(replace(vanilla(), epochs=1, seed=3)) == "vanilla, 1 epoch, seed 3"
    assert describe(replace(quick(), epochs=12)) == "quick, 12 epochs, seed 0"


def test_commit_outside_a_checkout_is_unknown(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("GIT_DIR", str(tmp_path))
    assert git_commit() == "unknown"


@pytest.mark.parametrize(
    "asked", [KeyboardInterrupt(), TerminationSignal(15), Pause(state=Suspended())], ids=repr
)
def test_signal_or_pause_ends_the_run_as_killed(asked: BaseException, tmp_path: Path) -> None:
    with pytest.raises(type(asked)), tracked_run(quick(), DATASET, "cpu", tmp_path) as run_id:
        raise asked
    assert mlflow.get_run(run_id).info.status == "KILLED"


def test_way_out_is_said_also_where_the_server_answers_by_then(tmp_path: Path) -> None:
    """As where its database refuses, or it came back a moment too late."""
    with (
        pytest.raises(ServiceError, match=r"^MLflow stayed away: full; what is trained .*--resume"),
        tracked_run(quick(), DATASET, "cpu", tmp_path),
    ):
        raise ServiceError("MLflow stayed away: full")


def test_signal_is_seen_behind_what_a_library_raised_as_it_tidied_up(tmp_path: Path) -> None:
    def interrupted() -> None:
        try:
            raise KeyboardInterrupt
        finally:
            (tmp_path / "none").rmdir()

    with (
        pytest.raises(FileNotFoundError),
        tracked_run(quick(), DATASET, "cpu", tmp_path) as run_id,
    ):
        interrupted()
    assert mlflow.get_run(run_id).info.status == "KILLED"


def test_what_is_done_waits_for_an_mlflow_that_is_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = MlflowServer(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.url)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    back = Event()

    def come_back() -> None:
        time.sleep(2)
        with server.running():
            back.wait(60)

    with ThreadPoolExecutor() as pool:
        with server.running(), ExitStack() as run:
            run_id = run.enter_context(tracked_run(quick(), DATASET, "cpu", tmp_path))
            ended = run.pop_all()
        pool.submit(come_back)
        ended.close()
        assert mlflow.get_run(run_id).info.status == "FINISHED"
        back.set()


def test_training_that_is_taken_up_again_goes_on_in_its_run(tmp_path: Path) -> None:
    folder = tmp_path / "0d1c"
    with pytest.raises(ZeroDivisionError), tracked_run(quick(), DATASET, "cpu", folder) as first:
        raise ZeroDivisionError
    with tracked_run(quick(), DATASET, "cpu", folder) as second:
        assert mlflow.get_run(second).info.status == "RUNNING"
    assert second == first
    assert mlflow.get_run(first).info.status == "FINISHED"
    with tracked_run(quick(), DATASET, "cpu", tmp_path / "0d1d") as other:
        pass
    assert other != first


def test_flow_run_that_crashes_before_it_is_tracked_has_nothing_to_end() -> None:
    assert find_run("prefect_flow_run_id", "0d1e") is None
