"""Registered versions: finding one, fetching its bundle, and what is known of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import mlflow
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from prefect import task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.runtime import flow_run

from gan.bundle import bundle_digest
from gan.errors import UserError
from gan.evaluation.scores import Scores
from tasks.registry import MODEL_NAME
from tasks.reporting import champion_scores, score_table
from tasks.tracking import EXPERIMENT, flow_run_url


class VersionError(UserError):
    """There is no such version, or its files are not what was registered."""


@dataclass(frozen=True, kw_only=True)
class FetchedVersion:
    """A registered version with its bundle on this machine's disk."""

    version: int
    bundle: Path
    recipe: str


@task(name="fetch version", cache_policy=NO_CACHE)
def fetch_version(version: int | str, folder: Path) -> FetchedVersion:
    """Download the bundle of a version, given by number or alias, into `folder`.

    Raises:
        VersionError: there is none, or the downloaded bundle is another than was registered.
    """
    found = find_version(MlflowClient(), version)
    folder.mkdir(parents=True, exist_ok=True)
    bundle = Path(
        mlflow.artifacts.download_artifacts(
            f"models:/{MODEL_NAME}/{found.version}/artifacts/bundle", dst_path=str(folder)
        )
    )
    if bundle_digest(bundle) != found.tags.get("bundle"):
        raise VersionError(f"version {found.version} is not the bundle that was registered")
    return FetchedVersion(
        version=int(found.version), bundle=bundle, recipe=found.tags.get("recipe", "")
    )


def find_version(client: MlflowClient, version: int | str) -> ModelVersion:
    """A version by number or alias.

    Raises:
        VersionError: there is none; says which there are.
    """
    try:
        if isinstance(version, str):
            version = client.get_model_version_by_alias(MODEL_NAME, version).version
        return client.get_model_version(MODEL_NAME, str(version))
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        known = client.search_model_versions(f"name = '{MODEL_NAME}'")
        numbers = ", ".join(map(str, sorted(int(each.version) for each in known))) or "none"
        raise VersionError(
            f"{MODEL_NAME} has no version or alias {version!r}; its versions: {numbers}"
        ) from None


@contextmanager
def evaluation_run(version: FetchedVersion) -> Iterator[str]:
    """Keep an MLflow run open for scores of a version; gives its id."""
    mlflow.set_experiment(EXPERIMENT)
    name = f"version {version.version}, scored again"
    with mlflow.start_run(run_name=name) as run:
        mlflow.set_tags(
            {
                "recipe": version.recipe,
                "model_version": str(version.version),
                "prefect_flow_run_id": flow_run.get_id() or "",
                "prefect_flow_run_url": flow_run_url(),
            }
        )
        yield run.info.run_id


@task(name="report scores", cache_policy=NO_CACHE)
def report_scores(version: FetchedVersion, scores: Scores) -> None:
    """Print a version's scores, and leave them as an artifact of the flow run."""
    champion = champion_scores(MlflowClient(), scores)
    title = f"{MODEL_NAME} version {version.version}"
    page = f"""# {title}

{scores.num_samples:,} drawn images, judged by {scores.judge}.

{score_table(scores, champion)}
"""
    print(page)  # noqa: T201
    create_markdown_artifact(markdown=page, key="scores", description=title)
