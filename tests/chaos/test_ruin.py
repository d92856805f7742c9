"""Trainings that go wrong by themselves, and things that no command should take.

Each ends with a sentence; nothing is registered, and what was saved before is kept.
"""

import math
import resource
import shutil
import sys
from pathlib import Path

import pytest
import torch

from gan.bundle import MANIFEST
from gan.checkpoint import Checkpoints
from gan.recipes import configure
from tests.chaos.conftest import Trials
from tests.chaos.pipeline import (
    COMMAND,
    GAN,
    NUM_EPOCHS,
    Pipeline,
    Reference,
    check_result,
    find_complaint,
    kill,
)
from tests.deployments.local_stack import wait_for
from tests.long import takes_minutes

pytestmark = [pytest.mark.slow, pytest.mark.chaos, takes_minutes]

CONFIG = configure("vanilla", epochs=NUM_EPOCHS, batch_size=2000)
"""What `pipeline.PARAMETERS` ask for."""


def check_failure(pipeline: Pipeline, sentence: str) -> None:
    """See that Prefect and MLflow agree that the run failed, and that it made no version."""
    assert sentence in pipeline.complaint
    assert pipeline.statuses()[0] == "FAILED"
    assert pipeline.flow_run_states()[-1] == "FAILED"
    assert "RUNNING" not in pipeline.statuses() + pipeline.flow_run_states()
    assert pipeline.mlflow.search_model_versions() == []
    assert pipeline.wait_for_processes() == []


def wait_for_checkpoints(pipeline: Pipeline, num: int) -> None:
    wait_for(
        lambda: True if len(pipeline.checkpoints) == num else None,
        seconds=120,
        what=lambda: f"{num} checkpoints; {pipeline.output}",
    )


def kill_in_training(pipeline: Pipeline) -> Checkpoints:
    """Leave two checkpoints of a training that is not over."""
    pipeline.start()
    wait_for_checkpoints(pipeline, 2)
    kill(pipeline)
    return Checkpoints(pipeline.checkpoints[0].parent)


