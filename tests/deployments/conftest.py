"""The real stack, once for all tests that only use it, and a training on it."""

import os
import time
from collections.abc import Iterator
from pathlib import Path
from uuid import UUID

import pytest
from prefect.client.schemas.objects import FlowRun

from tests.deployments.local_stack import LocalStack, wait_for
from tests.prefect_home import prefect_home

TINY = {"recipe": "vanilla", "epochs": 1, "batch_size": 1000, "num_samples": 200, "seed": 7}
FOR_SHOW = {"recipe": "quick", "seed": 7}


@pytest.fixture
def new_stack(tmp_path: Path) -> Iterator[LocalStack]:
    """A stack that the test starts; nothing of it is left after the test."""
    stack = LocalStack(tmp_path)
    yield stack
    if stack.process is not None and stack.process.poll() is None:
        stack.process.kill()
        stack.process.wait()
    stack.wait_until_gone()


@pytest.fixture(scope="session")
def stack(mnist_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalStack]:
    """One stack for all tests that only use it."""
    home = tmp_path_factory.mktemp("home")
    stack = LocalStack(
        home,
        MNIST_GAN_DATA_DIR=str(mnist_dir.parent),
        MNIST_GAN_RUNS_DIR=str(home / "runs"),
        # Threads that wait for each other lose more than a second core gains while servers run.
        OMP_NUM_THREADS="1",
        # A schedule that is added to a deployment waits for this loop; the usual 60 s are too long.
        PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS="5",
    )
    prefect_home(stack.folder / "prefect")
    try:
        yield stack.start().wait_until_ready()
    finally:
        if stack.process is not None and stack.process.poll() is None:
            stack.end()
        stack.wait_until_gone()


@pytest.fixture(scope="session")
def screenshots() -> Path | None:
    """The folder that the README's screenshots are wanted in, if they are."""
    folder = os.environ.get("SCREENSHOTS")
    return Path(folder) if folder else None


@pytest.fixture(scope="session")
def trained(stack: LocalStack, screenshots: Path | None) -> FlowRun:
    """A training asked for as a user does it, while somebody else has the GPU at first."""
    slot = stack.prefect.increment_concurrency_slots_with_lease(
        ["gpu"], slots=1, mode="concurrency", lease_duration=300
    )
    run = stack.run_deployment("train-gan/default", FOR_SHOW if screenshots else TINY)
    begun = wait_for(
        lambda: stack.tasks_of(run) if "download MNIST" in stack.tasks_of(run) else None,
        seconds=90,
        what="the run's start",
    )
    time.sleep(3)
    assert "train" not in begun | stack.tasks_of(run)
    stack.prefect.release_concurrency_slots_with_lease(UUID(slot.json()["lease_id"]))
    stack.final_state(run, seconds=3600 if screenshots else 150)
    assert "train" in stack.tasks_of(run), stack.output
    return stack.prefect.read_flow_run(run)
