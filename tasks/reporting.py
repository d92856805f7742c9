"""What a run ends with: its scores beside their floors, for the terminal and for Prefect's page."""

from __future__ import annotations

import base64
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import mlflow
from mlflow import MlflowClient
from mlflow.utils.mlflow_tags import MLFLOW_RUN_NOTE
from prefect import task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE

from gan.config import TrainConfig
from gan.evaluation.judge import JUDGE_ID
from gan.evaluation.scores import Scores, metric_rows, score_rows
from tasks.aliases import find_holders
from tasks.evaluation import Findings
from tasks.pages import is_web_address
from tasks.pictures import find_sheets
from tasks.promotion import Decision
from tasks.registry import RegisteredVersion
from tasks.run_view import QUERY
from tasks.services import without_password
from tasks.timeline import save_timeline
from tasks.tracking import MODEL_NAME, describe
from tasks.training import TrainedGenerator
from tasks.versions import FetchedVersion


@task(name="report", cache_policy=NO_CACHE)
def report(
    config: TrainConfig,
    trained: TrainedGenerator,
    scores: Scores,
    version: RegisteredVersion,
    decision: Decision,
    mlflow_run_id: str,
    folder: Path,
) -> None:
    """Draw the timeline, print the summary, and leave it as an artifact of the flow run."""
    if decision.promoted:
        version = replace(version, alias="champion")
    title = f"{describe(config)}: {version.name} version {version.version} (@{version.alias})"
    client = MlflowClient()
    champion = champion_scores(client, scores.judge, scores.num_samples)
    links = addresses(client, mlflow_run_id, version)
    timeline = save_timeline(config, scores, champion, links, folder)
    client.log_artifact(mlflow_run_id, str(timeline))
    experiment_id = client.get_run(mlflow_run_id).info.experiment_id
    description = note(scores, experiment_id, mlflow_run_id)
    client.set_tag(mlflow_run_id, MLFLOW_RUN_NOTE, description)
    print(summary(title, trained, scores, version, decision, mlflow_run_id, folder))  # noqa: T201
    create_markdown_artifact(
        markdown=page(title, scores, champion, links, find_sheets(folder)[-1]),
        key="generator",
        description=title,
    )


@task(name="report findings", cache_policy=NO_CACHE)
def report_findings(version: FetchedVersion, findings: Findings) -> None:
    """Print what was found of a version, and leave it as an artifact of the flow run."""
    champion = champion_scores(MlflowClient(), JUDGE_ID, findings.num_samples)
    title = f"{MODEL_NAME} version {version.version}"
    text = findings_page(title, findings, champion)
    print(text)  # noqa: T201
    create_markdown_artifact(markdown=text, key="scores", description=title)


def findings_page(title: str, findings: Findings, champion: dict[str, str]) -> str:
    """What was found, as markdown."""
    num = findings.num_draws
    draws = "one draw" if num == 1 else f"the mean of {num} draws, and its standard deviation"
    trained = "Adversaries and student" if "synthetic_accuracy" in findings.means else "Adversaries"
    rows = metric_rows(findings.means, JUDGE_ID, findings.num_samples)
    return f"""# {title}

{findings.num_samples:,} drawn images, judged by {JUDGE_ID}: {draws}.
{trained} were trained once, on one more draw.

{score_table(rows, champion, findings.deviations)}
"""


def summary(
    title: str,
    trained: TrainedGenerator,
    scores: Scores,
    version: RegisteredVersion,
    decision: Decision,
    mlflow_run_id: str,
    folder: Path,
) -> str:
    """The run in plain text: scores beside floors, where things are, what to type next."""
    rows = "\n".join(
        f"  {name:<28}{drawn:>9.4f}{real:>9}  {meaning}"
        for name, drawn, real, meaning in score_rows(scores)
    )
    since = f" since step {trained.taken_up_at:,}" if trained.taken_up_at else ""
    return f"""
{title}

  {f"{scores.num_samples:,} images, {scores.judge}":<28}{"drawn":>9}{"real":>9}
{rows}

  {"promoted" if decision.promoted else "not promoted"}: {decision.reason}

  trained    in {trained.seconds:,.0f} s, {trained.images_per_s:,.0f} images/s{since}
  timeline   {folder / "report.html"}
  pictures   {folder}: samples.png, progress.gif, losses.png, samples/
  bundle     {trained.bundle}
  MLflow     run {mlflow_run_id} in {without_password(mlflow.get_tracking_uri())}

Next:
  make ui                                   compare runs: experiment mnist-gan, menu Views, Scores
  mlflow.pyfunc.load_model("models:/{version.name}@{version.alias}")
"""


