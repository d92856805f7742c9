"""A version that is scored again, as a user does it, on a registry on SQLite."""

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


@pytest.mark.slow
def test_one_that_is_asked_to_end_is_over_in_both_systems(
    environment: dict[str, str], tmp_path: Path
) -> None:
    register_two(tmp_path)
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "flows.evaluate_generator"],
            cwd=tmp_path,
            env=environment,
            stdout=log,
            stderr=log,
        )
        try:
            deadline = time.monotonic() + PATIENCE_S
            while not scored_again(tmp_path):
                assert time.monotonic() < deadline, (tmp_path / "log").read_text()
                time.sleep(0.5)
            time.sleep(2)  # in the middle of the first draw
            process.terminate()
            assert process.wait(PATIENCE_S) != 0
        finally:
            process.kill()
            process.wait()
    said = (tmp_path / "log").read_text()
    assert "Finished in state Cancelled" in said
    assert "Traceback" not in said
    (run,) = scored_again(tmp_path)
    assert run.info.status == "KILLED"
    assert run.data.tags["model_version"] == "1"
    assert run.data.tags["run_folder"]
