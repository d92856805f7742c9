"""Training as a step: numbers and pictures to MLflow on the way, a bundle at the end."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd
import torch
from mlflow import MlflowClient
from mlflow.entities import Metric
from PIL import Image
from prefect import task
from prefect.cache_policies import NO_CACHE

from gan.bundle import save_bundle
from gan.config import TrainConfig
from gan.data import load_mnist
from gan.sampling import draw_sheet
from gan.training import Progress, TrainState, train
from tasks.data import DatasetRef
from tasks.pictures import plot_losses, save_animation
from tasks.progress import live_progress

SHEET_SEED = 0
"""The noise of the sample sheets: the same in every epoch of every run."""
CURVES = ("d_loss", "g_loss", "d_real", "d_fake", "images_per_s")


@dataclass(frozen=True, kw_only=True)
class TrainedGenerator:
    """What a training leaves behind."""

    bundle: Path
    digest: str
    """The bundle's sha256."""
    seconds: float
    """Wall time of the training, pictures and tracking included."""
    images_per_s: float
    """Real images a second, over the whole of it."""


@task(name="train", cache_policy=NO_CACHE)
def train_generator(
    config: TrainConfig, dataset: DatasetRef, device: str, mlflow_run_id: str, folder: Path
) -> TrainedGenerator:
    """Train a generator; leaves its bundle, history and pictures in `folder` and in MLflow."""
    client = MlflowClient()
    data = load_mnist(dataset.folder, device).train
    state = TrainState(config, torch.device(device))
    started = time.perf_counter()
    history: list[Progress] = []

    with live_progress(config.epochs) as show:
        for progress in train(state, data):
            show(progress)
            if not progress.epoch_done:
                continue
            history.append(progress)
            log_curves(client, mlflow_run_id, progress)
            if is_picture_epoch(progress.epoch, config.epochs):
                sheet = Image.fromarray(draw_sheet(state.sampler, seed=SHEET_SEED).numpy())
                path = folder / "samples" / f"epoch-{progress.epoch:04}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                sheet.save(path)
                client.log_image(mlflow_run_id, sheet, key="samples", step=progress.epoch)
    seconds = time.perf_counter() - started

    curves = pd.DataFrame(asdict(progress) for progress in history)
    curves.to_csv(folder / "history.csv", index=False)
    plot_losses(curves, folder / "losses.png")
    save_animation(sorted((folder / "samples").glob("*.png")), folder / "progress.gif")
    for artifact in ("history.csv", "losses.png", "progress.gif"):
        client.log_artifact(mlflow_run_id, str(folder / artifact))
    return TrainedGenerator(
        bundle=folder / "bundle",
        digest=save_bundle(state.sampler, folder / "bundle"),
        seconds=seconds,
        images_per_s=state.step * config.batch_size / seconds,
    )


def log_curves(client: MlflowClient, mlflow_run_id: str, progress: Progress) -> None:
    """Send one epoch's numbers to MLflow, in one request."""
    now = int(time.time() * 1000)
    metrics = [Metric(name, getattr(progress, name), now, progress.epoch) for name in CURVES]
    client.log_batch(mlflow_run_id, metrics=metrics)


def is_picture_epoch(epoch: int, epochs: int) -> bool:
    """Whether to draw a sheet: the first two, the last, and about twenty at even distances."""
    return epoch in (1, 2, epochs) or epoch % max(1, epochs // 20) == 0
