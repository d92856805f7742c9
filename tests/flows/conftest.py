import os
import signal
import subprocess
import sys
import time
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


def end_in_the_middle(
    command: tuple[str, ...],
    environment: dict[str, str],
    folder: Path,
    signum: signal.Signals,
    begun: Callable[[], object],
) -> str:
    """Start a flow in a folder and send its whole group a signal once it has begun, as a terminal
    sends Ctrl-C and `timeout` SIGTERM; gives what it said."""
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", *command],
            cwd=folder,
            env=environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            deadline = time.monotonic() + 120
            while not begun():
                assert time.monotonic() < deadline, (folder / "log").read_text()
                time.sleep(0.2)
            time.sleep(1)
            os.killpg(process.pid, signum)
            assert process.wait(60) != 0
        finally:
            process.kill()
            process.wait()
    return (folder / "log").read_text()
