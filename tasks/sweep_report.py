"""What a sweep ends with: its table of trials, what mattered, and how the best score fell."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import optuna
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from mlflow import MlflowClient
from mlflow.utils.mlflow_tags import MLFLOW_RUN_NOTE
from optuna import Study
from optuna.trial import TrialState
from prefect import task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE

from gan.evaluation.scores import Scores
from tasks.pictures import COLOURS
from tasks.promotion import Decision, describe
from tasks.registry import RegisteredVersion
from tasks.sweep import NUM_DRAWN, SCORE, Sweep, open_study, rank

MIN_TO_WEIGH = 4
"""Trials below which no importance can be told."""


@task(name="report sweep", cache_policy=NO_CACHE)
def report_sweep(
    sweep: Sweep,
    finals: dict[int, Scores],
    winner: int,
    version: RegisteredVersion,
    decision: Decision,
) -> None:
    """Leave table, importances and plot in the parent run, and print the summary.

    Args:
        sweep: the sweep, all trials of which have ended.
        finals: the full scores of the best trials, by number.
        winner: the number of the trial that was registered.
        version: what it is registered as.
        decision: whether it was promoted.
    """
    study = open_study(sweep.folder)
    table, weights = make_table(study, finals), weigh(study)
    table.to_csv(sweep.folder / "trials.csv", index=False)
    page = write_page(study, table, weights, winner, version, decision)
    (sweep.folder / "sweep.md").write_text(page)
    plot_best(study, sweep.folder / "best.png")
    client = MlflowClient()
    for artifact in ("trials.csv", "sweep.md", "best.png"):
        client.log_artifact(sweep.mlflow_run_id, str(sweep.folder / artifact))
    client.log_dict(sweep.mlflow_run_id, weights, "importances.json")
    best = rank(study)[0]
    client.log_metric(sweep.mlflow_run_id, SCORE, best.values[0])
    client.set_tag(sweep.mlflow_run_id, "best_trial", winner)
    client.set_tag(sweep.mlflow_run_id, MLFLOW_RUN_NOTE, page.partition("\n\n| ")[0])
    create_markdown_artifact(markdown=page, key="sweep", description=page.splitlines()[0])
    print(page)  # noqa: T201


def make_table(study: Study, finals: dict[int, Scores]) -> pd.DataFrame:
    """One row a trial in the order of their numbers: end, scores, settings, reason."""
    rows = [
        {
            "trial": trial.number,
            "end": trial.state.name.lower(),
            SCORE: trial.value,
            "frechet_distance": finals[trial.number].frechet_distance
            if trial.number in finals
            else None,
            **trial.params,
            "epochs": max(trial.intermediate_values, default=0),
            "reason": trial.user_attrs.get("reason", ""),
            "mlflow_run_id": trial.user_attrs.get("mlflow_run_id", ""),
        }
        for trial in study.trials
    ]
    # As they are: beside a gap, pandas would make fractions of whole numbers.
    return pd.DataFrame(rows, dtype=object)


def weigh(study: Study) -> dict[str, float]:
    """How much of the difference between scores each field makes, as shares; what matters first.

    Optuna's PED-ANOVA (Watanabe et al. 2023). Nothing where too few trials ended whole.
    """
    if len(study.get_trials(states=[TrialState.COMPLETE])) < MIN_TO_WEIGH:
        return {}
    return optuna.importance.get_param_importances(study)


def plot_best(study: Study, path: Path) -> None:
    """Draw the score of every trial and the best one so far, as a PNG."""
    whole = study.get_trials(states=[TrialState.COMPLETE])
    scores = pd.Series([t.value for t in whole], index=[t.number for t in whole], dtype=float)
    with mpl.rc_context({"font.size": 14, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(9, 5), layout="constrained")
        axes = figure.subplots()
        axes.plot(scores.index, scores, "o", color=COLOURS[1], label="a trial")
        axes.step(scores.index, scores.cummin(), where="post", color=COLOURS[0], label="the best")
        axes.set_title(f"Frechet distance of {NUM_DRAWN:,} drawings", loc="left")
        axes.set_xlabel("trial")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(axis="y", alpha=0.3)
        axes.legend(frameon=False)
        figure.savefig(path, dpi=150)


def write_page(
    study: Study,
    table: pd.DataFrame,
    weights: dict[str, float],
    winner: int,
    version: RegisteredVersion,
    decision: Decision,
) -> str:
    """The sweep as markdown, its best trials first."""
    ends = table["end"].value_counts()
    best, middle = rank(study)[0], study.trials[0]
    whole = middle.state == TrialState.COMPLETE
    against = f"the middle of the space {middle.value:.4f}" if whole else "no middle"
    parts = [
        f"# Sweep: trial {winner} of {len(table)} is {version.name} version {version.version}",
        ", ".join(f"{num} {end}" for end, num in ends.items())
        + f"; the best {SCORE} is {best.value:.4f} (trial {best.number}), {against}.",
        f"Version {version.version}: {describe(decision)}.",
        _markdown(table.drop(columns="mlflow_run_id").sort_values(SCORE, na_position="last")),
    ]
    if weights:
        shares = "\n".join(f"| {name} | {share:.2f} |" for name, share in weights.items())
        parts.append(f"| field | importance |\n| --- | --- |\n{shares}")
    return "\n\n".join(parts) + "\n"


def _markdown(table: pd.DataFrame) -> str:
    def cell(value: object) -> str:
        if isinstance(value, float):
            return "" if pd.isna(value) else f"{value:.4g}"
        return "" if value is None else " ".join(str(value).replace("|", "/").split())

    rows = [list(table.columns), ["---"] * len(table.columns), *table.to_numpy().tolist()]
    return "\n".join(f"| {' | '.join(cell(value) for value in row)} |" for row in rows)
