"""Runs side by side: one page with what each generator draws from the same seed, by epoch."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from PIL import Image

from gan.errors import UserError
from gan.evaluation.scores import METRICS, Scores, explain, score_rows
from tasks.journal import PICTURE
from tasks.pages import Film, write_page
from tasks.pages.charts import LOSS_NOTE, PROBABILITY_NOTE, Chart, Series, curves_at
from tasks.pulling import find_version
from tasks.tracking import MODEL_NAME

MAX_RUNS = 6
ARTIFACT_FOLDER = "comparisons"
"""Where a logged page lies among the artifacts of each run on it."""
TAGS = ("device", "dataset_digest", "git_commit")
"""What a run stands on besides its parameters."""

_RUN_ID = re.compile(r"[0-9a-f]{32}")


class CompareError(UserError):
    """Runs that cannot be put side by side."""


@dataclass(frozen=True, kw_only=True)
class Compared:
    """A run on the page, as MLflow has it."""

    run: Run
    version: ModelVersion | None
    sheets: dict[int, str]
    """The artifact path of each epoch's sheet, in order."""
    curves: pd.DataFrame
    """Losses and probabilities by epoch."""
    evaluations: list[Scores]
    """All evaluations that compare with the first, which is the run's own; none may be there."""

    @property
    def name(self) -> str:
        """The run's name, and its version if it has one."""
        name = self.run.info.run_name or self.run.info.run_id
        return f"{name} (version {self.version.version})" if self.version else name

    @property
    def conditional(self) -> bool:
        """Whether it was told which digit to draw."""
        return self.run.data.params.get("num_classes", "0") != "0"


def compare(names: Sequence[str], out: Path, log: bool) -> Path:
    """Write a page that shows 2 to 6 runs side by side; returns its path.

    Args:
        names: of each run its MLflow run id, the number of its version, or an alias: `@champion`.
        out: the file to write, in a folder that is there.
        log: whether to leave the page among the artifacts of each run, too.

    Raises:
        CompareError: a name means no run, two mean the same, a run has no pictures or no curves or
            damaged ones, there are too few or too many, or the file cannot be written.
        VersionError: there is no such version or alias; says which there are.
    """
    if not 2 <= len(names) <= MAX_RUNS:
        raise CompareError(f"2 to {MAX_RUNS} runs fit side by side, not {len(names)}")
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise CompareError(f"{out} must be a file in a folder that is there")
    client = MlflowClient()
    given: dict[str, str] = {}
    for name in names:
        run_id = find_run_id(client, name)
        if run_id in given:
            raise CompareError(f"{given[run_id]} and {name} are the same run")
        given[run_id] = name
    runs = [read_run(client, run_id, name) for run_id, name in given.items()]

    stops, note = choose_stops(
        [list(each.sheets) for each in runs],
        [int(each.run.data.params.get("epochs", max(each.sheets))) for each in runs],
    )
    with TemporaryDirectory() as scratch:
        films = [
            Film(
                name=each.name,
                conditional=each.conditional,
                epochs=epochs,
                sheets=fetch_sheets(client, each, epochs, Path(scratch)),
                values=curves_at(each.curves, epochs),
            )
            for each, epochs in zip(runs, zip(*stops.values(), strict=True), strict=True)
        ]
        try:
            write_page(
                out,
                "comparison.html",
                films=films,
                stops=list(stops),
                note=note,
                charts=draw_charts(runs),
                scores=scores_side_by_side([each.evaluations for each in runs]),
                num_evaluations=[len(each.evaluations) for each in runs],
                alike=scored_alike(runs),
                differences=differences([each.run for each in runs]),
            )
        except OSError as error:
            raise CompareError(f"cannot write {out}: {error.strerror}") from None
    if log:
        for run_id in given:
            client.log_artifact(run_id, str(out), ARTIFACT_FOLDER)
    return out


def find_run_id(client: MlflowClient, name: str) -> str:
    """The id of the MLflow run that is meant.

    Raises:
        CompareError: the name means nothing, or a version that no run made.
        VersionError: there is no such version or alias.
    """
    if _RUN_ID.fullmatch(name):
        return name
    if not re.fullmatch(r"\d{1,9}|@.+", name):
        raise CompareError(
            f"{name!r} is no MLflow run id, number of a version of {MODEL_NAME} or @alias"
        )
    version = find_version(client, int(name) if name.isdecimal() else name.removeprefix("@"))
    if not version.run_id:
        raise CompareError(f"version {version.version} was not made by a run")
    return str(version.run_id)


