"""What MLflow is told of scores, on SQLite."""

from pathlib import Path

from mlflow import MlflowClient

from tasks.evaluation import _log
from tasks.tracking import EXPERIMENT
from tests.mlflow_store import mlflow_store, new_run


def test_mlflow_shows_the_scores_of_the_last_judging_each_once(tmp_path: Path) -> None:
    """As where a run is resumed with another number of images, and once more with the same."""
    with mlflow_store(tmp_path, EXPERIMENT):
        run_id, client = new_run(EXPERIMENT), MlflowClient()
        for distance, num_samples in ((1.75, 200), (0.3, 10_000), (0.3, 10_000)):
            _log(run_id, {"frechet_distance": distance, "digit_share_1": 0.1}, num_samples)
        run = client.get_run(run_id).data
        assert run.metrics == {"frechet_distance": 0.3}
        assert run.tags["num_samples"] == "10000"
        assert len(client.get_metric_history(run_id, "frechet_distance")) == 2
