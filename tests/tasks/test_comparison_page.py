"""Runs side by side, with a real MLflow on SQLite and short trainings."""

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import mlflow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlflow import MlflowClient
from mlflow.entities import Metric
from PIL import Image
from playwright.sync_api import expect, sync_playwright

from gan.config import ConvConfig, TrainConfig
from gan.data import Split, load_mnist
from gan.errors import UserError
from gan.evaluation.scores import Scores, load_floors
from gan.recipes import quick, vanilla
from tasks.comparison_page import ARTIFACT_FOLDER, choose_stops, compare, scores_side_by_side
from tasks.journal import CURVES
from tasks.pictures import epoch_of
from tasks.tracking import MODEL_NAME, describe, flat_parameters
from tests.browser import CHROMIUM, SWITCHES
from tests.mlflow_store import mlflow_store
from tests.tasks.short_run import train_shortly

HOSTILE = "<img src=x onerror=alert(1)></script><script>alert(2)</script>"
TINY = replace(quick(), networks=ConvConfig(width=4), epochs=3, batch_size=250)
TEXTBOOK = replace(vanilla(), epochs=2, batch_size=500)


@dataclass(frozen=True, kw_only=True)
class Store:
    """MLflow with two trainings; the first is version 1, the champion."""

    client: MlflowClient
    experiment: str
    quick: str
    vanilla: str
    bare: str
    """A run that trained nothing."""


