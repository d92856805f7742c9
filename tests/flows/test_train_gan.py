"""The whole flow, end to end, on real MNIST with a tiny budget, against a real MLflow on SQLite."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.entities.model_registry import ModelVersion
from PIL import Image

from flows.train_gan import train_gan as flow
from gan.bundle import bundle_digest, load_bundle
from gan.sampling import draw
from tests.flows.conftest import TINY, Command

NAME = "mnist-gan-generator"


@dataclass(frozen=True)
class Finished:
    folder: Path
    output: str
    errors: str
    client: MlflowClient

    def version(self, alias: str) -> ModelVersion:
        found = self.client.get_model_version_by_alias(NAME, alias)
        return self.client.get_model_version(NAME, found.version)

    def run(self, alias: str) -> Run:
        return self.client.get_run(self.version(alias).run_id)


def test_the_readme_names_every_parameter_its_bounds_and_its_default(
    pytestconfig: pytest.Config,
) -> None:
    text = (pytestconfig.rootpath / "README.md").read_text()
    table = text.partition("| parameter | allowed | default |")[2].partition("\n\n")[0]
    rows = [[cell.strip(" `") for cell in row.split("|")[1:-1]] for row in table.splitlines()[2:]]
    properties = flow.parameters.properties
    assert [name for name, *_ in rows] == list(properties)
    for name, allowed, default in rows:
        schema = properties[name]
        kind, *_ = schema.get("anyOf", [schema])
        words = [f"{kind[limit]:,}" for limit in ("minimum", "maximum") if limit in kind]
        if "exclusiveMinimum" in kind:
            words.append(f"above {kind['exclusiveMinimum']}")
        if "exclusiveMaximum" in kind:
            words.append(f"{kind['exclusiveMaximum'] - 1:,}")
        for word in [*words, *kind.get("enum", [])]:
            assert re.search(rf"(?<![\d,.]){word}(?![\d,.]\d|\d)", allowed), (name, word)
        if schema["default"] is not None:
            said = {"off": "False"}.get(default, default.replace(",", ""))
            assert said == str(schema["default"]), name


def test_make_hands_over_every_parameter_but_the_delay(pytestconfig: pytest.Config) -> None:
    def options(**variables: str) -> list[str]:
        given = [f"{name.upper()}={value}" for name, value in variables.items()]
        command = ["make", "--dry-run", "train", *given]
        bare = {"PATH": os.environ["PATH"]}
        said = subprocess.check_output(command, cwd=pytestconfig.rootpath, env=bare, text=True)
        return shlex.split(said.partition("flows.train_gan")[2].replace("\\\n", ""))

    properties = flow.parameters.properties
    given = {name: "1" for name in properties if name not in ("resume", "max_delay_hours")}
    expected = [word for name in given for word in (f"--{name.replace('_', '-')}", "1")]
    assert options(**given, resume="1") == [*expected, "--resume", "1"]
    assert options() == []
    assert options(seed="") == ["--seed", ""]  # a fresh one, as in Prefect's form
    assert options(resume="0") == ["--resume", "0"]
    assert options(recipe="it's, (so) #1") == ["--recipe", "it's, (so) #1"]
    assert flow.validate_parameters({"resume": "0"})["resume"] is False


def test_the_table_leaves_the_users_own_stores_alone(
    tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    for name in ("Makefile", "requirements.lock", "pyproject.toml"):
        shutil.copy(pytestconfig.rootpath / name, tmp_path)
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$MLFLOW_TRACKING_URI,$MNIST_GAN_PUBLISH_TO,$2"\n')
    python.chmod(0o755)
    (tmp_path / "ready").touch()
    theirs = {"MLFLOW_TRACKING_URI": "http://theirs", "MNIST_GAN_PUBLISH_TO": "s3://theirs/models"}
    said = subprocess.check_output(
        ["make", "table", f"PY={python}", "READY=ready", "PACKAGES=requirements.lock"],
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"], **theirs},
        text=True,
    )
    store = "sqlite:///runs/table/mlflow.db"
    assert set(said.splitlines()) == {
        f"{store},,flows.{step}" for step in ("train_gan", "evaluate_generator")
    }


@pytest.fixture(scope="module")
def finished(train_gan: Command, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    folder = tmp_path_factory.mktemp("pipeline")
    done = train_gan(folder, *TINY, "--seed", "7")
    assert done.returncode == 0, done.stderr
    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    return Finished(folder, done.stdout, done.stderr, client)


@pytest.mark.slow
def test_ends_without_a_page_of_what_a_library_takes_for_leaks(finished: Finished) -> None:
    # nanobind prints one when Python, told to leave garbage alone, ends without freeing it.
    assert "leaked" not in finished.errors


@pytest.mark.slow
def test_first_version_is_champion_and_says_what_it_is(finished: Finished) -> None:
    version = finished.version("champion")
    assert str(version.version) == "1"
    tags = version.tags
    assert tags["recipe"] == "vanilla"
    assert tags["judge"] == "mnist-judge-1"
    assert tags["dataset_digest"].startswith("sha256:")
    assert tags["num_samples"] == "200"
    assert float(tags["frechet_distance"]) > 0
    assert tags["git_commit"]
    (run_folder,) = (finished.folder / "runs").glob("*-*")
    assert tags["prefect_flow_run_id"] == run_folder.name
    assert tags["bundle"] == bundle_digest(run_folder / "bundle")


@pytest.mark.slow
def test_mlflow_run_holds_parameters_curves_scores_and_pictures(finished: Finished) -> None:
    run = finished.run("champion")
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "vanilla, 2 epochs, seed 7"
    parameters = run.data.params
    assert parameters["architecture"] == "mlp"
    assert parameters["epochs"] == "2"
    assert parameters["batch_size"] == "1000"
    assert parameters["learning_rate"] == "0.0002"
    assert parameters["latent_dim"] == "100"
    for name in ("d_loss", "g_loss", "d_real", "d_fake", "images_per_s"):
        history = finished.client.get_metric_history(run.info.run_id, name)
        assert [point.step for point in history] == [1, 2]
    for name in ("frechet_distance", "kid_x1000", "precision", "recall", "density", "coverage"):
        assert name in run.data.metrics
    assert "digit_as_asked" not in run.data.metrics, "vanilla is never asked for a digit"
    artifacts = {file.path for file in finished.client.list_artifacts(run.info.run_id)}
    assert {"history.csv", "losses.png", "progress.gif", "scores.json", "images"} <= artifacts
    images = finished.client.list_artifacts(run.info.run_id, "images")
    sheets = [image.path for image in images if image.path.endswith(".png")]
    assert sorted(path.partition("+timestamp")[0] for path in sheets) == [
        "images/samples+step+0",
        "images/samples+step+1",
        "images/samples+step+2",
    ]


@pytest.mark.slow
def test_run_folder_holds_pictures_of_every_kind(finished: Finished) -> None:
    (folder,) = (finished.folder / "runs").glob("*-*")
    sheet = np.asarray(Image.open(folder / "samples" / "epoch-0002.png"))
    assert sheet.shape == (302, 302)
    assert sheet.std() > 10
    with Image.open(folder / "progress.gif") as animation:
        assert animation.n_frames == 3
    assert len(pd.read_csv(folder / "history.csv")) == 2
    assert json.loads((folder / "scores.json").read_text())["num_samples"] == 200


@pytest.mark.slow
def test_summary_names_scores_floors_pictures_version_and_the_next_step(finished: Finished) -> None:
    for words in ("frechet_distance", "progress.gif", f"{NAME} version 1", "@champion", "make ui"):
        assert words in finished.output


@pytest.mark.slow
def test_fresh_process_pulls_the_champion_and_draws_the_same(finished: Finished) -> None:
    script = (
        "import mlflow, pandas as pd, numpy as np;"
        f"model = mlflow.pyfunc.load_model('models:/{NAME}@champion');"
        "images = model.predict(pd.DataFrame({'digit': [-1]}), params={'num': 16, 'seed': 1});"
        "np.save('drawn.npy', images)"
    )
    subprocess.run(
        [sys.executable, "-c", script],
        cwd=finished.folder,
        check=True,
        env={"MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false", "PATH": ""},
        timeout=120,
    )
    (folder,) = (finished.folder / "runs").glob("*-*")
    expected = draw(load_bundle(folder / "bundle"), [-1], num=16, seed=1)
    np.testing.assert_array_equal(np.load(finished.folder / "drawn.npy"), expected)


@pytest.mark.slow
def test_second_run_is_challenger_and_fetches_nothing(
    train_gan: Command, finished: Finished
) -> None:
    # A mirror that does not exist would be named in the log if anything were downloaded.
    given = (*TINY, "--seed", "", "--promote", "never")
    done = train_gan(finished.folder, *given, MNIST_GAN_DATA_MIRRORS="/nowhere")
    assert done.returncode == 0, done.stderr
    assert "/nowhere" not in done.stderr
    assert str(finished.version("challenger").version) == "2"
    assert str(finished.version("champion").version) == "1"
    assert finished.run("challenger").data.params["seed"] != "7"
