"""One MLflow run a flow run, and what is written down in it at its start."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlflow
import torch
from filelock import FileLock
from mlflow import MlflowClient
from prefect import Flow, runtime
from prefect.client.schemas.objects import FlowRun, State
from prefect.settings import PREFECT_UI_URL

from gan.bundle import name_architecture
from gan.config import TrainConfig
from gan.evaluation.judge import JUDGE_ID
from tasks.data import DatasetRef

EXPERIMENT = "mnist-gan"


@contextmanager
def tracked_run(
    config: TrainConfig, dataset: DatasetRef, device: str, runs_dir: Path
) -> Iterator[str]:
    """Keep one MLflow run open; gives its id. An exception inside ends it as FAILED.

    A flow run that is taken up again goes on in the MLflow run that it had.

    Written down at once: every parameter of the config, what the run stands on (data, judge,
    commit, library versions, device) and the Prefect flow run it belongs to.
    """
    # Two processes that create the local database at the same time would spoil each other's.
    with FileLock(runs_dir / ".mlflow.lock"):
        mlflow.set_experiment(EXPERIMENT)
    flow_run_id = runtime.flow_run.get_id()
    known = find_run(flow_run_id) if flow_run_id else None
    with mlflow.start_run(known, run_name=describe(config), log_system_metrics=True) as run:
        mlflow.log_params(flat_parameters(config))
        mlflow.set_tags(
            {
                "recipe": config.recipe,
                "dataset_digest": dataset.digest,
                "judge": JUDGE_ID,
                "git_commit": git_commit(),
                "device": device,
                "cpu": platform.processor() or platform.machine(),
                "threads": str(torch.get_num_threads()),
                "python": platform.python_version(),
                "torch": torch.__version__,
                "mlflow": mlflow.__version__,
                "prefect_flow_run_id": flow_run_id or "",
                "prefect_flow_run_name": runtime.flow_run.get_name() or "",
                "prefect_flow_run_url": flow_run_url(),
            }
        )
        yield run.info.run_id


def find_run(flow_run_id: str) -> str | None:
    """The MLflow run of a flow run, if it has one yet."""
    runs = mlflow.search_runs(
        experiment_names=[EXPERIMENT],
        filter_string=f"tags.prefect_flow_run_id = '{flow_run_id}'",
        max_results=1,
        output_format="list",
    )
    return runs[0].info.run_id if runs else None


def end_tracking(flow: Flow[..., Any], flow_run: FlowRun, state: State[Any]) -> None:
    """A hook for flow runs that are cancelled or crash: their MLflow run counts as killed."""
    if run_id := find_run(str(flow_run.id)):
        MlflowClient().set_terminated(run_id, "KILLED")


def describe(config: TrainConfig) -> str:
    """A run's name: what it does, in a few words."""
    epochs = "1 epoch" if config.epochs == 1 else f"{config.epochs} epochs"
    return f"{config.recipe}, {epochs}, seed {config.seed}"


def flat_parameters(config: TrainConfig) -> dict[str, object]:
    """Every field of the config by its own name, the networks' fields among them."""
    fields = asdict(config)
    architecture = name_architecture(config.networks)
    return {"architecture": architecture, **fields.pop("networks"), **fields}


def git_commit() -> str:
    """The commit of this code, with `-dirty` behind it if files differ from it; or `unknown`."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def flow_run_url() -> str:
    """The flow run's page, or nothing where no lasting server has one."""
    base, flow_run_id = PREFECT_UI_URL.value(), runtime.flow_run.get_id()
    return f"{base}/runs/flow-run/{flow_run_id}" if base and flow_run_id else ""
