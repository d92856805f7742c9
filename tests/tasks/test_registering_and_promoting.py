"""Two trainings that end at the same moment, twenty times over: each registers and is promoted."""

from __future__ import annotations

import multiprocessing
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier
from pathlib import Path

import mlflow
import pytest
from mlflow import MlflowClient

from gan.evaluation.scores import load_floors
from tasks.aliases import find_holders
from tasks.promotion import settle
from tasks.pulling import pull
from tasks.registry import TAGS_OF_THE_RUN, register_generator
from tasks.tracking import MODEL_NAME
from tasks.training import TrainedGenerator
from tests.registry import Registry
from tests.tasks.conftest import together

ROUNDS = 20


def end_trainings(
    bundle: Path, digest: str, scratch: Path, start: Barrier, done: Queue[int]
) -> None:
    """What each process does: the end of a training, over and over."""
    mlflow.set_experiment("versions")
    trained = TrainedGenerator(bundle=bundle, digest=digest, seconds=1.0, images_per_s=1.0)
    for _ in range(ROUNDS):
        with mlflow.start_run(tags=dict.fromkeys(TAGS_OF_THE_RUN, "known")) as run:
            mlflow.log_param("seed", 0)
        start.wait(60)
        version = register_generator.fn(trained, load_floors(), run.info.run_id).version
        assert settle(version, "always", lambda *_: pytest.fail("compared"), scratch).promoted
        done.put(version)


@pytest.mark.slow
def test_each_has_a_version_of_its_own_and_the_later_is_champion(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MNIST_GAN_RUNS_DIR", str(tmp_path / "runs"))
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    (tmp_path / "runs").mkdir()
    spawn = multiprocessing.get_context("spawn")
    start, done = spawn.Barrier(3), spawn.Queue()
    processes = [
        spawn.Process(
            target=end_trainings,
            args=(
                registry.bundle(which),
                registry.digests[which - 1],
                tmp_path / str(which),
                start,
                done,
            ),
        )
        for which in (1, 2)
    ]
    with together(processes):
        client, champion = MlflowClient(), 1
        for round_ in range(1, ROUNDS + 1):
            start.wait(60)
            both = {done.get(timeout=60), done.get(timeout=60)}
            found = client.search_model_versions(f"name = '{MODEL_NAME}'")
            assert len(both) == 2
            assert len(found) == len({version.run_id for version in found}) == 2 + 2 * round_
            held = find_holders(client)
            assert {held["champion"], held["previous"]} == both, "both won, one after the other"
            assert champion not in both
            champion = held["champion"]
    assert pull("champion", tmp_path / "pulled").version == champion
