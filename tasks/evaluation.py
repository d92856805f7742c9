"""Judging as a step: a bundle in, scores beside their floors out."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path

import torch
from mlflow import MlflowClient
from mlflow.entities import Metric
from prefect import task
from prefect.cache_policies import NO_CACHE
from torch import Tensor

from gan.bundle import load_bundle
from gan.data import load_mnist
from gan.evaluation.scores import Scores, evaluate
from gan.sampling import ANY_DIGIT, draw
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

    def draw_like_the_data(num: int, seed: int) -> tuple[Tensor, Tensor | None]:
        if generator.config.num_classes == 0:
            return draw(generator, [ANY_DIGIT], num=num, seed=seed), None
        # Digits as often as in the training set: real digits are not equally frequent.
        rng = torch.Generator().manual_seed(seed)
        labels = data.train.labels.cpu()
        asked = labels[torch.randint(len(labels), (num,), generator=rng)]
        return draw(generator, asked, seed=seed), asked

    scores = evaluate(
        draw_like_the_data,
        data,
        num_samples=num_samples,
        seed=seed,
        device=device,
        cache=dataset.folder.parent,
    )
    (folder / "scores.json").write_text(json.dumps(asdict(scores), indent=2) + "\n")
    client = MlflowClient()
    now = int(time.time() * 1000)
    metrics = [Metric(name, value, now, 0) for name, value in scores.metrics().items()]
    client.log_batch(mlflow_run_id, metrics=metrics)
    client.set_tag(mlflow_run_id, "num_samples", num_samples)
    client.log_artifact(mlflow_run_id, str(folder / "scores.json"))
    return scores