def alter(path: Path) -> None:
    """Change a bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_losses_are_no_numbers(pipeline: Pipeline, reference: Reference, trials: Trials) -> None:
    """Losses that are no numbers any more.

    A weight is made one, in the newest of the checkpoints. The one before leads to the end.
    """
    trials.begin()
    checkpoints = kill_in_training(pipeline)
    state = checkpoints.load(CONFIG, torch.device("cpu"))
    assert state is not None
    next(state.discriminator.parameters()).data[0] = math.nan
    good = checkpoints.find()[1]
    checkpoints.find()[0].unlink()
    ill = checkpoints.save(state)
    assert pipeline.run() == 1
    check_failure(pipeline, "the losses are no numbers any more in epoch ")
    assert checkpoints.find() == [ill, good]
    ill.unlink()
    assert pipeline.run() == 0, pipeline.output
    assert check_result(pipeline) == reference
    trials.recover()


def test_generator_collapses(pipeline: Pipeline, trials: Trials) -> None:
    """A generator that collapses: it draws one digit only."""
    trials.begin()
    options = ("--learning-rate", "0.1", "--batch-size", "20", "--epochs", "1")
    pipeline.start(*options)
    assert pipeline.wait(1200) == 1, pipeline.output  # three thousand steps, whatever the machine
    check_failure(pipeline, "the generator collapsed by epoch 1: the judge sees a ")
    assert len(pipeline.checkpoints) == 2
    trials.recover()


def test_checkpoint_is_altered(pipeline: Pipeline, reference: Reference, trials: Trials) -> None:
    """The newest checkpoint altered: the one before is taken."""
    trials.begin()
    newest = kill_in_training(pipeline).find()[0]
    alter(newest)
    assert pipeline.run() == 0, pipeline.output
    assert f"{newest.name} is torn or altered" in " ".join(pipeline.output.split())
    assert check_result(pipeline) == reference
    trials.recover()


def test_data_is_damaged(pipeline: Pipeline, reference: Reference, trials: Trials) -> None:
    """A bit of MNIST altered: the file is fetched again."""
    trials.begin()
    whole = Path(pipeline.variables["MNIST_GAN_DATA_DIR"])
    pipeline.variables |= {
        "MNIST_GAN_DATA_DIR": str(pipeline.home / "data"),
        "MNIST_GAN_DATA_MIRRORS": str(whole / "raw"),
    }
    shutil.copytree(whole / "raw", pipeline.home / "data" / "raw")
    damaged = pipeline.home / "data" / "raw" / "train-images-idx3-ubyte"
    alter(damaged)
    assert pipeline.run() == 0, pipeline.output
    assert damaged.read_bytes() == (whole / "raw" / damaged.name).read_bytes()
    assert check_result(pipeline) == reference
    trials.recover()


def test_memory_is_full(pipeline: Pipeline, trials: Trials) -> None:
    """The host's memory full in the middle of training.

    What it may use is bounded once it has a checkpoint; with all memory, it goes on.
    """
    options = ("--batch-size", "60000")
    trials.begin()
    pipeline.start(*options)
    wait_for_checkpoints(pipeline, 1)
    assert pipeline.process
    pages = int(Path(f"/proc/{pipeline.process.pid}/statm").read_text().split()[0])
    used = pages * resource.getpagesize()
    resource.prlimit(pipeline.process.pid, resource.RLIMIT_AS, (used, used))
    assert pipeline.wait() == 1
    check_failure(
        pipeline,
        "the memory of device cpu does not hold a batch of 60000; ask for a smaller batch_size",
    )
    assert len(pipeline.checkpoints) == 1
    assert pipeline.run(*options) == 0, pipeline.output
    check_result(pipeline)
    trials.recover()


TRAIN, SWEEP = COMMAND, (sys.executable, "-m", "flows.sweep_gan")
NONSENSE = [
    (TRAIN, ("--epochs", "0"), {}, "epochs: "),
    (TRAIN, ("--epochs", "many"), {}, "epochs: "),
    (TRAIN, ("--recipe", "best-ever"), {}, "recipe: "),
    (TRAIN, ("--batch-size", "60001"), {}, "batch_size: "),
    (TRAIN, ("--learning-rate", "nan"), {}, "learning_rate: "),
    (TRAIN, ("--seed", "-1"), {}, "seed: "),
    (TRAIN, ("--device", "cuda:99"), {}, "device: "),
    (TRAIN, ("--publish-to", "ftp://there"), {}, "publish_to: "),
    (TRAIN, ("--batch", "5", "--nonsense"), {}, "unrecognized arguments: "),
    (TRAIN, (), {"MNIST_GAN_CHECKPOINT_EVERY_S": "often"}, "MNIST_GAN_CHECKPOINT_EVERY_S"),
    (TRAIN, (), {"MNIST_GAN_PUBLISH_TO": "s3://"}, "MNIST_GAN_PUBLISH_TO"),
    (TRAIN, (), {"MLFLOW_TRACKING_URI": "nonsense://"}, "nonsense://"),
    (TRAIN, (), {"MLFLOW_TRACKING_URI": "sqlite:////dev/null"}, "/dev/null"),
    (TRAIN, (), {"AWS_ENDPOINT_URL_S3": "http://127.0.0.1:1"}, "http://127.0.0.1:1"),
    (TRAIN, (), {"PREFECT_API_URL": "http://127.0.0.1:1/api"}, "http://127.0.0.1:1/api"),
    (TRAIN, (), {"PREFECT_API_URL": "nonsense"}, "nonsense"),
    (TRAIN, (), {"MNIST_GAN_RUNS_DIR": "/dev/null/runs"}, "/dev/null/runs"),
    (SWEEP, ("--space", "space.yaml"), {}, "space.yaml"),
    (SWEEP, ("--space", "none.yaml"), {}, "none.yaml"),
    (GAN, ("sample", "--bundle", "bundle"), {}, "bundle"),
    (GAN, ("verify", "bundle"), {}, "bundle"),
    (GAN, ("sample", "--digit", "10"), {}, "digit"),
    (GAN, ("pull", "--version", "../../etc"), {}, "../../etc"),
    (GAN, ("pull", "--from", "https://there"), {}, "the address of a store is s3://"),
]


@pytest.mark.parametrize(("command", "words", "variables", "sentence"), NONSENSE)
def test_nonsense(
    command: tuple[str, ...],
    words: tuple[str, ...],
    variables: dict[str, str],
    sentence: str,
    pipeline: Pipeline,
    trials: Trials,
) -> None:
    """Nonsense: parameters, variables, files, bundles."""
    trials.begin()
    (pipeline.home / "space.yaml").write_text("learning_rate: [!!python/object:os.system x")
    hostile = pipeline.home / "bundle"
    hostile.mkdir()
    (hostile / MANIFEST).write_text('{"files": {"../../evil": "00"}}')
    (hostile / "generator.safetensors").write_bytes(b"\x80\x04cos\nsystem\n.")
    done = pipeline.command(*command, *words, **variables)
    assert done.returncode != 0
    assert sentence in find_complaint(done.stdout + done.stderr)
    assert not list(pipeline.home.glob("runs/*/bundle"))
    if (pipeline.home / "prefect" / "prefect.db").exists():
        assert "RUNNING" not in pipeline.flow_run_states()
    if (pipeline.home / "mlflow.db").exists():
        assert "RUNNING" not in pipeline.statuses()
    trials.recover()
