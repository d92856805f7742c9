"""A stack that ends in the middle of a run, and one that keeps its records in PostgreSQL."""

import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from prefect.client.schemas.objects import FlowRun
from sqlalchemy import create_engine, inspect

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


def find_postgres() -> Path | None:
    """The folder of PostgreSQL's programs, which Debian keeps off the path."""
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    if found := shutil.which("initdb"):
        folders.append(Path(found).resolve().parent)
    return next((folder for folder in folders if (folder / "createdb").exists()), None)


@pytest.fixture
def postgres(tmp_path: Path) -> Iterator[str]:
    """`host:port` of a PostgreSQL with empty databases `prefect` and `mlflow`, user `gan`."""
    programs = find_postgres()
    if programs is None:
        pytest.skip("PostgreSQL is missing: make system-packages")
    # It refuses to run as root.
    user = "postgres" if os.getuid() == 0 else None
    folder = tmp_path / "postgres"
    folder.mkdir()
    if user:
        shutil.chown(folder, user)
        for parent in [*folder.parents][:3]:
            parent.chmod(0o755)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    data = folder / "data"

    def call(program: str, *words: str) -> None:
        subprocess.run(
            [programs / program, *words], check=True, capture_output=True, user=user, cwd=folder
        )

    call("initdb", "--pgdata", str(data), "--username=gan", "--auth=trust", "--no-sync")
    options = f"-c listen_addresses=127.0.0.1 -c port={port} -c unix_socket_directories={folder}"
    log = str(folder / "log")
    call("pg_ctl", "--pgdata", str(data), "--log", log, "--wait", "-o", options, "start")
    try:
        for name in ("prefect", "mlflow"):
            call("createdb", "--host=127.0.0.1", f"--port={port}", "--username=gan", name)
        yield f"127.0.0.1:{port}"
    finally:
        call("pg_ctl", "--pgdata", str(data), "--mode=immediate", "stop")


def test_one_setting_each_puts_the_records_into_postgresql(tmp_path: Path, postgres: str) -> None:
    stack = LocalStack(
        tmp_path,
        PREFECT_SERVER_DATABASE_CONNECTION_URL=f"postgresql+asyncpg://gan@{postgres}/prefect",
        MLFLOW_BACKEND_STORE_URI=f"postgresql://gan@{postgres}/mlflow",
    )
    try:
        stack.start().wait_until_ready()
        stack.mlflow.create_experiment("in-postgresql")
        assert stack.prefect.read_deployments()
        for database, table in (("prefect", "flow_run"), ("mlflow", "experiments")):
            engine = create_engine(f"postgresql://gan@{postgres}/{database}")
            assert table in inspect(engine).get_table_names()
            engine.dispose()
        assert not list(stack.folder.glob("**/*.db"))
    finally:
        if stack.process is not None and stack.process.poll() is None:
            stack.end()
        stack.wait_until_gone()