def read_run(client: MlflowClient, run_id: str, name: str) -> Compared:
    """All that the page shows of a run, but for the pictures themselves.

    Raises:
        CompareError: there is no such run, or nothing of it to see, or its scores are damaged.
    """
    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        raise CompareError(f"MLflow has no run {name}") from None
    logged = sorted(
        (int(found[1]), found[0])
        for file in client.list_artifacts(run_id, "images")
        if (found := PICTURE.fullmatch(file.path))
    )
    names = ("d_loss", "g_loss", "d_real", "d_fake")
    curves = pd.DataFrame({curve: read_curve(client, run_id, curve) for curve in names}).dropna()
    if not logged or curves.empty:
        raise CompareError(f"run {name} has no sample sheets and curves: it did not train a GAN")
    versions = client.search_model_versions(f"name = '{MODEL_NAME}' and run_id = '{run_id}'")
    version = versions[0] if versions else None
    return Compared(
        run=run,
        version=version,
        sheets=dict(logged),
        curves=curves,
        evaluations=read_evaluations(client, run, version),
    )


def read_curve(client: MlflowClient, run_id: str, name: str) -> pd.Series:
    """A curve by epoch."""
    points = {point.step: point.value for point in client.get_metric_history(run_id, name)}
    return pd.Series(points, dtype=float).sort_index()


def read_evaluations(client: MlflowClient, run: Run, version: ModelVersion | None) -> list[Scores]:
    """The run's own scores, then those of later evaluations of its version that differ.

    Only what was measured alike is kept: the same judge, number of images and protocol. The same
    seed gives the same scores, and counts once.
    """
    again: list[Run] = []
    if version:
        # Numbers begin anew where the registered model is deleted: what was scored before this
        # version was made is of another generator.
        again = client.search_runs(
            [run.info.experiment_id],
            f"tags.model_version = '{version.version}' "
            f"and attributes.start_time >= {version.creation_timestamp}",
        )
    own = read_json(client, run, "scores.json")
    later = [read_json(client, each, "examination.json") or {"scores": []} for each in again]
    several = ([own] if own else []) + [scores for each in later for scores in each["scores"]]
    found = dict.fromkeys(map(Scores.from_json, several))  # an ordered set
    return [scores for scores in found if _protocol(scores) == _protocol(next(iter(found)))]


def read_json(client: MlflowClient, run: Run, name: str) -> dict[str, Any] | None:
    """A run's artifact, if it is there.

    Raises:
        CompareError: it is no JSON.
    """
    if name not in [file.path for file in client.list_artifacts(run.info.run_id)]:
        return None
    with TemporaryDirectory() as scratch:
        path = Path(client.download_artifacts(run.info.run_id, name, scratch))
        try:
            content: dict[str, Any] = json.loads(path.read_text())
        except ValueError:
            raise CompareError(f"{name} of run {run.info.run_name} is damaged") from None
        return content


def _protocol(scores: Scores) -> tuple[str, int, str]:
    return scores.judge, scores.num_samples, scores.protocol


def fetch_sheets(
    client: MlflowClient, run: Compared, epochs: Sequence[int], folder: Path
) -> list[Path]:
    """Download the run's sheets of these epochs.

    Raises:
        CompareError: one is no whole picture; its process may be writing it.
    """
    run_id = run.run.info.run_id
    place = folder / run_id
    place.mkdir()
    fetched = {
        epoch: Path(client.download_artifacts(run_id, run.sheets[epoch], str(place)))
        for epoch in set(epochs)
    }
    for sheet in fetched.values():
        try:
            with Image.open(sheet) as picture:
                picture.load()
        except (OSError, SyntaxError):  # the latter where a part of a PNG file is broken
            raise CompareError(f"{sheet.name} of run {run.name} is damaged") from None
    return [fetched[epoch] for epoch in epochs]