@pytest.fixture(scope="module")
def store(mnist_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    home = tmp_path_factory.mktemp("store")
    with mlflow_store(home, "compare"):
        client = MlflowClient()
        experiment = mlflow.set_experiment("compare").experiment_id
        data = load_mnist(mnist_dir, "cpu").train
        few = Split(images=data.images[:1000], labels=data.labels[:1000])
        runs = []
        for config, scores in ((TINY, load_floors()), (TEXTBOOK, None)):
            folder = tmp_path_factory.mktemp(config.recipe)
            runs.append(track(client, experiment, config, few, folder, scores))
        client.create_registered_model(MODEL_NAME)
        client.create_model_version(MODEL_NAME, str(home / "model"), run_id=runs[0])
        client.set_registered_model_alias(MODEL_NAME, "champion", "1")
        bare = client.create_run(experiment).info.run_id
        yield Store(client=client, experiment=experiment, quick=runs[0], vanilla=runs[1], bare=bare)


def track(
    client: MlflowClient,
    experiment: str,
    config: TrainConfig,
    data: Split,
    folder: Path,
    scores: Scores | None,
) -> str:
    """Train shortly and log it as the pipeline does; the run's id."""
    run_id: str = client.create_run(experiment, run_name=describe(config)).info.run_id
    for name, value in flat_parameters(config).items():
        client.log_param(run_id, name, value)
    for progress in train_shortly(config, data, folder):
        now = int(time.time() * 1000)
        metrics = [Metric(name, getattr(progress, name), now, progress.epoch) for name in CURVES]
        client.log_batch(run_id, metrics=metrics)
    for sheet in sorted((folder / "samples").glob("*.png")):
        with Image.open(sheet) as picture:
            client.log_image(run_id, picture, key="samples", step=epoch_of(sheet))
    if scores:
        log_scores(client, run_id, scores, folder)
    return run_id


def log_scores(client: MlflowClient, run_id: str, scores: Scores, folder: Path) -> None:
    (folder / "scores.json").write_text(json.dumps(asdict(scores)))
    client.log_artifact(run_id, str(folder / "scores.json"))


@pytest.mark.parametrize("name", ["1", "@champion", "run id"])
def test_run_is_named_by_id_version_or_alias(name: str, store: Store, tmp_path: Path) -> None:
    given_name = store.quick if name == "run id" else name
    page = compare([given_name, store.vanilla], tmp_path / "page.html", log=False).read_text()
    assert "quick, 3 epochs, seed 0 (version 1)" in page
    assert "vanilla, 2 epochs, seed 0" in page
    assert "never told which digit to draw" in page
    assert "Each version was evaluated once" in page
    assert "draws from the same seed" in page, "not from the same noise: one takes more of it"


def test_same_epochs_are_shown_and_then_the_ends(store: Store, tmp_path: Path) -> None:
    page = compare([store.vanilla, store.quick], tmp_path / "page.html", log=False).read_text()
    data = json.loads(page.split('id="data">')[1].split("</script>")[0])
    assert data["stops"] == ["epoch 1", "epoch 2", "the end"]
    assert [film["epochs"] for film in data["films"]] == [[1, 2, 2], [1, 2, 3]]
    assert [film["conditional"] for film in data["films"]] == [False, True]
    same, other = (film["sheets"] for film in data["films"])
    assert same[1] == same[2]
    assert len(set(other)) == 3


def test_parameters_that_differ_are_listed_and_no_others(store: Store, tmp_path: Path) -> None:
    page = compare([store.quick, store.vanilla], tmp_path / "page.html", log=False).read_text()
    table = page.split('id="differences"')[1]
    for name in ("recipe", "batch_size", "dropout", "architecture"):
        assert f'<th scope="row">{name}</th>' in table
    for name in ("seed", "loss", "precision"):
        assert f'<th scope="row">{name}</th>' not in table


def test_several_evaluations_of_a_version_give_a_spread(store: Store, tmp_path: Path) -> None:
    floors = load_floors()
    for several in (
        [replace(floors, frechet_distance=0.5), replace(floors, frechet_distance=0.4)],
        [floors],  # the same again: a seed that was there already
        [replace(floors, frechet_distance=99.0, num_samples=500)],  # does not compare
    ):
        run = store.client.create_run(store.experiment, tags={"model_version": "1"})
        content = {"scores": [asdict(scores) for scores in several]}
        store.client.log_dict(run.info.run_id, content, "examination.json")
    page = compare(["1", store.vanilla], tmp_path / "page.html", log=False).read_text()
    assert f"{floors.frechet_distance:.4f} to 0.5000" in page
    assert "99.0" not in page
    assert "least and the most of several evaluations" in page


def test_page_is_logged_to_each_run_if_asked(store: Store, tmp_path: Path) -> None:
    compare([store.quick, store.vanilla], tmp_path / "both.html", log=True)
    for run_id in (store.quick, store.vanilla):
        files = [file.path for file in store.client.list_artifacts(run_id, ARTIFACT_FOLDER)]
        assert files == [f"{ARTIFACT_FOLDER}/both.html"]


def test_evaluations_of_a_former_version_of_that_number_are_of_another_generator(
    store: Store, tmp_path: Path
) -> None:
    """Numbers begin anew where the registered model is deleted and made again."""
    content = {"scores": [asdict(replace(load_floors(), frechet_distance=77.0))]}
    former = store.client.create_run(store.experiment, start_time=1, tags={"model_version": "1"})
    store.client.log_dict(former.info.run_id, content, "examination.json")
    page = compare(["1", store.vanilla], tmp_path / "page.html", log=False).read_text()
    assert "77.0" not in page


@pytest.mark.parametrize("name", ["sheet", "sheet's end", "scores.json"])
def test_damaged_file_of_a_run_is_named(name: str, store: Store, tmp_path: Path) -> None:
    """As where another process is writing it."""
    client, copied = store.client, store.client.get_run(store.vanilla)
    run_id = client.create_run(store.experiment, run_name="damaged").info.run_id
    for curve in CURVES:
        points = client.get_metric_history(copied.info.run_id, curve)
        client.log_batch(run_id, metrics=points)
    file = tmp_path / "images" / "samples%step%1%timestamp%1%x.png"
    file.parent.mkdir()
    Image.new("L", (302, 302)).save(file)
    whole = file.read_bytes()
    file.write_bytes({"sheet": b"", "sheet's end": whole[:-100]}.get(name, whole))
    client.log_artifact(run_id, str(file), "images")
    named = "samples%step%1%"
    if name == "scores.json":
        client.log_text(run_id, "{", name)
        named = name
    with pytest.raises(UserError, match=f"^{named}.* of run damaged is damaged$"):
        compare([run_id, store.quick], tmp_path / "page.html", log=False)
    assert not list(tmp_path.glob("*page.html*"))


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["1"], "2 to 6 runs"),
        (["1", "2", "3", "4", "5", "6", "7"], "2 to 6 runs"),
        (["1", "f" * 32], "no run ffff"),
        (["1", "nonsense"], "'nonsense' is no MLflow run id"),
        (["1", ""], "'' is no MLflow run id"),
        (["1", "@"], "'@' is no MLflow run id"),
        (["1", "7"], "no version or alias 7"),
        (["1", "@best"], "no version or alias 'best'"),
        (["1", "@champion"], "1 and @champion are the same run"),
        (["1", "bare"], "no sample sheets"),
    ],
)
def test_what_cannot_be_compared_is_said_in_a_sentence(
    names: Sequence[str], words: str, store: Store, tmp_path: Path
) -> None:
    meant = [store.bare if name == "bare" else name for name in names]
    with pytest.raises(UserError, match=words) as caught:
        compare(meant, tmp_path / "page.html", log=False)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_page_cannot_be_written_where_there_is_no_place(store: Store, tmp_path: Path) -> None:
    for out in (tmp_path, tmp_path / "nowhere" / "page.html"):
        with pytest.raises(UserError, match="must be a file in a folder that is there"):
            compare([store.quick, store.vanilla], out, log=False)


