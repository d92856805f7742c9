"""Judging as a step: a bundle in, scores beside their floors out."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import Metric
from prefect import task
from prefect.cache_policies import NO_CACHE

from gan.bundle import load_bundle
from gan.data import load_mnist
from gan.evaluation.scores import Scores, draws_like, evaluate
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
    seed: int = 0,
) -> Scores:
    """Score `num_samples` drawn images; leaves the scores in `folder` and in MLflow."""
    generator = load_bundle(bundle, device)
    data = load_mnist(dataset.folder, device)

    scores = evaluate(
        draws_like(generator, data.train.labels),
        data,
        num_samples=num_samples,
        seed=seed,
        device=device,
        cache=dataset.folder.parent,
    )
    (folder / "scores.json").write_text(json.dumps(asdict(scores), indent=2) + "\n")
    client = MlflowClient()
    now = int(time.time() * 1000)
    # The shares of the ten digits stay in the file: in MLflow's pages they would push aside what
    # tells more. A run that is taken up again may have the others already.
    known = client.get_run(mlflow_run_id).data.metrics
    metrics = [
        Metric(name, value, now, 0)
        for name, value in scores.metrics().items()
        if not name.startswith("digit_share") and name not in known
    ]
    client.log_batch(mlflow_run_id, metrics=metrics)
    client.set_tag(mlflow_run_id, "num_samples", num_samples)
    client.log_artifact(mlflow_run_id, str(folder / "scores.json"))
    return scores
