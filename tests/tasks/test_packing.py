"""Packing what an untrained generator left, with a real MLflow on SQLite."""

import io
from dataclasses import replace
from pathlib import Path

import mlflow
import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image

from gan.bundle import CARD, ONNX, SAMPLES, bundle_digest, load_bundle, read_bundle, save_bundle
from gan.config import ConvConfig, MlpConfig, TrainConfig
from gan.errors import UserError
from gan.evaluation.scores import load_floors
from gan.networks import build_generator
from gan.recipes import quick, vanilla
from gan.sampling import draw_sheet
from tasks.packing import pack_generator
from tasks.training import SHEET_SEED, TrainedGenerator

CONDITIONAL = replace(quick(), networks=ConvConfig(width=4))
UNCONDITIONAL = replace(vanilla(), networks=MlpConfig(latent_dim=8))


@pytest.fixture
def run_id(registry: object) -> str:
    """An MLflow run with the tags that a training sets."""
    mlflow.set_experiment("versions")
    computed_by = {"processor": "Abacus (beads)", "devices": "2", "threads": "3", "torch": "1.0"}
    tags = {"dataset_digest": "sha256:0123", "git_commit": "c0ffee", **computed_by}
    with mlflow.start_run(tags=tags) as run:
        return str(run.info.run_id)


def train(config: TrainConfig, folder: Path) -> TrainedGenerator:
    """The bare bundle of a training, which this is not."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        digest = save_bundle(build_generator(config.networks), folder / "bundle")
    return TrainedGenerator(bundle=folder / "bundle", digest=digest, seconds=1.0, images_per_s=9.0)


@pytest.mark.parametrize("config", [CONDITIONAL, UNCONDITIONAL], ids=["conv", "mlp"])
def test_the_bundle_is_completed_and_draws_as_before(
    config: TrainConfig, run_id: str, tmp_path: Path
) -> None:
    trained = train(config, tmp_path)
    bare = read_bundle(trained.bundle)
    packed = pack_generator.fn(trained, config, load_floors(), run_id)
    assert packed == replace(trained, digest=bundle_digest(trained.bundle)) != trained

    files = read_bundle(trained.bundle)
    assert files.keys() == bare.keys() | {CARD, SAMPLES, ONNX}
    assert all(files[name] == payload for name, payload in bare.items() if name != "manifest.json")

    generator = load_bundle(packed.bundle)
    sheet = np.asarray(Image.open(io.BytesIO(files[SAMPLES])))
    np.testing.assert_array_equal(sheet, draw_sheet(generator, seed=SHEET_SEED).numpy())

    noise, digits = torch.randn(3, config.networks.latent_dim), torch.arange(3)
    feed = {"latent": noise.numpy(), "digit": digits.numpy()}
    session = onnxruntime.InferenceSession(files[ONNX])
    (drawn,) = session.run(None, {put.name: feed[put.name] for put in session.get_inputs()})
    torch.testing.assert_close(torch.from_numpy(drawn), generator(noise, digits), atol=1e-4, rtol=0)

    card = files[CARD].decode()
    assert f"recipe `{config.recipe}`" in card
    assert "sha256:0123" in card
    assert "c0ffee" in card
    assert "| processor | `Abacus (beads)` |" in card


def test_packing_again_gives_the_same_bytes(run_id: str, tmp_path: Path) -> None:
    first = pack_generator.fn(train(CONDITIONAL, tmp_path), CONDITIONAL, load_floors(), run_id)
    files = read_bundle(first.bundle)
    assert pack_generator.fn(first, CONDITIONAL, load_floors(), run_id) == first
    assert read_bundle(first.bundle) == files

    bare = train(CONDITIONAL, tmp_path / "elsewhere")
    elsewhere = pack_generator.fn(bare, CONDITIONAL, load_floors(), run_id)
    assert elsewhere.digest == first.digest
    assert read_bundle(elsewhere.bundle) == files


def test_a_damaged_bundle_is_not_packed(run_id: str, tmp_path: Path) -> None:
    trained = train(CONDITIONAL, tmp_path)
    (trained.bundle / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"config.json was altered"):
        pack_generator.fn(trained, CONDITIONAL, load_floors(), run_id)
    assert not (trained.bundle / CARD).exists()