epochs_of_runs = st.lists(
    st.sets(st.integers(1, 60), min_size=1, max_size=20).map(list), min_size=2, max_size=6
)


@given(epochs=epochs_of_runs)
def test_every_stop_is_an_epoch_that_has_a_sheet(epochs: list[list[int]]) -> None:
    stops, _ = choose_stops(epochs, [max(each) for each in epochs])
    for stop in stops.values():
        assert all(epoch in theirs for epoch, theirs in zip(stop, epochs, strict=True))
    assert list(stops.values())[-1] == tuple(max(each) for each in epochs)
    common = set(epochs[0]).intersection(*epochs[1:])
    same = [stop[0] for stop in stops.values() if len(set(stop)) == 1]
    assert common <= set(same)


def test_runs_without_common_epochs_are_shown_at_equal_shares() -> None:
    stops, note = choose_stops([[1, 5, 10], [2, 50, 100]], [10, 100])
    assert stops == {"10%": (1, 2), "50%": (5, 50), "100%": (10, 100)}
    assert "same share" in note


def test_scores_that_were_measured_differently_have_no_common_floor() -> None:
    floors = load_floors()
    other = replace(floors, num_samples=500)
    table = scores_side_by_side([[floors], [other], []])
    row = next(row for row in table if row.name == "frechet_distance")
    assert row.cells[0] is not None
    assert row.cells[2] is None
    assert row.floor == ""
    assert scores_side_by_side([[floors], [floors]])[0].floor == f"{floors.frechet_distance:.4f}"
    assert scores_side_by_side([[], []]) == []


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is missing: make system-packages")
def test_one_slider_moves_all_runs_and_hostile_names_stay_text(
    store: Store, tmp_path: Path
) -> None:
    page_file = tmp_path / "page.html"
    store.client.update_run(store.vanilla, name=HOSTILE)
    compare([store.quick, store.vanilla], page_file, log=False)
    requests, complaints = [], []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=SWITCHES)
        page = browser.new_page(viewport={"width": 375, "height": 800})
        page.on("request", lambda request: requests.append(request.url))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: complaints.append(dialog.message))
        page.goto(page_file.as_uri())
        expect(page.get_by_role("heading", level=1)).to_contain_text(HOSTILE)
        assert page.evaluate("document.documentElement.scrollWidth") <= 375

        look = "canvases => canvases.map(canvas => canvas.toDataURL())"
        expect(page.get_by_text("epoch 3", exact=True)).to_be_visible()
        before = page.locator("canvas").evaluate_all(look)
        page.get_by_role("slider").press("Home")
        expect(page.get_by_text("epoch 1", exact=True).first).to_be_visible()
        after = page.locator("canvas").evaluate_all(look)
        assert all(one != other for one, other in zip(before, after, strict=True))

        page.get_by_role("radio", name="3").check(force=True)
        picked = page.locator("canvas").evaluate_all(look)
        assert picked[0] != after[0]
        assert picked[1] == after[1], "it was never told which digit to draw"
        browser.close()
    assert complaints == []
    assert [url for url in requests if not url.startswith("data:")] == [page_file.as_uri()]
