"""Judging as a step: a bundle in, scores beside their floors out."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import Metric
from PIL import Image
from prefect import task
from prefect.cache_policies import NO_CACHE

from gan.bundle import load_bundle
from gan.data import Mnist, load_mnist
from gan.evaluation.examination import examine
from gan.evaluation.scores import Draw, Scores, draws_like, evaluate
from gan.sampling import tile
from tasks.data import DatasetRef


@task(name="evaluate", cache_policy=NO_CACHE)
def evaluate_generator(
    bundle: Path,
    dataset: DatasetRef,
    device: str,
    mlflow_run_id: str,
    folder: Path,
    *,
    num_samples: int,
) -> Scores:
    """Score `num_samples` drawn images; leaves the scores in `folder` and in MLflow."""
    draw, data = _open(bundle, dataset, device)
    scores = evaluate(
        draw, data, num_samples=num_samples, device=device, cache=dataset.folder.parent
    )
    (folder / "scores.json").write_text(json.dumps(asdict(scores), indent=2) + "\n")
    _log(mlflow_run_id, scores.metrics(), num_samples, folder / "scores.json")
    return scores


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What a close look at a generator found, in numbers."""

    num_draws: int
    num_samples: int
    """Drawings scored in each draw."""
    means: Mapping[str, float]
    """Every score by its name."""
    deviations: Mapping[str, float]
    """Standard deviations of those that several draws have; nothing for a single draw."""


@task(name="examine", cache_policy=NO_CACHE)
def examine_generator(
    bundle: Path,
    dataset: DatasetRef,
    device: str,
    mlflow_run_id: str,
    folder: Path,
    *,
    num_samples: int,
    num_draws: int,
    seed: int,
) -> Findings:
    """Look closely at a generator; leaves `examination.json` and `suspicious.png` in `folder` and
    in MLflow: all scores, and the hundred drawings that look least real.
    """
    draw, data = _open(bundle, dataset, device)
    found = examine(
        draw,
        data,
        num_samples=num_samples,
        num_draws=num_draws,
        seed=seed,
        device=device,
        cache=dataset.folder.parent,
    )
    findings = Findings(
        num_draws=num_draws,
        num_samples=num_samples,
        means=found.means(),
        deviations=found.deviations(),
    )
    Image.fromarray(tile(found.suspicious, columns=10).numpy()).save(folder / "suspicious.png")
    content = {**asdict(findings), "seed": seed, "scores": [asdict(each) for each in found.scores]}
    (folder / "examination.json").write_text(json.dumps(content, indent=2) + "\n")
    _log(
        mlflow_run_id,
        findings.means,
        num_samples,
        folder / "examination.json",
        folder / "suspicious.png",
    )
    return findings


def _open(bundle: Path, dataset: DatasetRef, device: str) -> tuple[Draw, Mnist]:
    """How the bundle's generator draws, and the real images to compare with."""
    data = load_mnist(dataset.folder, device)
    return draws_like(load_bundle(bundle, device), data.train.labels), data


def _log(mlflow_run_id: str, scores: Mapping[str, float], num_samples: int, *files: Path) -> None:
    client = MlflowClient()
    now = int(time.time() * 1000)
    # The shares of the ten digits stay in the file: in MLflow's pages they would push aside what
    # tells more. A run that is taken up again may have the others already; where they differ, as
    # those of fewer images do, MLflow shows the later.
    known = client.get_run(mlflow_run_id).data.metrics
    metrics = [
        Metric(name, value, now, 0)
        for name, value in scores.items()
        if not name.startswith("digit_share") and known.get(name) != value
    ]
    client.log_batch(mlflow_run_id, metrics=metrics)
    client.set_tag(mlflow_run_id, "num_samples", num_samples)
    for file in files:
        client.log_artifact(mlflow_run_id, str(file))
