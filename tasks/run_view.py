"""How MLflow's pages show the runs without set-up: the view "Scores", among those that it saves.

MLflow 3.17 keeps a saved view in a tag of the experiment, for everybody; its menu Views lists them.
"""

from __future__ import annotations

import json
from typing import Any

from mlflow import MlflowClient

NAME = "Scores"
TAG = "mlflow.sharedViewState.scores"
QUERY = "viewStateShareKey=scores&workflowType=machine_learning"
"""Opens the view at the address of an experiment's runs."""

METRICS = ("frechet_distance", "two_sample_10k", "digit_as_asked", "coverage")
PARAMETERS = ("recipe", "epochs", "batch_size", "learning_rate", "seed")
SECTIONS = ("Curves", "Digits", "Scores")
"""MLflow sorts them by name."""


def save_view(client: MlflowClient, experiment_id: str) -> None:
    """Save the view if it is not there, or another than this."""
    state = {
        "orderByKey": "metrics.`frechet_distance`",
        "orderByAsc": True,
        "selectedColumns": [
            "attributes.`Duration`",
            *(f"metrics.`{name}`" for name in METRICS),
            *(f"params.`{name}`" for name in PARAMETERS),
        ],
        "compareRunSections": [
            {"uuid": name, "name": name, "display": True, "isReordered": False, "deleted": False}
            for name in SECTIONS
        ],
        "compareRunCharts": [
            _chart("LINE", "Curves", metricKey="d_loss", selectedMetricKeys=["d_loss", "g_loss"]),
            _chart("LINE", "Curves", metricKey="d_real", selectedMetricKeys=["d_real", "d_fake"]),
            _chart("IMAGE", "Digits", imageKeys=["samples"], step=0),
            _chart("BAR", "Scores", metricKey="frechet_distance"),
            _chart("BAR", "Scores", metricKey="two_sample_10k"),
            _chart(
                "PARALLEL",
                "Scores",
                selectedParams=["epochs", "batch_size", "learning_rate", "r1_gamma"],
                selectedMetrics=["frechet_distance"],
                showAllRuns=True,
            ),
        ],
    }
    view = json.dumps({"name": NAME, "createdAt": 0, "state": json.dumps(state)})
    if client.get_experiment(experiment_id).tags.get(TAG) != view:
        client.set_experiment_tag(experiment_id, TAG, view)


def _chart(kind: str, section: str, **shown: Any) -> dict[str, Any]:
    return {
        "type": kind,
        "uuid": " ".join([kind, *map(str, shown.values())]),
        "metricSectionId": section,
        "runsCountToCompare": 10,
        "deleted": False,
        "isGenerated": False,
        **shown,
    }