def choose_stops(
    epochs: Sequence[Sequence[int]], lengths: Sequence[int]
) -> tuple[dict[str, tuple[int, ...]], str]:
    """Where the slider stops: by name, an epoch of each run; and a sentence on how it was chosen.

    It stops at the epochs of which all runs have a sheet, and at the end of each. Where there are
    none, it stops at equal shares of the trainings.

    Args:
        epochs: those of which each run has a sheet.
        lengths: the epochs of each run's whole training.
    """
    ends = tuple(map(max, epochs))
    common = sorted(set(epochs[0]).intersection(*epochs[1:]))
    if common:
        stops = {f"epoch {epoch}": (epoch,) * len(epochs) for epoch in common}
        if ends in stops.values():
            return stops, "All runs are shown after the same epochs."
        return stops | {"the end": ends}, (
            "All runs are shown after the same epochs; the last stop is the last sheet of each, "
            "though some trained for longer."
        )
    fewest = min(range(len(epochs)), key=lambda place: len(epochs[place]))
    stops = {}
    for epoch in sorted(epochs[fewest]):
        share = epoch / lengths[fewest]
        stops[f"{share:.0%}"] = tuple(
            min(theirs, key=lambda other: abs(other / length - share))
            for theirs, length in zip(epochs, lengths, strict=True)
        )
    return stops, (
        "No epoch has a sheet in all runs, so each is shown near the same share of its training."
    )


def draw_charts(runs: Sequence[Compared]) -> list[Chart]:
    """A chart a curve, with a line a run."""
    titles = {
        "d_loss": ("Discriminator's loss", LOSS_NOTE, None),
        "g_loss": ("Generator's loss", "Losses of different recipes do not compare.", None),
        "d_real": ("D(x), real images", PROBABILITY_NOTE, 1.0),
        "d_fake": ("D(G(z)), drawn images", "The same for drawn images.", 1.0),
    }
    return [
        Chart(
            title=title,
            note=note,
            top=top,
            series=[
                Series(
                    label=each.name, film=film, curve=curve, colour=film, values=each.curves[curve]
                )
                for film, each in enumerate(runs)
            ],
        )
        for curve, (title, note, top) in titles.items()
    ]


@dataclass(frozen=True, kw_only=True)
class ScoreCell:
    """A score of one run, and how far its evaluations lie apart, where there are several."""

    value: str
    spread: str


@dataclass(frozen=True, kw_only=True)
class ScoreRow:
    """A score of every run."""

    name: str
    cells: Sequence[ScoreCell | None]
    floor: str
    """What real images score; empty where no floor holds for all runs."""
    meaning: str
    better: str


def scores_side_by_side(evaluations: Sequence[Sequence[Scores]]) -> list[ScoreRow]:
    """The scores of all runs side by side, in the metrics' order; `evaluations` as in `Compared`.

    A score is that of the run's own evaluation; its spread is the least and the most of all.
    """
    tables = [
        {name: (floor, meaning) for name, _, floor, meaning in score_rows(each[0])} if each else {}
        for each in evaluations
    ]
    known = {name: row for table in tables for name, row in table.items()}
    rows = []
    for name in sorted(known, key=lambda name: list(METRICS.values()).index(explain(name))):
        cells = []
        for several in evaluations:
            values = [scores.metrics()[name] for scores in several if name in scores.metrics()]
            spread = f"{min(values):.4f} to {max(values):.4f}" if len(values) > 1 else ""
            cells.append(ScoreCell(value=f"{values[0]:.4f}", spread=spread) if values else None)
        floors = {table[name][0] for table in tables if name in table}
        rows.append(
            ScoreRow(
                name=name,
                cells=cells,
                floor=floors.pop() if len(floors) == 1 else "",
                meaning=known[name][1],
                better=explain(name).better,
            )
        )
    return rows


def scored_alike(runs: Sequence[Compared]) -> bool:
    """Whether the scores of all runs that have some compare."""
    return len({_protocol(each.evaluations[0]) for each in runs if each.evaluations}) <= 1


def differences(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Parameters, and what a run stands on, that are not the same in all runs; by name."""
    stated = [
        run.data.params | {tag: run.data.tags[tag] for tag in TAGS if tag in run.data.tags}
        for run in runs
    ]
    names = sorted({name for each in stated for name in each})
    table = {name: [each.get(name, "") for each in stated] for name in names}
    return {name: values for name, values in table.items() if len(set(values)) > 1}
