"""The whole promotion: generators of a known order, judged and promoted as a user has it done."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch
from mlflow import MlflowClient

from flows.command_line import PATIENCE_S
from gan import quick
from gan.bundle import save_bundle
from gan.config import ConvConfig
from gan.data import Split, load_mnist
from gan.evaluation.scores import load_floors
from gan.networks import Generator
from gan.training import TrainState, train
from tasks.registry import TAGS_OF_THE_RUN, register_generator
from tasks.training import TrainedGenerator
from tests.mlflow_store import mlflow_store
from tests.prefect_home import prefect_home

NAME = "mnist-gan-generator"
PROMOTE = """
import json, sys
from dataclasses import asdict
from prefect.artifacts import Artifact
from flows.promote_generator import promote_generator
for version in sys.argv[1:]:
    decision = promote_generator(version=int(version), num_samples=300)
    page = Artifact.get("promotion").data
    print("decided", json.dumps([asdict(decision), page]))
"""


def train_for_seconds(mnist_dir: Path) -> tuple[Generator, Generator]:
    """A generator before its training and after 200 steps of it."""
    config = replace(
        quick(), networks=ConvConfig(width=4), epochs=1, r1_gamma=0.0, ema_halflife_images=0.0
    )
    data = load_mnist(mnist_dir).train
    part = Split(images=data.images[: 200 * 64], labels=data.labels[: 200 * 64])
    state = TrainState(config, torch.device("cpu"))
    before = copy.deepcopy(state.generator)
    for _ in train(state, part):
        pass
    return before, state.sampler


def mirrored(generator: Generator) -> Generator:
    """Draws other images of the very same distribution: that of its noise is symmetric."""
    twin = copy.deepcopy(generator)
    with torch.no_grad():
        twin.project.weight[:, : twin.config.latent_dim] *= -1
    return twin


@pytest.fixture(scope="module")
def folder(mnist_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A registry of versions 1, untrained and champion, 2, trained, and 3, its equal."""
    folder = tmp_path_factory.mktemp("promotion")
    with mlflow_store(folder, "promotion"):
        untrained, trained = train_for_seconds(mnist_dir)
        for number, generator in enumerate((untrained, trained, mirrored(trained))):
            bundle = folder / "bundles" / str(number) / "bundle"
            digest = save_bundle(generator, bundle)
            with mlflow.start_run(tags=dict.fromkeys(TAGS_OF_THE_RUN, "known")) as run:
                mlflow.log_param("seed", 0)
            result = TrainedGenerator(bundle=bundle, digest=digest, seconds=1.0, images_per_s=1.0)
            register_generator.fn(result, load_floors(), run.info.run_id)
        yield folder


@pytest.mark.slow
def test_better_one_is_promoted_and_an_equal_and_a_worse_one_are_not(
    folder: Path, mnist_dir: Path, pytestconfig: pytest.Config
) -> None:
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PREFECT_", "MLFLOW_", "MNIST_GAN_"))
    }
    done = subprocess.run(
        [sys.executable, "-c", PROMOTE, "2", "3", "1", "2"],
        check=False,
        cwd=folder,
        env=kept
        | {
            "PYTHONPATH": str(pytestconfig.rootpath),
            "MNIST_GAN_DATA_DIR": str(mnist_dir.parent),
            "PREFECT_HOME": prefect_home(folder / ".prefect"),
            "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": str(PATIENCE_S),
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("decided ")]
    decisions: list[tuple[dict[str, Any], str]] = [
        json.loads(line.removeprefix("decided ")) for line in lines
    ]
    found = [(each["version"], each["champion"], each["promoted"]) for each, _ in decisions]
    assert found == [(2, 1, True), (3, 2, False), (1, 2, False), (2, 2, False)]
    better, equal, worse, same = (each for each, _ in decisions)
    difference = "frechet_difference"
    assert better["comparison"][difference]["high"] < 0 < worse["comparison"][difference]["low"]
    assert equal["comparison"][difference]["low"] < 0 < equal["comparison"][difference]["high"]
    assert same["comparison"] is None

    for decision, page in decisions:
        outcome = "promoted" if decision["promoted"] else "not promoted"
        assert f"{outcome}: {decision['reason']}" in page
        assert f"version {decision['version']}: {outcome}: {decision['reason']}" in done.stderr
    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    held = client.get_registered_model(NAME).aliases
    assert (int(held["champion"]), int(held["previous"])) == (2, 1)
    for version, outcome in ((1, "not promoted"), (2, "promoted"), (3, "not promoted")):
        tags = client.get_model_version(NAME, str(version)).tags
        assert tags["promotion"] == outcome
        assert tags["promotion_num_samples"] == "300"
