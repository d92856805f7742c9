"""A version that is scored again, as a user does it, on a registry on SQLite."""

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from tests.flows.conftest import end_in_the_middle
from tests.registry import register_two


def scored_again(folder: Path) -> list[Run]:
    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    experiment = client.get_experiment_by_name("mnist-gan")
    return client.search_runs([experiment.experiment_id]) if experiment else []


def end_scoring(environment: dict[str, str], folder: Path, signum: signal.Signals) -> str:
    """Score the champion, and send a signal in the middle of it; gives what was said."""
    register_two(folder)
    flow = ("flows.evaluate_generator",)
    return end_in_the_middle(flow, environment, folder, signum, lambda: scored_again(folder))


@pytest.mark.slow
def test_one_that_is_asked_to_end_is_over_in_both_systems(
    environment: dict[str, str], tmp_path: Path
) -> None:
    said = end_scoring(environment, tmp_path, signal.SIGTERM)
    assert "Finished in state Cancelled" in said
    assert "Traceback" not in said
    (run,) = scored_again(tmp_path)
    assert run.info.status == "KILLED"
    assert run.data.tags["model_version"] == "1"
    assert run.data.tags["run_folder"]


@pytest.mark.slow
def test_one_that_is_killed_does_not_stay_open_though_prefect_forgot_it(
    environment: dict[str, str], tmp_path: Path
) -> None:
    end_scoring(environment, tmp_path, signal.SIGKILL)
    (run,) = scored_again(tmp_path)
    assert run.info.status == "RUNNING"
    time.sleep(2)  # until the temporary server is gone, too
    shutil.rmtree(environment["PREFECT_HOME"])
    subprocess.run(
        [sys.executable, "-m", "flows.reconcile_runs"], cwd=tmp_path, env=environment, check=True
    )
    (run,) = scored_again(tmp_path)
    assert run.info.status == "FAILED"
    assert not (tmp_path / "runs" / run.data.tags["run_folder"] / ".tmp").exists()
