"""A stack that ends in the middle of a run."""

import signal
from pathlib import Path

import pytest
from prefect.client.schemas.objects import FlowRun

from deployments.stack import NUM_S3_PORTS
from tests.deployments.local_stack import LocalStack, wait_for

pytestmark = pytest.mark.slow

LONG = {"recipe": "vanilla", "epochs": 100_000, "num_samples": 200}


@pytest.mark.chaos
def test_second_start_finds_all_data_and_takes_the_run_up_again(
    stack: LocalStack, trained: FlowRun
) -> None:
    """Uses the stack that the other tests are done with."""
    before = {each.name: each.id for each in stack.prefect.read_deployments()}
    objects = stack.s3_objects()
    run = stack.prefect.create_flow_run_from_deployment(
        stack.deployment("default").id, parameters=LONG
    )
    wait_for(lambda: "train" in stack.tasks_of(run.id) or None, seconds=90, what="a training")
    assert stack.end(signal.SIGINT) == 130
    assert stack.processes() == []
    # Where the S3 store has its sockets by itself, another user's could not replace them.
    first = int(stack.variables["S3_PORT"])
    ports = range(first, first + NUM_S3_PORTS)
    assert [path for port in ports for path in Path("/tmp").glob(f"seaweedfs-*-{port}*")] == []

    stack.start().wait_until_ready()
    assert {each.name: each.id for each in stack.prefect.read_deployments()} == before
    assert stack.s3_objects().items() >= objects.items()
    (tracked,) = stack.tracked(trained.id)
    (version,) = stack.mlflow.search_model_versions(f"run_id = '{tracked.info.run_id}'")
    assert stack.mlflow.get_model_version_by_alias(version.name, "champion").version == "1"

    again = wait_for(
        lambda: stack.runs_of("default", "Running") or None, seconds=90, what="the run's return"
    )
    assert [each.id for each in again] == [run.id]
    assert again[0].run_count == 2
    wait_for(
        lambda: [r.info.status for r in stack.tracked(run.id)] == ["RUNNING"] or None,
        seconds=60,
        what="its MLflow run, the same as before",
    )
    stack.command("prefect", "flow-run", "cancel", str(run.id))
    assert stack.final_state(run.id).is_cancelled()
