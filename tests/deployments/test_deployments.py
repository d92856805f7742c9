"""The deployments of prefect.yaml on the real stack: listed, scheduled, run, refused, cancelled."""

import json
import re
import socket
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psutil
import pytest
from prefect.client.schemas.actions import DeploymentScheduleCreate
from prefect.client.schemas.objects import FlowRun
from prefect.client.schemas.schedules import CronSchedule
from prefect.states import Scheduled

from deployments.stack import ROOT
from tests.deployments.conftest import TINY
from tests.deployments.local_stack import LocalStack, wait_for

pytestmark = pytest.mark.slow

ENDLESS = TINY | {"epochs": 100_000, "seed": None}


def test_deployments_carry_over_to_another_machine(stack: LocalStack) -> None:
    listed = stack.command("prefect", "deployment", "ls").stdout
    for name in ("train-gan/default", "train-gan/weekly", "sweep-gan/default"):
        assert name in listed
    for each in stack.prefect.read_deployments():
        assert each.work_pool_name == "gpu"
        assert each.description
        assert each.tags
        assert each.enforce_parameter_schema
        # Neither the path of this machine nor that of the worker is stored on the server.
        assert str(ROOT) not in json.dumps(each.pull_steps)
        assert re.fullmatch(r"flows\.\w+\.\w+", each.entrypoint or "")


def test_every_server_listens_on_the_loopback_alone(stack: LocalStack) -> None:
    assert stack.process
    ours = psutil.Process(stack.process.pid).children(recursive=True)
    listening = {
        connection.laddr
        for process in ours
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }
    named = {stack.variables[f"{name}_PORT"] for name in ("PREFECT_SERVER_API", "MLFLOW", "S3")}
    assert named <= {str(address.port) for address in listening}
    assert {address.ip for address in listening} == {"127.0.0.1"}


@pytest.mark.parametrize("name", ["default", "weekly"])
def test_training_runs_one_at_a_time(stack: LocalStack, name: str) -> None:
    limit = stack.deployment(name).global_concurrency_limit
    assert limit is not None
    assert limit.limit == 1
    assert stack.prefect.read_global_concurrency_limit_by_name("gpu").limit == 1


def test_server_lists_the_weekly_runs_to_come(stack: LocalStack) -> None:
    runs = wait_for(
        lambda: stack.runs_of("weekly", "Scheduled") or None, seconds=60, what="scheduled runs"
    )
    for run in runs:
        assert run.auto_scheduled
        assert run.parameters["seed"] is None
        start = run.expected_start_time
        assert start is not None
        assert (start.isoweekday(), start.hour, start.minute) == (7, 3, 0)
        assert start > datetime.now(UTC)


@pytest.mark.parametrize(
    ("parameter", "complaint"),
    [("epochs=0", "less than the minimum of 1"), ("recipe=best-ever", "'best-ever' is not")],
)
def test_wrong_parameter_is_refused_before_a_run_exists(
    stack: LocalStack, parameter: str, complaint: str
) -> None:
    before = len(stack.runs_of("default"))
    done = stack.command("prefect", "deployment", "run", "train-gan/default", "-p", parameter)
    assert done.returncode != 0
    assert complaint in " ".join(done.stdout.split())
    assert len(stack.runs_of("default")) == before


