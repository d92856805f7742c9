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

from tests.registry import register_two

PATIENCE_S = 120


def scored_again(folder: Path) -> list[Run]:
    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    experiment = client.get_experiment_by_name("mnist-gan")
    return client.search_runs([experiment.experiment_id]) if experiment else []


def end_in_the_middle(environment: dict[str, str], folder: Path, signum: signal.Signals) -> str:
    """Score the champion, and send a signal in the middle of it; gives what was said."""
    register_two(folder)
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "flows.evaluate_generator"],
            cwd=folder,
            env=environment,
            stdout=log,
            stderr=log,
        )
        try:
            deadline = time.monotonic() + PATIENCE_S
            while not scored_again(folder):
                assert time.monotonic() < deadline, (folder / "log").read_text()
                time.sleep(0.5)
            time.sleep(2)
            process.send_signal(signum)
            assert process.wait(PATIENCE_S) != 0
        finally:
            process.kill()
            process.wait()
    return (folder / "log").read_text()


@pytest.mark.slow
def test_one_that_is_asked_to_end_is_over_in_both_systems(
    environment: dict[str, str], tmp_path: Path
) -> None:
    said = end_in_the_middle(environment, tmp_path, signal.SIGTERM)
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
    end_in_the_middle(environment, tmp_path, signal.SIGKILL)
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
