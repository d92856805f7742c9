"""What a run ends with: its scores beside their floors, for the terminal and for Prefect's page."""

from __future__ import annotations

import base64
import os
from pathlib import Path
from urllib.parse import urlsplit

import mlflow
from mlflow import MlflowClient
from prefect import task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE

from gan.config import TrainConfig
from gan.evaluation.scores import Scores, explain, load_floors
from tasks.registry import MODEL_NAME, RegisteredVersion
from tasks.tracking import describe
from tasks.training import TrainedGenerator


@task(name="report", cache_policy=NO_CACHE)
def report(
    config: TrainConfig,
    trained: TrainedGenerator,
    scores: Scores,
    version: RegisteredVersion,
    mlflow_run_id: str,
    folder: Path,
) -> None:
    """Print the summary, and leave it as an artifact of the flow run."""
    title = f"{describe(config)}: {version.name} version {version.version} (@{version.alias})"
    print(summary(title, trained, scores, version, mlflow_run_id, folder))  # noqa: T201
    last_sheet = max((folder / "samples").glob("*.png"))
    champion = champion_scores(MlflowClient(), scores)
    links = mlflow_links(MlflowClient(), mlflow_run_id, version)
    create_markdown_artifact(
        markdown=page(title, scores, champion, links, last_sheet),
        key="generator",
        description=title,
    )


def summary(
    title: str,
    trained: TrainedGenerator,
    scores: Scores,
    version: RegisteredVersion,
    mlflow_run_id: str,
    folder: Path,
) -> str:
    """The run in plain text: scores beside floors, where things are, what to type next."""
    rows = "\n".join(
        f"  {name:<28}{drawn:>9.4f}{real:>9}  {meaning}"
        for name, drawn, real, meaning in score_rows(scores)
    )
    return f"""
{title}

  {f"{scores.num_samples:,} images, {scores.judge}":<28}{"drawn":>9}{"real":>9}
{rows}

  trained    in {trained.seconds:,.0f} s, {trained.images_per_s:,.0f} images/s
  pictures   {folder}: samples/, progress.gif, losses.png
  bundle     {trained.bundle}
  MLflow     run {mlflow_run_id} in {mlflow.get_tracking_uri()}

Next:
  make ui                                   compare runs and versions in the browser
  mlflow.pyfunc.load_model("models:/{version.name}@{version.alias}")
"""


def page(title: str, scores: Scores, champion: dict[str, str], links: str, sheet: Path) -> str:
    """The run as markdown, with the last sample sheet inside."""
    picture = base64.b64encode(sheet.read_bytes()).decode()
    return f"""# {title}

![a hundred drawn digits](data:image/png;base64,{picture})

{links}

{scores.num_samples:,} drawn images against the real test images, judged by {scores.judge}.
"champion": what the champion scored when it was registered. "real": what real training images
score in the place of drawn ones.

{score_table(scores, champion)}
"""


def score_table(scores: Scores, champion: dict[str, str]) -> str:
    """The scores beside the champion's and the floors, as a markdown table."""
    rows = (
        f"| {name} | {drawn:.4f} | {champion.get(name, '')} | {real} | {meaning} |"
        for name, drawn, real, meaning in score_rows(scores)
    )
    return "\n".join(
        ["| score | drawn | champion | real | |", "| --- | --- | --- | --- | --- |", *rows]
    )


def champion_scores(client: MlflowClient, scores: Scores) -> dict[str, str]:
    """The champion's scores as its tags say them; nothing where they do not compare."""
    aliased = client.get_model_version_by_alias(MODEL_NAME, "champion")
    tags: dict[str, str] = client.get_model_version(MODEL_NAME, aliased.version).tags
    same = (tags.get("judge"), tags.get("num_samples")) == (scores.judge, str(scores.num_samples))
    return tags if same else {}


def mlflow_links(client: MlflowClient, mlflow_run_id: str, version: RegisteredVersion) -> str:
    """Where to see the run and the version, and where their files lie."""
    uri = mlflow.get_tracking_uri()
    if not uri.startswith(("http://", "https://")):
        return f"MLflow run `{mlflow_run_id}` in `{uri}`: `make ui` shows it."
    run = client.get_run(mlflow_run_id).info
    base = f"{uri.rstrip('/')}/#"
    return (
        f"[MLflow run]({base}/experiments/{run.experiment_id}/runs/{mlflow_run_id}), "
        f"[version {version.version}]({base}/models/{version.name}/versions/{version.version}) "
        f"of the model, files in `{artifact_address(run.artifact_uri)}`"
    )


def artifact_address(uri: str) -> str:
    """Where artifacts really lie, if this machine knows the store behind a server that proxies."""
    store = os.environ.get("MLFLOW_ARTIFACTS_DESTINATION")
    address = urlsplit(uri)
    return f"{store}{address.path}" if store and address.scheme == "mlflow-artifacts" else uri


def score_rows(scores: Scores) -> list[tuple[str, float, str, str]]:
    """Name, score, floor and meaning, in order; floors hold for as many images alone.

    The shares of the ten digits are left to MLflow.
    """
    floor = load_floors()
    floors = floor.metrics() if floor.num_samples == scores.num_samples else {}
    return [
        (name, value, f"{floors[name]:.4f}" if name in floors else "", explain(name).meaning)
        for name, value in scores.metrics().items()
        if not name.startswith("digit_share")
    ]
