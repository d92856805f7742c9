"""Registering: the bundle becomes the next version of the generator in MLflow's registry."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from importlib.metadata import version as installed
from pathlib import Path
from tempfile import TemporaryDirectory

import mlflow
import numpy as np
import pandas as pd
import psutil
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature
from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema, TensorSpec
from prefect import task
from prefect.cache_policies import NO_CACHE

import gan
from gan.bundle import PRETRAINED, verify_bundle
from gan.errors import UserError
from gan.evaluation.scores import Scores
from gan.sampling import ANY_DIGIT
from tasks.pulling import collect, in_registry, place
from tasks.services import ServiceError, find_silent_service
from tasks.tracking import MODEL_NAME
from tasks.training import TrainedGenerator

SIGNATURE = ModelSignature(
    inputs=Schema([ColSpec(DataType.long, "digit")]),
    outputs=Schema([TensorSpec(np.dtype(np.uint8), (-1, 28, 28))]),
    params=ParamSchema(
        [
            ParamSpec("num", DataType.long, 1),
            ParamSpec("seed", DataType.long, 0),
            ParamSpec("format", DataType.string, "array"),
        ]
    ),
)
"""What the model takes, and gives unless PNGs are asked for."""
REQUIREMENTS = ("mlflow", "numpy", "pandas", "pillow", "safetensors", "torch")
"""What the registered model needs besides the package gan, which travels with it."""
TAGS_OF_THE_RUN = ("recipe", "judge", "dataset_digest", "git_commit", "prefect_flow_run_id")


class RegistryError(UserError):
    """The registry's files are not those that were registered."""


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
    """Log the bundle as a model of the run and register it: one version a run.

    It stays one if the same run registers again, or in two processes at once; the folder then
    holds the bundle that is registered. While there is no champion, the oldest version whose files
    are whole becomes it; any other becomes challenger.

    Raises:
        RegistryError: the files that MLflow kept are not whole.
        ServiceError: MLflow, or where it keeps files, went away.
    """
    client = MlflowClient()
    if not _find_versions(client, mlflow_run_id):
        _forget_models(client, mlflow_run_id)
        model_uri = _log_model(trained, mlflow_run_id)
        _verify_files(model_uri, trained.digest)
        tags = _describe(client, trained, scores, mlflow_run_id)
        os.sync()  # the power may fail, and with a version its files must be there
        mlflow.register_model(model_uri, MODEL_NAME, tags=tags)
    version = keep_first_version(client, mlflow_run_id)
    alias = _give_alias(client, version)
    if version.tags.get("bundle") != trained.digest:
        # What is registered stands, though other code or another number of threads packed again.
        place(collect(in_registry(version.version)), trained.bundle)
    return RegisteredVersion(name=MODEL_NAME, version=int(version.version), alias=alias)


def keep_first_version(client: MlflowClient, mlflow_run_id: str) -> ModelVersion:
    """Delete all versions of a run but the first, which it gives.

    A version's number is larger than that of any earlier one. So of all processes that register
    the same run at once, each sees the lowest number once it has one of its own.
    """
    first, *surplus = _find_versions(client, mlflow_run_id)
    for version in surplus:
        try:
            client.delete_model_version(MODEL_NAME, version.version)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":  # another process was faster
                raise
    return first


def _find_versions(client: MlflowClient, mlflow_run_id: str | None = None) -> list[ModelVersion]:
    """The generator's versions, or a run's among them, the oldest first."""
    of_the_run = f" and run_id = '{mlflow_run_id}'" if mlflow_run_id else ""
    found = client.search_model_versions(f"name = '{MODEL_NAME}'{of_the_run}")
    return sorted(found, key=lambda version: int(version.version))


def _give_alias(client: MlflowClient, version: ModelVersion) -> str:
    """Make the oldest whole version champion if there is none, and another one challenger."""
    champion = client.get_registered_model(MODEL_NAME).aliases.get("champion")
    if champion is None:
        # Not simply this one: two first trainings that get here at once must choose alike.
        for oldest in _find_versions(client):
            try:
                _set_alias(client, "champion", oldest)
            except RegistryError:
                if oldest.version == version.version:
                    raise
            else:
                champion = oldest.version
                break
    if int(champion) == int(version.version):
        return "champion"
    _set_alias(client, "challenger", version)
    return "challenger"


def _set_alias(client: MlflowClient, alias: str, version: ModelVersion) -> None:
    tags = client.get_model_version(MODEL_NAME, version.version).tags
    _verify_files(f"models:/{MODEL_NAME}/{version.version}", tags.get("bundle", ""))
    try:
        client.set_registered_model_alias(MODEL_NAME, alias, version.version)
    except MlflowException as error:
        if error.error_code != "BAD_REQUEST":
            raise
        # Another process made the alias in the same moment. Now it is there, and can be moved.
        client.set_registered_model_alias(MODEL_NAME, alias, version.version)


def _forget_models(client: MlflowClient, mlflow_run_id: str) -> None:
    """Delete what an earlier start logged without coming to register it; it may be half there."""
    began_ms = psutil.Process().create_time() * 1000
    experiment_id = client.get_run(mlflow_run_id).info.experiment_id
    for model in client.search_logged_models(
        [experiment_id], filter_string=f"source_run_id = '{mlflow_run_id}'"
    ):
        if model.creation_timestamp < began_ms:  # the others may be of one that registers now
            client.delete_logged_model(model.model_id)


def _log_model(trained: TrainedGenerator, mlflow_run_id: str) -> str:
    with TemporaryDirectory() as scratch:
        # Without the generator that comes with the package: a version has its own.
        code = shutil.copytree(
            Path(gan.__file__).parent,
            Path(scratch) / "gan",
            ignore=shutil.ignore_patterns("__pycache__", PRETRAINED.name),
        )
        model = Model.log(
            artifact_path=None,
            name="generator",
            flavor=mlflow.pyfunc,
            run_id=mlflow_run_id,
            python_model=str(Path(__file__).with_name("generator_model.py")),
            artifacts={"bundle": str(trained.bundle)},
            code_paths=[str(code)],
            signature=SIGNATURE,
            input_example=(pd.DataFrame({"digit": [ANY_DIGIT]}), {"num": 1, "seed": 0}),
            pip_requirements=[f"{name}=={installed(name)}" for name in REQUIREMENTS],
        )
    return str(model.model_uri)


def _describe(
    client: MlflowClient, trained: TrainedGenerator, scores: Scores, mlflow_run_id: str
) -> dict[str, str]:
    """What the version's tags say."""
    run = client.get_run(mlflow_run_id).data
    return {
        **{name: run.tags[name] for name in TAGS_OF_THE_RUN},
        "seed": run.params["seed"],
        **{name: f"{value:.4f}" for name, value in scores.metrics().items()},
        "num_samples": str(scores.num_samples),
        "bundle": trained.digest,
    }


def _verify_files(model_uri: str, digest: str) -> None:
    """See that MLflow gives back what it was given."""
    with TemporaryDirectory() as folder:
        try:
            model = mlflow.artifacts.download_artifacts(model_uri, dst_path=folder)
            known = verify_bundle(Path(model) / "artifacts" / "bundle")
        except (MlflowException, OSError, UserError) as error:
            if away := find_silent_service():
                raise ServiceError(away) from error
            raise RegistryError(f"the files of {model_uri} are not whole: {error}") from error
    if known != digest:
        raise RegistryError(f"the files of {model_uri} are not the bundle that was registered")
