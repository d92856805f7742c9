"""One MLflow run a flow run, and what is written down in it at its start."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import mlflow
import torch
from filelock import FileLock
from prefect.runtime import flow_run
from prefect.settings import PREFECT_UI_URL

from gan.bundle import ARCHITECTURES
from gan.config import TrainConfig
from gan.evaluation.judge import JUDGE_ID
from tasks.data import DatasetRef

EXPERIMENT = "mnist-gan"


@contextmanager
def tracked_run(
    config: TrainConfig, dataset: DatasetRef, device: str, runs_dir: Path
) -> Iterator[str]:
    """Keep one MLflow run open; gives its id. An exception inside ends it as FAILED.

    Written down at once: every parameter of the config, what the run stands on (data, judge,
    commit, library versions, device) and the Prefect flow run it belongs to.
    """
    # Two processes that create the local database at the same time would spoil each other's.
    with FileLock(runs_dir / ".mlflow.lock"):
        mlflow.set_experiment(EXPERIMENT)
    with mlflow.start_run(run_name=describe(config), log_system_metrics=True) as run:
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
                "prefect_flow_run_id": flow_run.get_id() or "",
                "prefect_flow_run_name": flow_run.get_name() or "",
                "prefect_flow_run_url": flow_run_url(),
            }
        )
        yield run.info.run_id


def describe(config: TrainConfig) -> str:
    """A run's name: what it does, in a few words."""
    epochs = "1 epoch" if config.epochs == 1 else f"{config.epochs} epochs"
    return f"{config.recipe}, {epochs}, seed {config.seed}"


def flat_parameters(config: TrainConfig) -> dict[str, object]:
    """Every field of the config by its own name, the networks' fields among them."""
    fields = asdict(config)
    architecture = next(k for k, v in ARCHITECTURES.items() if isinstance(config.networks, v))
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
    base, flow_run_id = PREFECT_UI_URL.value(), flow_run.get_id()
    return f"{base}/runs/flow-run/{flow_run_id}" if base and flow_run_id else ""
