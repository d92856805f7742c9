"""The registry with a real MLflow on SQLite and untrained generators."""

import base64
import io
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import mlflow
import numpy as np
import numpy.typing as npt
import pandas as pd
import psutil
import pytest
import torch
from mlflow.exceptions import MlflowException
from PIL import Image

from gan.bundle import WEIGHTS, bundle_digest, load_bundle, save_bundle
from gan.config import ConvConfig, MlpConfig
from gan.evaluation.scores import Scores, load_floors
from gan.networks import build_generator
from gan.sampling import draw
from tasks.registry import TAGS_OF_THE_RUN, RegistryError, _verify_files, register_generator
from tasks.services import ServiceError
from tasks.tracking import MODEL_NAME
from tasks.training import TrainedGenerator
from tests.mlflow_store import mlflow_store


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An empty MLflow store, set as the tracking URI."""
    folder = tmp_path_factory.mktemp("store")
    with mlflow_store(folder, "registry"):
        yield folder


def trained_in(folder: Path, config: MlpConfig | ConvConfig) -> TrainedGenerator:
    """An untrained generator, as training leaves it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(len(list(folder.iterdir())))
        digest = save_bundle(build_generator(config), folder / "bundle")
    return TrainedGenerator(bundle=folder / "bundle", digest=digest, seconds=1.0, images_per_s=1.0)


def start_run() -> str:
    """A run with what training notes down; its id."""
    with mlflow.start_run(tags=dict.fromkeys(TAGS_OF_THE_RUN, "known")) as run:
        mlflow.log_param("seed", 7)
    return str(run.info.run_id)


def numbers(run_id: str | None = None) -> list[int]:
    """The numbers of all versions, or of a run's."""
    query = f"name = '{MODEL_NAME}'" + (f" and run_id = '{run_id}'" if run_id else "")
    return sorted(int(v.version) for v in mlflow.MlflowClient().search_model_versions(query))


def register(folder: Path, config: MlpConfig | ConvConfig, run_id: str | None = None) -> str:
    """Register an untrained generator, as part of a new run if none is given; the run's id."""
    run_id = run_id or start_run()
    register_generator.fn(trained_in(folder, config), load_floors(), run_id)
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


@pytest.mark.parametrize("given", [None, {}, {"num": None, "seed": None, "format": None}])
def test_num_seed_and_format_have_defaults(
    model: mlflow.pyfunc.PyFuncModel, given: dict[str, Any] | None
) -> None:
    full = {"num": 1, "seed": 0, "format": "array"}
    np.testing.assert_array_equal(
        model.predict(digits(3), params=given), model.predict(digits(3), params=full)
    )


def read_pngs(encoded: list[str]) -> npt.NDArray[np.uint8]:
    """The images in base64 PNGs, uint8 [n, 28, 28]."""
    images = [Image.open(io.BytesIO(base64.b64decode(each, validate=True))) for each in encoded]
    assert all((image.format, image.mode) == ("PNG", "L") for image in images)
    return np.stack([np.asarray(image) for image in images])


def test_pngs_show_the_same_images(model: mlflow.pyfunc.PyFuncModel) -> None:
    params = {"num": 3, "seed": 2}
    table = model.predict(digits(3, 5), params=params | {"format": "png"})
    assert list(table.columns) == ["png"]
    np.testing.assert_array_equal(
        read_pngs(table["png"].tolist()), model.predict(digits(3, 5), params=params)
    )


