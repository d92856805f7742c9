"""Fetching registered versions from a real MLflow on SQLite."""

from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest
import torch
from mlflow import MlflowClient

from gan.bundle import bundle_digest, save_bundle
from gan.config import ConvConfig
from gan.evaluation.scores import load_floors
from gan.networks import build_generator
from tasks.promotion import Decision, PromotionError, record_decision
from tasks.registry import MODEL_NAME, TAGS_OF_THE_RUN, register_generator
from tasks.training import TrainedGenerator
from tasks.versions import VersionError, fetch_version, find_version


@pytest.fixture(scope="module")
def digests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """The digests of versions 1, the champion, and 2, the challenger."""
    folder = tmp_path_factory.mktemp("store")
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
    mlflow.create_experiment("versions", artifact_location=str(folder / "artifacts"))
    mlflow.set_experiment("versions")
    found = []
    for seed in (1, 2):
        bundle = folder / str(seed) / "bundle"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            found.append(save_bundle(build_generator(ConvConfig(width=4)), bundle))
        trained = TrainedGenerator(bundle=bundle, digest=found[-1], seconds=1.0, images_per_s=1.0)
        with mlflow.start_run(tags=dict.fromkeys(TAGS_OF_THE_RUN, "known")) as run:
            pass
        register_generator.fn(trained, load_floors(), run.info.run_id)
    yield found
    mlflow.set_tracking_uri(before)


@pytest.mark.parametrize(("name", "number"), [(1, 1), (2, 2), ("champion", 1), ("challenger", 2)])
def test_version_is_fetched_by_number_or_alias(
    digests: list[str], tmp_path: Path, name: int | str, number: int
) -> None:
    fetched = fetch_version.fn(name, tmp_path)
    assert fetched.version == number
    assert fetched.recipe == "known"
    assert fetched.bundle.is_relative_to(tmp_path)
    assert bundle_digest(fetched.bundle) == digests[number - 1]


@pytest.mark.usefixtures("digests")
@pytest.mark.parametrize("name", [3, "rival"])
def test_unknown_version_is_named_with_those_there_are(name: int | str) -> None:
    with pytest.raises(VersionError, match=rf"{name}.*; its versions: 1, 2"):
        find_version(MlflowClient(), name)


@pytest.mark.usefixtures("digests")
def test_bundle_that_was_exchanged_is_refused(tmp_path: Path) -> None:
    client = MlflowClient()
    genuine = client.get_model_version(MODEL_NAME, "2").tags["bundle"]
    client.set_model_version_tag(MODEL_NAME, "2", "bundle", "sha256:other")
    with pytest.raises(VersionError, match="version 2 is not the bundle that was registered"):
        fetch_version.fn(2, tmp_path)
    client.set_model_version_tag(MODEL_NAME, "2", "bundle", genuine)


@pytest.mark.usefixtures("digests")
def test_decision_is_recorded_and_moves_the_aliases_only_if_it_says_so() -> None:
    client = MlflowClient()

    def holder(alias: str) -> str:
        return str(client.get_model_version_by_alias(MODEL_NAME, alias).version)

    record_decision.fn(2, 1, Decision(promote=False, reason="worse"))
    assert holder("champion") == "1"
    assert client.get_model_version(MODEL_NAME, "2").tags["promotion"] == "worse"
    record_decision.fn(2, 1, Decision(promote=True, reason="better"))
    assert (holder("champion"), holder("previous")) == ("2", "1")
    assert client.get_model_version(MODEL_NAME, "2").tags["promotion"] == "better"
    with pytest.raises(PromotionError, match="version 1 is no longer champion"):
        record_decision.fn(2, 1, Decision(promote=True, reason="better"))
