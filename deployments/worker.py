"""The last process of the local stack: waits for the servers, deploys, becomes a worker."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import boto3
import httpx
import yaml
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitUpdate, WorkPoolCreate
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterState,
    FlowRunFilterStateType,
    WorkPoolFilter,
    WorkPoolFilterName,
)
from prefect.client.schemas.objects import State, StateType
from prefect.events.schemas.automations import AutomationCore
from prefect.states import AwaitingRetry, Cancelled, Crashed
from prefect.workers.process import ProcessWorker

from tasks.aliases import PROMOTION
from tasks.reconciliation import MAX_STARTS, complete_if_done, count_starts
from tasks.schedule import GPU

POOL = "gpu"
PATIENCE_S = 120
AUTOMATIONS = Path(__file__).with_name("automations.yaml")
UNDER_WAY = (StateType.PENDING, StateType.RUNNING, StateType.CANCELLING)


def is_s3_ready() -> bool:
    """Whether the store has its bucket and takes our keys."""
    once = Config(connect_timeout=2, read_timeout=5, retries={"total_max_attempts": 1})
    try:
        boto3.client("s3", config=once).head_bucket(Bucket=os.environ["STACK_BUCKET"])
    except (BotoCoreError, ClientError):
        return False
    return True


def answers(url: str) -> bool:
    """Whether a server says that it is well."""
    try:
        return httpx.get(url, timeout=5).is_success
    except httpx.TransportError:
        return False


def wait_until(ready: Callable[[], bool], name: str) -> None:
    """Wait for a server, or exit with a sentence."""
    deadline = time.monotonic() + PATIENCE_S
    while not ready():
        if time.monotonic() > deadline:
            log = Path(os.environ["STACK_FOLDER"]) / "logs" / f"{name}.log"
            sys.exit(f"{name} did not answer within {PATIENCE_S} s; its log: {log}")
        time.sleep(0.2)


def provide_pool(client: SyncPrefectClient) -> None:
    """Create or refresh the work pool, and the slots of which there is one each, and free."""
    pool = WorkPoolCreate(
        name=POOL,
        type="process",
        description="Runs flows on this machine, in a process each.",
        base_job_template=ProcessWorker.get_default_base_job_template(),
    )
    client.create_work_pool(pool, overwrite=True)
    for name in (GPU, PROMOTION):
        client.upsert_global_concurrency_limit_by_name(name, limit=1)
        client.update_global_concurrency_limit(name, GlobalConcurrencyLimitUpdate(active_slots=0))


def apply_automations(client: SyncPrefectClient) -> None:
    """Bring the server's automations in line with automations.yaml."""
    for wanted in yaml.safe_load(AUTOMATIONS.read_text()):
        automation = AutomationCore.model_validate(wanted)
        if known := client.read_automations_by_name(automation.name):
            client.update_automation(known[0].id, automation)
        else:
            client.create_automation(automation)


def take_up_runs(client: SyncPrefectClient) -> None:
    """Schedule the runs again that were under way when the stack ended the last time.

    Nobody else ends them: they would count as running for ever, and hold their deployment's slot.
    """
    broken = client.read_flow_runs(
        flow_run_filter=FlowRunFilter(
            state=FlowRunFilterState(type=FlowRunFilterStateType(any_=list(UNDER_WAY)))
        ),
        work_pool_filter=WorkPoolFilter(name=WorkPoolFilterName(any_=[POOL])),
    )
    for run in broken:
        if complete_if_done(client, run):
            continue
        state: State[None]
        if run.state_type == StateType.CANCELLING:
            state = Cancelled(message="The stack ended while this was being cancelled.")
        elif count_starts(client, run) >= MAX_STARTS:
            state = Crashed(message=f"The stack ended, and this was start {MAX_STARTS}.")
        else:
            state = AwaitingRetry(message="The stack ended while this ran.")
        client.set_flow_run_state(run.id, state)


def deploy() -> None:
    """Bring the server's deployments in line with prefect.yaml, or exit with what it refused."""
    # The pull step's variable is for the worker to resolve, when a run starts.
    environment = {k: v for k, v in os.environ.items() if k != "MNIST_GAN_ROOT"}
    command = ["prefect", "--no-prompt", "deploy", "--all"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"The deployments of prefect.yaml were refused:\n{done.stdout}{done.stderr}")


def main() -> None:
    """Wait, deploy, say where everything is, and go on as Prefect's worker."""
    prefect, mlflow = os.environ["PREFECT_API_URL"], os.environ["MLFLOW_TRACKING_URI"]
    wait_until(is_s3_ready, "s3")
    wait_until(lambda: answers(f"{prefect}/ready"), "prefect")
    wait_until(lambda: answers(f"{mlflow}/health"), "mlflow")
    with get_client(sync_client=True) as client:
        provide_pool(client)
        take_up_runs(client)
        apply_automations(client)
    deploy()
    activate = Path(os.environ["STACK_FOLDER"]) / "activate"
    if activate.is_relative_to(Path.cwd()):
        activate = activate.relative_to(Path.cwd())
    print(  # noqa: T201
        f"""
Prefect  {prefect.removesuffix("/api")}
MLflow   {mlflow}
S3       {os.environ["AWS_ENDPOINT_URL_S3"]}, bucket {os.environ["STACK_BUCKET"]}

In another terminal:
    . {activate}
    prefect deployment run train-gan/default --watch
Ctrl-C here ends all.
""",
        flush=True,
    )
    os.execvp("prefect", ["prefect", "worker", "start", "--pool", POOL, "--name", "local"])


if __name__ == "__main__":
    main()