@pytest.mark.parametrize(
    ("wish", "params", "sentence"),
    [
        (10, {}, "a digit must be 0 to 9, or -1 for any"),
        (-2, {}, "a digit must be 0 to 9, or -1 for any"),
        (1, {"num": 0}, "num must be at least 1"),
        (1, {"seed": -1}, "seed must be 0 to"),
        (1, {"num": 10_001}, "at most 10000 images"),
        (1, {"num": 2**63 - 1}, "at most 10000 images"),
        (1, {"seed": 2**32}, "seed must be 0 to"),
        (1, {"format": "gif"}, "format must be array or png, not 'gif'"),
    ],
)
def test_wishes_out_of_range_are_refused(
    model: mlflow.pyfunc.PyFuncModel, wish: int, params: dict[str, Any], sentence: str
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
    stored = [path for path in (store / "artifacts").rglob("*") if path.is_file()]
    assert not {".pkl", ".pickle", ".pt", ".pth", ".bin"} & {path.suffix for path in stored}
    generators = [path.parts[-3:-1] for path in stored if path.name == WEIGHTS]
    assert set(generators) == {("artifacts", "bundle")}, "a version has one generator, its own"


def test_registering_again_for_the_same_run_changes_nothing(
    conditional: Path, tmp_path: Path
) -> None:
    run_id = register(tmp_path, ConvConfig(width=4))
    before = numbers()
    register(tmp_path, ConvConfig(width=4), run_id)
    assert numbers() == before


def test_what_an_earlier_start_logged_without_registering_it_is_deleted(
    conditional: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, run_id = mlflow.MlflowClient(), start_run()
    experiment_id = client.get_run(run_id).info.experiment_id

    def models() -> set[str]:
        found = client.search_logged_models(
            [experiment_id], filter_string=f"source_run_id = '{run_id}'"
        )
        return {model.model_id for model in found}

    half = client.create_logged_model(experiment_id, source_run_id=run_id)
    assert models() == {half.model_id}
    monkeypatch.setattr(psutil.Process, "create_time", lambda _: time.time() + 1)  # a later start
    register(tmp_path, ConvConfig(width=4), run_id)
    (number,) = numbers(run_id)
    source = client.get_model_version(MODEL_NAME, str(number)).source
    assert source == f"models:/{models().pop()}"
    assert len(models()) == 1


def test_what_is_packed_otherwise_gives_way_to_what_is_registered(tmp_path: Path) -> None:
    trained = trained_in(tmp_path, ConvConfig(width=4))
    run_id = start_run()
    first = register_generator.fn(trained, load_floors(), run_id)
    card = {"model_card.md": b"# Packed again, by other code\n"}
    digest = save_bundle(load_bundle(trained.bundle), trained.bundle, card)
    assert digest != trained.digest
    again = register_generator.fn(replace(trained, digest=digest), load_floors(), run_id)
    assert again.version == first.version
    assert bundle_digest(trained.bundle) == trained.digest


def test_what_an_interrupted_registration_left_twice_is_mended(
    conditional: Path, tmp_path: Path
) -> None:
    run_id = register(tmp_path, ConvConfig(width=4))
    (kept,) = numbers(run_id)
    version = mlflow.MlflowClient().get_model_version(MODEL_NAME, str(kept))
    mlflow.register_model(version.source, MODEL_NAME)
    assert len(numbers(run_id)) == 2
    register(tmp_path, ConvConfig(width=4), run_id)
    assert numbers(run_id) == [kept]


def test_champion_registered_again_stays_champion_alone(conditional: Path, tmp_path: Path) -> None:
    client = mlflow.MlflowClient()
    before = client.get_registered_model(MODEL_NAME).aliases
    champion = client.get_model_version_by_alias(MODEL_NAME, "champion")
    register(tmp_path, ConvConfig(width=4), champion.run_id)
    assert client.get_registered_model(MODEL_NAME).aliases == before


def test_first_version_is_champion_later_ones_challenger(conditional: Path, tmp_path: Path) -> None:
    register(tmp_path, MlpConfig())
    first, *_, last = numbers()
    aliases = mlflow.MlflowClient().get_registered_model(MODEL_NAME).aliases
    assert int(aliases["champion"]) == first
    assert int(aliases["challenger"]) == last


def test_without_a_champion_the_oldest_version_becomes_it(
    conditional: Path, tmp_path: Path
) -> None:
    client = mlflow.MlflowClient()
    client.delete_registered_model_alias(MODEL_NAME, "champion")
    run_id = register(tmp_path, ConvConfig(width=4))
    aliases = client.get_registered_model(MODEL_NAME).aliases
    assert int(aliases["champion"]) == 1
    assert [int(aliases["challenger"])] == numbers(run_id)


def test_without_a_champion_older_versions_that_are_not_whole_are_passed_over(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    with mlflow_store(tmp_path_factory.mktemp("store"), "registry"):
        client = mlflow.MlflowClient()
        for _ in range(3):
            register(tmp_path, ConvConfig(width=4))
        for version, spoil in (("1", shutil.rmtree), ("2", spoil_weights)):
            files = Path(client.get_model_version_download_uri(MODEL_NAME, version))
            spoil(files / "artifacts" / "bundle")
        client.delete_registered_model_alias(MODEL_NAME, "champion")
        register(tmp_path, ConvConfig(width=4))
        aliases = client.get_registered_model(MODEL_NAME).aliases
        assert {name: int(version) for name, version in aliases.items()} == {
            "champion": 3,
            "challenger": 4,
        }


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
    assert version.tags["bundle"] == bundle_digest(conditional)
    assert version.tags["seed"] == "7"
    assert version.tags["num_samples"] == "10000"
    assert version.tags.keys() >= {*scores.metrics(), *TAGS_OF_THE_RUN}


def test_no_alias_comes_to_a_version_whose_files_are_gone_or_altered(
    conditional: Path, tmp_path: Path
) -> None:
    client = mlflow.MlflowClient()
    run_id = register(tmp_path, ConvConfig(width=4))
    version = str(numbers(run_id)[0])
    client.delete_registered_model_alias(MODEL_NAME, "challenger")
    files = Path(client.get_model_version_download_uri(MODEL_NAME, version))
    for spoil in (spoil_weights, shutil.rmtree):
        spoil(files / "artifacts" / "bundle")
        with pytest.raises(RegistryError, match=f"the files of models:/{MODEL_NAME}/.* not whole"):
            register(tmp_path, ConvConfig(width=4), run_id)
        assert "challenger" not in client.get_registered_model(MODEL_NAME).aliases
    client.delete_model_version(MODEL_NAME, version)


def test_registry_that_is_away_is_not_said_to_have_lost_the_files(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        nobody = f"http://127.0.0.1:{server.getsockname()[1]}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", nobody)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(ServiceError, match=f"MLflow does not answer at {nobody}/health"):
        _verify_files(f"models:/{MODEL_NAME}/1", "")


def spoil_weights(bundle: Path) -> None:
    with (bundle / "generator.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x7f")


def test_a_bundle_that_changed_since_training_is_not_registered(
    conditional: Path, tmp_path: Path
) -> None:
    trained, before = trained_in(tmp_path, ConvConfig(width=4)), numbers()
    for spoil in (lambda: trained_in(tmp_path, MlpConfig()), lambda: spoil_weights(trained.bundle)):
        spoil()
        with pytest.raises(RegistryError, match=r"not the bundle that was registered|not whole"):
            register_generator.fn(trained, load_floors(), start_run())
    assert numbers() == before


RACER = """
import sys
from pathlib import Path
import mlflow
from gan.evaluation.scores import load_floors
from tasks.registry import keep_first_version, register_generator
from tasks.tracking import MODEL_NAME
from tasks.training import TrainedGenerator

def register(folder, digest, run_id):
    bundle = Path(folder)
    trained = TrainedGenerator(bundle=bundle, digest=digest, seconds=1.0, images_per_s=1.0)
    return register_generator.fn(trained, load_floors(), run_id).version

def claim(model_uri, run_id):
    mlflow.register_model(model_uri, MODEL_NAME)
    return keep_first_version(mlflow.MlflowClient(), run_id).version

print("ready", flush=True)
for line in sys.stdin:
    name, *arguments = line.split()
    print({"register": register, "claim": claim}[name](*arguments), flush=True)
"""


class Racers:
    """Two processes that do what they are told at the same time."""

    def __init__(self, processes: list["subprocess.Popen[str]"]) -> None:
        self.processes = processes

    def race(self, *words: str) -> list[str]:
        """Tell both the same; what each answers."""
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.write(" ".join(words) + "\n")
            process.stdin.flush()
        return self.answers()

    def answers(self) -> list[str]:
        """What each says next."""
        return [process.stdout.readline().strip() for process in self.processes if process.stdout]


@pytest.fixture(scope="module")
def racers(store: Path, pytestconfig: pytest.Config) -> Iterator[Racers]:
    with ExitStack() as stack:
        processes = [
            stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-c", RACER],
                    cwd=pytestconfig.rootpath,
                    env={**os.environ, "MLFLOW_TRACKING_URI": f"sqlite:///{store}/mlflow.db"},
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                )
            )
            for _ in range(2)
        ]
        racers = Racers(processes)
        assert racers.answers() == ["ready", "ready"]
        yield racers
        for process in processes:
            process.kill()


@pytest.mark.slow
def test_two_processes_of_one_run_leave_one_version(
    conditional: Path, racers: Racers, tmp_path: Path
) -> None:
    trained, run_id = trained_in(tmp_path, ConvConfig(width=4)), start_run()
    answers = racers.race("register", str(trained.bundle), trained.digest, run_id)
    assert answers == [str(number) for number in numbers(run_id)] * 2
    challenger = mlflow.MlflowClient().get_model_version_by_alias(MODEL_NAME, "challenger")
    assert str(challenger.version) == answers[0]
    assert answers == racers.race("register", str(trained.bundle), trained.digest, run_id)
    assert len(numbers(run_id)) == 1


@pytest.mark.slow
def test_one_version_is_left_twenty_times_over(conditional: Path, racers: Racers) -> None:
    client = mlflow.MlflowClient()
    experiment = mlflow.get_experiment_by_name("registry")
    assert experiment is not None
    for _ in range(20):
        run_id = start_run()
        model = client.create_logged_model(experiment.experiment_id, source_run_id=run_id)
        answers = racers.race("claim", model.model_uri, run_id)
        left = numbers(run_id)
        assert len(left) == 1
        assert answers == [str(left[0])] * 2


@pytest.fixture(scope="module")
def served(
    conditional: Path, store: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """The address of a server of the champion, which may unpickle nothing."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "models", "serve", "--env-manager", "local"]
    command += ["-m", f"models:/{MODEL_NAME}@champion", "-h", "127.0.0.1", "-p", str(port)]
    with subprocess.Popen(
        command,
        cwd=tmp_path_factory.mktemp("served"),
        env={
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.defpath}",
            "MLFLOW_TRACKING_URI": f"sqlite:///{store}/mlflow.db",
            "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
            "OMP_NUM_THREADS": "1",
        },
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as process:
        try:
            wait_for(f"http://127.0.0.1:{port}/ping")
            yield f"http://127.0.0.1:{port}/invocations"
        finally:
            os.killpg(process.pid, signal.SIGKILL)


def wait_for(url: str) -> None:
    deadline = time.monotonic() + 90
    while True:
        try:
            httpx.get(url, trust_env=False).raise_for_status()
            return
        except httpx.HTTPError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.3)


def ask(url: str, digit: object, params: dict[str, Any]) -> httpx.Response:
    wish = {"dataframe_records": [{"digit": digit}], "params": params}
    return httpx.post(url, json=wish, timeout=60, trust_env=False)


@pytest.mark.slow
def test_a_server_draws_what_the_process_draws(served: str, conditional: Path) -> None:
    expected = draw(load_bundle(conditional), [8], num=16, seed=1).numpy()
    array = ask(served, 8, {"num": 16, "seed": 1}).json()["predictions"]
    np.testing.assert_array_equal(np.array(array), expected)
    rows = ask(served, 8, {"num": 16, "seed": 1, "format": "png"}).json()["predictions"]
    np.testing.assert_array_equal(read_pngs([row["png"] for row in rows]), expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("digit", "params", "sentence"),
    [
        (11, {}, "a digit must be 0 to 9, or -1 for any"),
        (8, {"num": 0}, "num must be at least 1, not 0"),
        (8, {"num": 10**30}, "a request may ask for at most 10000 images"),
        (8, {"num": "x"}, "Can not safely convert"),
        (8, {"seed": -1}, "seed must be 0 to 2**32 - 1, not -1"),
        (8, {"seed": 2**32}, "seed must be 0 to 2**32 - 1, not"),
        (8, {"format": "gif"}, "format must be array or png, not 'gif'"),
        ("eight", {}, "not compatible with model signature"),
        (None, {}, "not compatible with model signature"),
    ],
)
def test_a_server_refuses_what_is_out_of_range_with_a_sentence(
    served: str, digit: object, params: dict[str, Any], sentence: str
) -> None:
    answer = ask(served, digit, params)
    assert answer.status_code == 400
    assert sentence in answer.json()["message"]
    assert "Traceback" not in answer.text
