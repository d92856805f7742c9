import json

import mlflow
import pytest
from mlflow import MlflowClient

from tasks.run_view import TAG, save_view


@pytest.mark.usefixtures("registry")
def test_view_is_saved_once_and_an_older_one_replaced() -> None:
    client = MlflowClient()
    experiment = mlflow.set_experiment("seen").experiment_id
    client.set_experiment_tag(experiment, TAG, "older")
    save_view(client, experiment)
    saved = client.get_experiment(experiment).tags[TAG]
    save_view(client, experiment)
    assert client.get_experiment(experiment).tags[TAG] == saved
    view = json.loads(saved)
    assert view["name"] == "Scores"
    state = json.loads(view["state"])
    sections = {section["uuid"] for section in state["compareRunSections"]}
    assert {chart["metricSectionId"] for chart in state["compareRunCharts"]} == sections
    names = [chart["uuid"] for chart in state["compareRunCharts"]]
    assert len(names) == len(set(names))