def page(
    title: str, scores: Scores, champion: dict[str, str], links: dict[str, str], sheet: Path
) -> str:
    """The run as markdown, with the last sample sheet inside."""
    stated = ", ".join(
        f"[{name}]({address})" if is_web_address(address) else f"{name}: `{address}`"
        for name, address in links.items()
    )
    picture = base64.b64encode(sheet.read_bytes()).decode()
    return f"""# {title}

![a hundred drawn digits](data:image/png;base64,{picture})

{stated}

{scores.num_samples:,} drawn images against the real test images, judged by {scores.judge}.
"champion": what the champion scored when it was registered. "real": what real training images
score in the place of drawn ones.

{score_table(score_rows(scores), champion)}
"""


def score_table(
    rows: Sequence[tuple[str, float, str, str]],
    champion: dict[str, str],
    deviations: Mapping[str, float] | None = None,
) -> str:
    """Rows of `metric_rows`, beside the champion's scores, as a markdown table."""
    spreads = {name: f" ± {value:.4f}" for name, value in (deviations or {}).items()}
    lines = (
        f"| {name} | {drawn:.4f}{spreads.get(name, '')} | {champion.get(name, '')} | {real} "
        f"| {meaning} |"
        for name, drawn, real, meaning in rows
    )
    return "\n".join(
        ["| score | drawn | champion | real | |", "| --- | --- | --- | --- | --- |", *lines]
    )


def champion_scores(client: MlflowClient, judge: str, num_samples: int) -> dict[str, str]:
    """The champion's scores as its tags say them; nothing where they do not compare, or where there
    is no champion: anybody may take that name away, or delete its version.
    """
    champion = find_holders(client).get("champion")
    if champion is None:
        return {}
    tags: dict[str, str] = client.get_model_version(MODEL_NAME, str(champion)).tags
    same = (tags.get("judge"), tags.get("num_samples")) == (judge, str(num_samples))
    return tags if same else {}


def addresses(
    client: MlflowClient, mlflow_run_id: str, version: RegisteredVersion
) -> dict[str, str]:
    """Where to see the run and the version, and where their files lie; by name."""
    run, uri = client.get_run(mlflow_run_id), without_password(mlflow.get_tracking_uri())
    found = {"MLflow run": f"{mlflow_run_id} in {uri}: make ui shows it"}
    if is_web_address(uri):
        base = f"{uri.rstrip('/')}/#"
        page = f"{base}/experiments/{run.info.experiment_id}/runs/{mlflow_run_id}"
        model = f"{base}/models/{version.name}/versions/{version.version}"
        # Without the workflow, MLflow shows the run among the evaluations of language models.
        found = {
            "timeline": f"{page}/artifacts/report.html?workflowType=machine_learning",
            "MLflow run": f"{page}?workflowType=machine_learning",
            f"version {version.version}": model,
            "all runs": f"{base}/experiments/{run.info.experiment_id}/runs?{QUERY}",
        }
    tags = client.get_model_version(version.name, str(version.version)).tags
    found["files"] = artifact_address(run.info.artifact_uri)
    elsewhere = {"S3": tags.get("s3"), "Prefect": run.data.tags.get("prefect_flow_run_url")}
    return found | {name: address for name, address in elsewhere.items() if address}


def note(scores: Scores, experiment_id: str, mlflow_run_id: str) -> str:
    """The run's description in MLflow: three lines are all that it shows of one."""
    return (
        f"Frechet distance **{scores.frechet_distance:.4f}**, {scores.num_samples:,} images, "
        f"judged by {scores.judge}.\n\nSee it learn: "
        f"[report.html](#/experiments/{experiment_id}/runs/{mlflow_run_id}/artifacts/report.html)"
    )


def artifact_address(uri: str) -> str:
    """Where artifacts really lie, if this machine knows the store behind a server that proxies."""
    store = os.environ.get("MLFLOW_ARTIFACTS_DESTINATION", "").rstrip("/")
    address = urlsplit(uri)
    proxied = store and address.scheme == "mlflow-artifacts"
    return without_password(f"{store}{address.path}" if proxied else uri)
