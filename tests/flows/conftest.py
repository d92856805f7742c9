import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

TINY = ("--recipe", "vanilla", "--epochs", "2", "--batch-size", "1000", "--num-samples", "200")

Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def environment(
    mnist_dir: Path, tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config
) -> dict[str, str]:
    """That of a user with nothing running."""
    home = tmp_path_factory.mktemp("home")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "MLFLOW_"))}
    return kept | {
        "HOME": str(home),
        "PYTHONPATH": str(pytestconfig.rootpath),
        "MNIST_GAN_DATA_DIR": str(mnist_dir.parent),
        "PREFECT_HOME": str(home / ".prefect"),
    }


@pytest.fixture(scope="session")
def train_gan(environment: dict[str, str]) -> Command:
    """Runs `python -m flows.train_gan` in an empty folder."""

    def run(folder: Path, *options: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "flows.train_gan", *options],
            check=False,
            cwd=folder,
            env=environment | variables,
            capture_output=True,
            text=True,
            timeout=300,
        )

    return run
