"""The registry with a real MLflow on SQLite and untrained generators."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
from mlflow.exceptions import MlflowException

from gan.bundle import load_bundle, save_bundle
from gan.config import ConvConfig, MlpConfig
from gan.evaluation.scores import Scores, load_floors
from gan.networks import build_generator
from gan.sampling import draw
from tasks.registry import MODEL_NAME, TAGS_OF_THE_RUN, register_generator
from tasks.training import TrainedGenerator


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An empty MLflow store, set as the tracking URI."""
    folder = tmp_path_factory.mktemp("store")
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
    mlflow.create_experiment("registry", artifact_location=str(folder / "artifacts"))
    mlflow.set_experiment("registry")
    yield folder
    mlflow.set_tracking_uri(before)


def register(folder: Path, config: MlpConfig | ConvConfig, run_id: str | None = None) -> str:
    """Register an untrained generator, as part of a new run if none is given; the run's id."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(len(list(folder.iterdir())))
        generator = build_generator(config)
    digest = save_bundle(generator, folder / "bundle")
    if run_id is None:
        with mlflow.start_run(tags=dict.fromkeys(TAGS_OF_THE_RUN, "known")) as run:
            run_id = run.info.run_id
    trained = TrainedGenerator(
        bundle=folder / "bundle", digest=digest, seconds=1.0, images_per_s=1.0
    )
    register_generator.fn(trained, load_floors(), run_id)
    return run_id


@pytest.fixture(scope="module")
def conditional(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the bundle that is version 1, the champion."""
    folder = tmp_path_factory.mktemp("conditional")
    register(folder, ConvConfig(width=4))
    return folder / "bundle"


@pytest.fixture(scope="module")
def model(conditional: Path) -> mlflow.pyfunc.PyFuncModel:
    return mlflow.pyfunc.load_model(f"models:/{MODEL_NAME}@champion")


def digits(*wishes: int) -> pd.DataFrame:
    return pd.DataFrame({"digit": wishes})


def test_model_draws_what_the_bundle_draws(
    model: mlflow.pyfunc.PyFuncModel, conditional: Path
) -> None:
    images = model.predict(digits(8), params={"num": 16, "seed": 1})
    assert images.dtype == np.uint8
    assert images.shape == (16, 28, 28)
    np.testing.assert_array_equal(images, draw(load_bundle(conditional), [8], num=16, seed=1))
    np.testing.assert_array_equal(images, model.predict(digits(8), params={"num": 16, "seed": 1}))


def test_rows_give_num_images_each_in_order(
    model: mlflow.pyfunc.PyFuncModel, conditional: Path
) -> None:
    images = model.predict(digits(3, -1, 5), params={"num": 2, "seed": 4})
    np.testing.assert_array_equal(images, draw(load_bundle(conditional), [3, -1, 5], num=2, seed=4))


def test_num_and_seed_have_defaults(model: mlflow.pyfunc.PyFuncModel) -> None:
    np.testing.assert_array_equal(
        model.predict(digits(3)), model.predict(digits(3), params={"num": 1, "seed": 0})
    )


@pytest.mark.parametrize(
    ("wish", "params", "sentence"),
    [
        (10, {}, "a digit must be 0 to 9, or -1 for any"),
        (-2, {}, "a digit must be 0 to 9, or -1 for any"),
        (1, {"num": 0}, "num must be at least 1"),
        (1, {"seed": -1}, "seed must be 0 to"),
        (1, {"num": 10_001}, "at most 10000 images"),
    ],
)
def test_wishes_out_of_range_are_refused(
    model: mlflow.pyfunc.PyFuncModel, wish: int, params: dict[str, int], sentence: str
) -> None:
    with pytest.raises(MlflowException, match=sentence) as refused:
        model.predict(digits(wish), params=params)
    assert refused.value.get_http_status_code() == 400


def test_fresh_process_elsewhere_needs_no_pickle_and_no_checkout(
    model: mlflow.pyfunc.PyFuncModel, store: Path, tmp_path: Path
) -> None:
    script = (
        "import mlflow, numpy, pandas, sys;"
        "assert not any(m in sys.modules for m in ('gan', 'tasks', 'flows'));"
        f"m = mlflow.pyfunc.load_model('models:/{MODEL_NAME}@champion');"
        "drawn = m.predict(pandas.DataFrame({'digit': [8]}), params={'num': 16, 'seed': 1});"
        "numpy.save('drawn.npy', drawn);"
        "print(sys.modules['gan'].__file__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={
            "PATH": "",
            "MLFLOW_TRACKING_URI": f"sqlite:///{store}/mlflow.db",
            "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
        },
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert "artifacts" in done.stdout, "the code that came with the model was used"
    np.testing.assert_array_equal(
        np.load(tmp_path / "drawn.npy"), model.predict(digits(8), params={"num": 16, "seed": 1})
    )
    stored = [path.suffix for path in (store / "artifacts").rglob("*") if path.is_file()]
    assert not {".pkl", ".pickle", ".pt", ".pth", ".bin"} & set(stored)


def test_registering_again_for_the_same_run_changes_nothing(
    conditional: Path, tmp_path: Path
) -> None:
    client = mlflow.MlflowClient()
    run_id = register(tmp_path, ConvConfig(width=4))
    before = [v.version for v in client.search_model_versions(f"name = '{MODEL_NAME}'")]
    register(tmp_path, ConvConfig(width=4), run_id)
    assert [v.version for v in client.search_model_versions(f"name = '{MODEL_NAME}'")] == before


def test_champion_registered_again_stays_champion_alone(conditional: Path, tmp_path: Path) -> None:
    client = mlflow.MlflowClient()
    before = client.get_registered_model(MODEL_NAME).aliases
    champion = client.get_model_version_by_alias(MODEL_NAME, "champion")
    register(tmp_path, ConvConfig(width=4), champion.run_id)
    assert client.get_registered_model(MODEL_NAME).aliases == before


def test_first_version_is_champion_later_ones_challenger(conditional: Path, tmp_path: Path) -> None:
    register(tmp_path, MlpConfig())
    client = mlflow.MlflowClient()
    versions = sorted(
        int(v.version) for v in client.search_model_versions(f"name = '{MODEL_NAME}'")
    )
    aliases = client.get_registered_model(MODEL_NAME).aliases
    assert int(aliases["champion"]) == versions[0]
    assert int(aliases["challenger"]) == versions[-1] > versions[0]


def test_unconditional_generator_takes_any_digit_alone(conditional: Path, tmp_path: Path) -> None:
    register(tmp_path, MlpConfig())
    challenger = mlflow.pyfunc.load_model(f"models:/{MODEL_NAME}@challenger")
    assert challenger.predict(digits(-1), params={"num": 3}).shape == (3, 28, 28)
    with pytest.raises(MlflowException, match=r"takes the digit -1 \(any\) alone"):
        challenger.predict(digits(8))


def test_tags_say_scores_and_where_it_comes_from(conditional: Path) -> None:
    version = mlflow.MlflowClient().get_model_version(MODEL_NAME, "1")
    scores: Scores = load_floors()
    assert version.tags["judge"] == "known"
    assert float(version.tags["frechet_distance"]) == pytest.approx(
        scores.frechet_distance, abs=1e-4
    )
    assert len(version.tags["bundle"]) == 64
