"""Packing: the bundle that training left bare gets its card, its picture and its ONNX file."""

from __future__ import annotations

import io
from dataclasses import replace

from mlflow import MlflowClient
from PIL import Image
from prefect import task
from prefect.cache_policies import NO_CACHE

from gan.bundle import CARD, ONNX, SAMPLES, load_bundle, save_bundle
from gan.config import TrainConfig
from gan.evaluation.scores import Scores
from gan.model_card import write_model_card
from gan.onnx_export import to_onnx
from gan.sampling import draw_sheet
from tasks.training import SHEET_SEED, TrainedGenerator

COMPUTED_BY = ("processor", "devices", "threads", "torch")
"""Tags of an MLflow run: other bytes may come of the same training where one of them differs."""


@task(name="pack", cache_policy=NO_CACHE)
def pack_generator(
    trained: TrainedGenerator, config: TrainConfig, scores: Scores, mlflow_run_id: str
) -> TrainedGenerator:
    """Complete the bundle in its place; gives what training gave, with the new digest.

    Data, commit and what computed are on the card as the MLflow run has them. Packing again
    changes nothing.

    Raises:
        BundleError: the bundle is not whole.
    """
    generator = load_bundle(trained.bundle)
    noted = MlflowClient().get_run(mlflow_run_id).data.tags
    card = write_model_card(
        config,
        scores,
        dataset_digest=noted["dataset_digest"],
        git_commit=noted["git_commit"],
        computed_by={name: noted[name] for name in COMPUTED_BY},
    )
    sheet = io.BytesIO()
    Image.fromarray(draw_sheet(generator, seed=SHEET_SEED).numpy()).save(sheet, "PNG")
    attachments = {CARD: card.encode(), SAMPLES: sheet.getvalue(), ONNX: to_onnx(generator)}
    return replace(trained, digest=save_bundle(generator, trained.bundle, attachments))