@pytest.fixture(scope="session")
def doomed(stack: LocalStack) -> dict[str, FlowRun]:
    """Two runs that must not train: one without its store, one that is hours late."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        nobody = f"http://127.0.0.1:{server.getsockname()[1]}"
    prefect = stack.prefect
    return {
        "no store": prefect.create_flow_run_from_deployment(
            stack.deployment("default").id,
            parameters=TINY,
            job_variables={"env": {"AWS_ENDPOINT_URL_S3": nobody}},
        ),
        "late": prefect.create_flow_run_from_deployment(
            stack.deployment("weekly").id,
            parameters=TINY,
            state=Scheduled(scheduled_time=datetime.now(UTC) - timedelta(days=3)),
        ),
    }


def test_unreachable_store_ends_the_run_before_any_training(
    stack: LocalStack, doomed: dict[str, FlowRun]
) -> None:
    run = doomed["no store"]
    state = stack.final_state(run.id)
    address = run.job_variables["env"]["AWS_ENDPOINT_URL_S3"] if run.job_variables else ""
    assert state.is_failed()
    assert f"S3 does not answer at {address}" in (state.message or "")
    assert stack.prefect.read_flow_run(run.id).total_run_time < timedelta(minutes=1)
    assert stack.tracked(run.id) == []


def test_start_that_is_days_late_is_dropped_with_a_reason(
    stack: LocalStack, doomed: dict[str, FlowRun]
) -> None:
    state = stack.final_state(doomed["late"].id)
    assert state.is_cancelled()
    assert "72.0 hours ago" in (state.message or "")
    assert stack.tracked(doomed["late"].id) == []


@pytest.fixture(scope="session")
def minute_ahead(stack: LocalStack, doomed: dict[str, FlowRun], trained: FlowRun) -> datetime:
    """A second schedule of the weekly deployment: a minute ahead, a training without an end.

    Half a minute is left at least: the server plans runs to come in its own time. It shall not
    compete with the other training for the slot.
    """
    assert trained.state is not None
    assert trained.state.is_final()
    for run in doomed.values():
        stack.final_state(run.id)
    start = (datetime.now(UTC) + timedelta(seconds=90)).replace(second=0, microsecond=0)
    weekly = stack.deployment("weekly").id
    schedule = DeploymentScheduleCreate(
        schedule=CronSchedule(cron=f"{start.minute} {start.hour} * * *", timezone="UTC"),
        parameters=ENDLESS,
    )
    stack.prefect.create_deployment_schedules(weekly, [schedule])
    return start


@pytest.mark.usefixtures("minute_ahead")
def test_run_completes_and_is_named_after_what_it_does(trained: FlowRun) -> None:
    assert trained.state is not None
    assert trained.state.is_completed()
    assert trained.name == "vanilla, 1 epoch, seed 7"


def test_prefect_and_mlflow_point_at_each_other(stack: LocalStack, trained: FlowRun) -> None:
    (run,) = stack.tracked(trained.id)
    assert run.info.status == "FINISHED"
    page = f"{stack.user['PREFECT_API_URL'].removesuffix('/api')}/runs/flow-run/{trained.id}"
    assert run.data.tags["prefect_flow_run_url"] == page
    (artifact,) = [
        artifact
        for artifact in stack.prefect.request("POST", "/artifacts/filter", json={}).json()
        if artifact["flow_run_id"] == str(trained.id) and artifact["key"] == "generator"
    ]
    assert run.info.run_id in artifact["data"]
    assert "data:image/png;base64," in artifact["data"]
    folder = f"mlflow/{run.info.experiment_id}/{run.info.run_id}/artifacts"
    assert f"s3://gan-models/{folder}" in artifact["data"]
    assert f"{folder}/scores.json" in stack.s3_objects()


def test_version_is_registered_and_its_files_lie_in_s3(stack: LocalStack, trained: FlowRun) -> None:
    (run,) = stack.tracked(trained.id)
    (version,) = stack.mlflow.search_model_versions(f"run_id = '{run.info.run_id}'")
    assert version.name == "mnist-gan-generator"
    assert version.tags["prefect_flow_run_id"] == str(trained.id)
    objects = stack.s3_objects()
    weights = [
        key
        for key in objects
        if key.startswith("mlflow/") and key.endswith("generator.safetensors")
    ]
    assert len(weights) == 1
    assert objects[weights[0]] > 100_000
    assert {key.split("/")[0] for key in objects} <= {"mlflow", "published"}


@pytest.mark.chaos
def test_keys_of_the_store_are_written_nowhere_else(stack: LocalStack, trained: FlowRun) -> None:
    """Not in a log, a database, an artifact, a parameter, nor in what lies in the store."""
    secret = stack.user["AWS_SECRET_ACCESS_KEY"].encode()
    theirs = {stack.folder / "s3-keys.json", stack.folder / "activate"}
    files = [path for path in stack.folder.parent.rglob("*") if path.is_file()]
    assert {".db", ".log", ".safetensors"} <= {path.suffix for path in files}
    assert [path for path in files if secret in path.read_bytes()] == sorted(
        theirs, key=files.index
    )


@pytest.fixture(scope="session")
def judged(stack: LocalStack, trained: FlowRun) -> dict[str, FlowRun]:
    """Version 1 scored again, and put up for promotion though it is champion."""
    parameters = {"version": 1, "num_samples": TINY["num_samples"]}
    runs = {}
    for flow in ("evaluate-generator", "promote-generator"):
        deployment = stack.prefect.read_deployment_by_name(f"{flow}/default")
        runs[flow] = stack.prefect.create_flow_run_from_deployment(
            deployment.id, parameters=parameters
        )
    return runs


def test_registered_version_is_scored_again_alike(
    stack: LocalStack, judged: dict[str, FlowRun]
) -> None:
    run_id = judged["evaluate-generator"].id
    assert stack.final_state(run_id).is_completed()
    (run,) = stack.tracked(run_id)
    assert run.data.tags["model_version"] == "1"
    version = stack.mlflow.get_model_version("mnist-gan-generator", "1")
    distance = float(version.tags["frechet_distance"])
    assert run.data.metrics["frechet_distance"] == pytest.approx(distance, rel=1e-3)


def test_champion_is_not_promoted_to_champion(
    stack: LocalStack, judged: dict[str, FlowRun]
) -> None:
    run_id = judged["promote-generator"].id
    assert stack.final_state(run_id).is_completed()
    assert stack.tracked(run_id) == [], "nothing needs to be scored for that"
    version = stack.mlflow.get_model_version_by_alias("mnist-gan-generator", "champion")
    assert version.version == "1"


def gan(stack: LocalStack, folder: Path, *words: str) -> str:
    """What a user types beside the stack, in a folder of their own; what it says."""
    script = "from flows.gan_command import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", script, *words],
        check=False,
        cwd=folder,
        env=stack.user | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.usefixtures("trained")
def test_published_version_is_pulled_from_the_store_and_the_registry(
    stack: LocalStack, tmp_path: Path
) -> None:
    address = "s3://gan-models/published"
    deployment = stack.prefect.read_deployment_by_name("publish-generator/default")
    run = stack.prefect.create_flow_run_from_deployment(
        deployment.id, parameters={"publish_to": address}
    )
    assert "champion" in gan(stack, tmp_path, "versions")
    gan(stack, tmp_path, "pull")
    assert stack.final_state(run.id).is_completed()
    gan(stack, tmp_path, "pull", "--from", address, "--to", "from-s3")
    whole = [gan(stack, tmp_path, "verify", name) for name in ("mnist-gan-generator", "from-s3")]
    assert len({said.split("sha256")[1] for said in whole}) == 1


def test_sweep_reads_its_space_beside_the_worker_and_its_trials_belong_to_it(
    stack: LocalStack, judged: dict[str, FlowRun]
) -> None:
    """A single trial: the middle of the project's own space, with other networks."""
    given = {"recipe": "vanilla", "trials": 1, "epochs": 1, "num_samples": 200, "promote": "never"}
    run_id = stack.run_deployment("sweep-gan/default", given | {"space": "sweep.yaml"})
    assert stack.final_state(run_id, seconds=600).is_completed()
    (parent,) = [run for run in stack.tracked(run_id) if "best_trial" in run.data.tags]
    (trial,) = [run for run in stack.tracked(run_id) if "trial" in run.data.tags]
    assert trial.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert (parent.info.status, trial.info.status) == ("FINISHED", "FINISHED")
    (version,) = stack.mlflow.search_model_versions(f"run_id = '{trial.info.run_id}'")
    assert version.version == "2"


