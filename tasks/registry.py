"""Registering: the bundle becomes the next version of the generator in MLflow's registry."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version as installed
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.models import Model, ModelSignature
from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema, TensorSpec
from prefect import task
from prefect.cache_policies import NO_CACHE

import gan
from gan.evaluation.scores import Scores
from gan.sampling import ANY_DIGIT
from tasks.training import TrainedGenerator

MODEL_NAME = "mnist-gan-generator"
SIGNATURE = ModelSignature(
    inputs=Schema([ColSpec(DataType.long, "digit")]),
    outputs=Schema([TensorSpec(np.dtype(np.uint8), (-1, 28, 28))]),
    params=ParamSchema([ParamSpec("num", DataType.long, 1), ParamSpec("seed", DataType.long, 0)]),
)

REQUIREMENTS = ("mlflow", "numpy", "pandas", "safetensors", "torch")
"""What the registered model needs besides the package gan, which travels with it."""
TAGS_OF_THE_RUN = ("recipe", "judge", "dataset_digest", "git_commit", "prefect_flow_run_id")


@dataclass(frozen=True, kw_only=True)
class RegisteredVersion:
    """A version in the registry."""

    name: str
    version: int
    alias: str
    """The alias that it got: champion or challenger."""


@task(name="register", cache_policy=NO_CACHE)
def register_generator(
    trained: TrainedGenerator, scores: Scores, mlflow_run_id: str
) -> RegisteredVersion:
    """Log the bundle as a model of the run and register it, once a run.

    The registry's first version becomes champion, later ones challenger.
    """
    client = MlflowClient()
    version = find_version(client, mlflow_run_id) or _register(trained, scores, mlflow_run_id)
    aliases = client.get_registered_model(MODEL_NAME).aliases
    alias = "champion" if aliases.get("champion") in (None, version.version) else "challenger"
    client.set_registered_model_alias(MODEL_NAME, alias, version.version)
    return RegisteredVersion(name=MODEL_NAME, version=int(version.version), alias=alias)


def find_version(client: MlflowClient, mlflow_run_id: str) -> ModelVersion | None:
    """The version that this run registered, if it did."""
    query = f"name = '{MODEL_NAME}' and run_id = '{mlflow_run_id}'"
    return next(iter(client.search_model_versions(query, max_results=1)), None)


def _register(trained: TrainedGenerator, scores: Scores, mlflow_run_id: str) -> ModelVersion:
    run = MlflowClient().get_run(mlflow_run_id)
    model = Model.log(
        artifact_path=None,
        name="generator",
        flavor=mlflow.pyfunc,
        run_id=mlflow_run_id,
        python_model=str(Path(__file__).with_name("generator_model.py")),
        artifacts={"bundle": str(trained.bundle)},
        code_paths=[str(Path(gan.__file__).parent)],
        signature=SIGNATURE,
        input_example=(pd.DataFrame({"digit": [ANY_DIGIT]}), {"num": 1, "seed": 0}),
        pip_requirements=[f"{name}=={installed(name)}" for name in REQUIREMENTS],
    )
    noted = {name: run.data.tags[name] for name in TAGS_OF_THE_RUN}
    scored = {name: f"{value:.4f}" for name, value in scores.metrics().items()}
    tags = noted | scored | {"num_samples": str(scores.num_samples), "bundle": trained.digest}
    return mlflow.register_model(model.model_uri, MODEL_NAME, tags=tags)
