"""Which MLflow store the code under test finds."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import mlflow
import pytest
from mlflow import MlflowClient


@contextmanager
def mlflow_store(folder: Path, experiment: str | None = None) -> Iterator[None]:
    """Let this process and its children use an MLflow store in a folder, for a while.

    An experiment, if named, is made and set; its artifacts lie beside the database.

    The address is set as a user does, by ``MLFLOW_TRACKING_URI``: ``mlflow.set_tracking_uri``
    counts more than the variable, so whatever is "restored" with it hides the variable from all
    tests that follow, and they write to a store that they do not know of.
    """
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
        try:
            if experiment:
                mlflow.create_experiment(experiment, artifact_location=str(folder / "artifacts"))
                mlflow.set_experiment(experiment)
            yield
        finally:
            mlflow.set_tracking_uri(None)  # a trial of a sweep sets it


def new_run(experiment: str, **tags: str) -> str:
    """A run in an experiment of the store; gives its id."""
    experiment_id = mlflow.set_experiment(experiment).experiment_id
    return MlflowClient().create_run(experiment_id, tags=tags).info.run_id