@pytest.fixture(scope="session")
def cron_run(stack: LocalStack, minute_ahead: datetime) -> FlowRun:
    """The run that the schedule started by itself; it trains by now."""

    def planned() -> FlowRun | None:
        runs = stack.runs_of("weekly")
        return next((run for run in runs if run.expected_start_time == minute_ahead), None)

    def training() -> FlowRun | None:
        run = stack.prefect.read_flow_run(planned_run.id)
        assert run.state is not None
        assert not run.state.is_final(), f"{run.state}\n{stack.output}"
        return run if "train" in stack.tasks_of(run.id) else None

    planned_run = wait_for(planned, seconds=60, what="the run a minute ahead to be planned")
    return wait_for(
        training,
        seconds=180,
        what=lambda: f"the run a minute ahead to train; the stack:\n{stack.output}",
    )


def test_cron_starts_by_itself_with_a_fresh_seed(cron_run: FlowRun) -> None:
    assert cron_run.auto_scheduled
    assert cron_run.name == f"vanilla, 100000 epochs, seed {cron_run.id.int % 2**31}"


def test_cancelled_run_is_over_in_both_systems(stack: LocalStack, cron_run: FlowRun) -> None:
    (run,) = stack.tracked(cron_run.id)
    assert run.info.status == "RUNNING"
    done = stack.command("prefect", "flow-run", "cancel", str(cron_run.id))
    assert done.returncode == 0, done.stdout
    assert stack.final_state(cron_run.id).is_cancelled()
    (run,) = stack.tracked(cron_run.id)
    assert run.info.status == "KILLED"
    assert stack.prefect.read_global_concurrency_limit_by_name("gpu").active_slots == 0
    wait_for(
        lambda: None if stack.processes(PREFECT__FLOW_RUN_ID=str(cron_run.id)) else True,
        seconds=20,
        what="the end of its processes, which save a checkpoint first",
    )
