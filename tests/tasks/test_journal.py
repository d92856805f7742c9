"""A real MLflow server that goes away and comes back while epochs are sent."""

import socket
import time
from collections import Counter
from pathlib import Path

import mlflow
import pytest
from mlflow import MlflowClient
from PIL import Image
from prefect.logging import disable_run_logger

from gan.training import Progress
from tasks import services
from tasks.journal import CURVES, Journal, open_journal, sheet_path
from tasks.services import ServiceError
from tests.mlflow_server import MlflowServer
from tests.mlflow_store import mlflow_store


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MlflowServer:
    server = MlflowServer(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.url)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("AWS_ENDPOINT_URL_S3", raising=False)
    return server


def report(epoch: int) -> Progress:
    return Progress(
        epoch=epoch,
        epoch_done=True,
        step=10 * epoch,
        num_steps=100,
        d_loss=epoch + 0.1,
        g_loss=epoch + 0.2,
        d_real=0.6,
        d_fake=0.4,
        images_per_s=1000.0,
        seconds_left=1.0,
    )


def draw_sheets(folder: Path, *epochs: int) -> None:
    for epoch in epochs:
        path = sheet_path(folder, epoch)
        path.parent.mkdir(exist_ok=True)
        Image.new("L", (8, 8), epoch).save(path)


def arrived(run_id: str) -> dict[str, list[int]]:
    """The steps that MLflow has of every curve, and of the sheets."""
    client = MlflowClient()
    steps = {
        name: [point.step for point in client.get_metric_history(run_id, name)] for name in CURVES
    }
    files = [file.path for file in client.list_artifacts(run_id, "images")]
    sheets = Counter(path.split("%step%")[-1].split("+step+")[-1][:2].strip("+%") for path in files
                     if path.endswith(".png"))  # fmt: skip
    return steps | {"sheets": sorted(int(step) for step in sheets.elements())}


EVERYTHING = {name: [1, 2, 3, 4, 5, 6] for name in CURVES} | {"sheets": [0, 1, 2, 6]}


@pytest.mark.slow
@pytest.mark.chaos
def test_epochs_of_an_outage_arrive_later_in_order_and_once(
    server: MlflowServer, tmp_path: Path
) -> None:
    draw_sheets(tmp_path, 0, 1, 2, 6)
    with disable_run_logger():
        with server.running():
            run_id = MlflowClient().create_run("0").info.run_id
            journal = Journal(run_id, tmp_path)
            journal.offer(report(1))
            journal.deliver()
        started = time.monotonic()
        for epoch in (2, 3, 4):
            journal.offer(report(epoch))
        assert time.monotonic() - started < 0.5, "a training waits for nobody"
        with pytest.raises(ServiceError, match=rf"MLflow at {server.url} stayed away for 2 s"):
            journal.deliver(patience_s=2)
        assert [waiting.epoch for waiting in journal.waiting] == [2, 3, 4]
        with server.running():
            for epoch in (5, 6):
                journal.offer(report(epoch))
            journal.deliver()
            assert arrived(run_id) == EVERYTHING
        journal.close()


@pytest.mark.slow
@pytest.mark.chaos
def test_a_process_that_died_in_an_outage_loses_nothing(
    server: MlflowServer, tmp_path: Path
) -> None:
    draw_sheets(tmp_path, 0, 1, 2, 6)
    history = [report(epoch) for epoch in range(1, 6)]
    with disable_run_logger():
        with server.running():
            run_id = MlflowClient().create_run("0").info.run_id
            with open_journal(run_id, tmp_path, history[:2]) as journal:
                journal.deliver()
            # A request that was cut in the middle: some of an epoch's numbers arrived.
            MlflowClient().log_metric(run_id, "d_loss", 3.1, step=3)
        with open_journal(run_id, tmp_path, []) as journal:
            journal.offer(report(3))
        with (
            server.running(),
            open_journal(run_id, tmp_path, history) as journal,
        ):
            journal.offer(report(6))
            journal.deliver()
            assert arrived(run_id) == EVERYTHING


@pytest.mark.slow
@pytest.mark.chaos
def test_nothing_arrives_after_the_end(server: MlflowServer, tmp_path: Path) -> None:
    history = [report(epoch) for epoch in range(1, 60)]
    with disable_run_logger(), server.running():
        run_id = MlflowClient().create_run("0").info.run_id
        with open_journal(run_id, tmp_path, history):
            pass
        at_the_end = arrived(run_id)
        time.sleep(2)
        assert arrived(run_id) == at_the_end
        with open_journal(run_id, tmp_path, history) as journal:
            journal.deliver()
        assert arrived(run_id)["d_loss"] == list(range(1, 60))


def test_a_server_that_stays_silent_is_waited_for_no_longer_than_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(services, "TIMEOUT_S", 0.2)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as silent, disable_run_logger():
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://mlflow:hunter2@{address}")
        with open_journal("none", tmp_path, [report(epoch) for epoch in range(1, 61)]) as journal:
            started = time.monotonic()
            with pytest.raises(ServiceError, match=f"^MLflow at http://{address} stayed away"):
                journal.deliver(patience_s=0.5)
            assert time.monotonic() - started < 6, "not once for each of sixty epochs"


@pytest.mark.slow
def test_s3_that_is_away_behind_mlflow_is_waited_for(
    tmp_path: Path, s3: str, s3_keys: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where MLflow's artifacts lie in a store that clients write to by themselves."""
    draw_sheets(tmp_path, 0, 1)
    with mlflow_store(tmp_path), disable_run_logger():
        experiment = mlflow.create_experiment("direct", f"s3://mirrors/{tmp_path.name}")
        run_id = MlflowClient().create_run(experiment).info.run_id
        with open_journal(run_id, tmp_path, []) as journal:
            with monkeypatch.context() as away:
                away.setenv("AWS_MAX_ATTEMPTS", "1")
                for name in ("AWS_ENDPOINT_URL_S3", "MLFLOW_S3_ENDPOINT_URL"):
                    away.setenv(name, "http://127.0.0.1:1")
                journal.offer(report(1))
                with pytest.raises(ServiceError, match=r"stayed away for 0 s: .*127\.0\.0\.1:1"):
                    journal.deliver(patience_s=0)
            monkeypatch.setenv("MLFLOW_S3_ENDPOINT_URL", s3)
            journal.deliver()
            assert arrived(run_id)["d_loss"] == [1]
            assert arrived(run_id)["sheets"] == [0, 1]


def test_nothing_to_send_asks_nobody(server: MlflowServer, tmp_path: Path) -> None:
    with disable_run_logger(), open_journal("none", tmp_path, []) as journal:
        journal.deliver(patience_s=0)
