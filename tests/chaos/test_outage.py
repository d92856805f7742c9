"""Servers and disks that go away in the middle of a run, and come back."""

import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.chaos.conftest import Trials
from tests.chaos.pipeline import Pipeline, Reference, check_result
from tests.long import takes_minutes
from tests.mlflow_server import MlflowServer

pytestmark = [pytest.mark.slow, pytest.mark.chaos]


@pytest.fixture
def server(pipeline: Pipeline) -> MlflowServer:
    """An MLflow server, not running yet, that the pipeline logs to."""
    server = MlflowServer(pipeline.home)
    pipeline.variables["MLFLOW_TRACKING_URI"] = server.url
    return server


def take_away_in_training(pipeline: Pipeline, server: MlflowServer) -> None:
    with server.running():
        pipeline.start()
        assert pipeline.wait_for_step("train")
        time.sleep(3)


@takes_minutes
def test_mlflow_away_and_back(
    pipeline: Pipeline, server: MlflowServer, reference: Reference, trials: Trials
) -> None:
    """MLflow away in the middle of training, and back.

    Nobody has to do anything.
    """
    trials.begin()
    take_away_in_training(pipeline, server)
    time.sleep(4)
    with server.running():
        assert pipeline.wait() == 0, pipeline.output
        assert check_result(pipeline) == reference
    trials.recover()


@takes_minutes
def test_mlflow_gone(
    pipeline: Pipeline, server: MlflowServer, reference: Reference, trials: Trials
) -> None:
    """MLflow gone for good, another day back.

    The training is kept, and the same command with --resume hands it in.
    """
    trials.begin()
    take_away_in_training(pipeline, server)
    assert pipeline.wait() == 1
    assert server.url in pipeline.complaint
    assert "--resume" in pipeline.complaint
    assert len(list(pipeline.home.glob("runs/*/bundle/generator.safetensors"))) == 1
    with server.running():
        assert pipeline.run() == 0, pipeline.output
        assert check_result(pipeline) == reference
    trials.recover()


@takes_minutes
def test_mlflow_gone_between_registering_and_publishing(
    pipeline: Pipeline, server: MlflowServer, reference: Reference, trials: Trials
) -> None:
    """MLflow gone between registering and publishing.

    The version stays what it is; the same command with --resume publishes it.
    """
    trials.begin()
    with server.running():
        pipeline.start()
        assert pipeline.wait_for_step("promote")
    assert pipeline.wait() == 1
    assert "Traceback" not in pipeline.output
    with server.running():
        assert pipeline.run() == 0, pipeline.output
        assert check_result(pipeline) == reference
    trials.recover()


@pytest.fixture
def small_disk(pipeline: Pipeline) -> Iterator[Path]:
    """A file system of 60 MB for the run folders: one checkpoint fits, two do not."""
    folder = pipeline.home / "runs"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=60m", "tmpfs", str(folder)]
    if os.getuid() != 0 or subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    with ExitStack() as stack:
        stack.callback(subprocess.run, ["umount", "--lazy", str(folder)], check=True)
        yield folder


@takes_minutes
def test_disk_full(
    pipeline: Pipeline, small_disk: Path, reference: Reference, trials: Trials
) -> None:
    """Disk full while a checkpoint is written.

    The one before is kept; with more room the run goes on.
    """
    trials.begin()
    assert pipeline.run() == 1
    assert "cannot write a checkpoint to runs/" in pipeline.complaint
    assert pipeline.complaint.endswith("the disk is full")
    assert pipeline.statuses() == ["FAILED"]
    assert len(pipeline.checkpoints) == 1
    subprocess.run(["mount", "-o", "remount,size=500m", str(small_disk)], check=True)
    assert pipeline.run() == 0, pipeline.output
    assert check_result(pipeline) == reference
    trials.recover()


@takes_minutes
def test_read_only_disk(pipeline: Pipeline, small_disk: Path, trials: Trials) -> None:
    """Read-only folder for the runs.

    It is named before anything is trained.
    """
    trials.begin()
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert pipeline.run() == 1
    assert "runs" in pipeline.complaint
    assert "Read-only file system" in pipeline.complaint
    trials.recover()
