"""What is to be taken to a GPU machine needs torch and torchvision, and nothing of the pipeline."""

import subprocess
import sys

import pytest

from tests.test_walls import loaded_by

LIST_MODULES = """
import sys
import benchmarks.speed, benchmarks.memory, benchmarks.growth
print(*sys.modules)
"""


def test_loops_are_measured_without_the_pipeline_and_its_libraries(
    pytestconfig: pytest.Config,
) -> None:
    loaded = loaded_by(LIST_MODULES, pytestconfig.rootpath)
    assert "benchmarks.textbook" in loaded
    pipeline = {"prefect", "mlflow", "boto3", "pandas", "psutil", "matplotlib", "torchmetrics"}
    assert not loaded & (pipeline | {"tasks", "flows"})


@pytest.mark.parametrize("name", ["speed", "memory", "growth", "evaluation", "textbook"])
def test_without_the_data_there_is_one_sentence(name: str, pytestconfig: pytest.Config) -> None:
    out = ["--out", "nowhere"] if name == "textbook" else []
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{name}", "--data", "nowhere", *out],
        cwd=pytestconfig.rootpath,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("error: cannot read nowhere/")
    assert done.stderr.count("\n") == 1
