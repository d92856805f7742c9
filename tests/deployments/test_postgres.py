"""Records in a real PostgreSQL: those of a whole stack, and of a sweep's many writers at once."""

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient
from sqlalchemy import create_engine, inspect

from deployments.stack import ROOT
from tests.deployments.local_stack import LocalStack
from tests.mlflow_server import MlflowServer

pytestmark = pytest.mark.slow

NUM_WRITERS, EPOCHS = 16, 5
WRITERS = f"""
import multiprocessing, os, sys
from pathlib import Path
from prefect.logging import disable_run_logger
from gan.training import Progress
from tasks.journal import open_journal
from tasks.tracking import open_run

def write(number):
    history = [
        Progress(epoch=epoch, epoch_done=True, step=epoch, num_steps={EPOCHS}, d_loss=number,
                 g_loss=0.5, d_real=0.5, d_fake=0.5, images_per_s=1, seconds_left=0)
        for epoch in range(1, {EPOCHS} + 1)
    ]
    folder = Path("runs", str(number))
    start.wait()
    with (
        disable_run_logger(),
        open_run(folder.name, dict.fromkeys("abcdefghijklmnop", number), {{}}, folder) as run_id,
        open_journal(run_id, folder, history) as journal,
    ):
        journal.deliver(0)

# Forked, they need not all import MLflow anew.
fork = multiprocessing.get_context("fork")
start = fork.Barrier({NUM_WRITERS})
writers = [fork.Process(target=write, args=[number]) for number in range({NUM_WRITERS})]
for writer in writers:
    writer.start()
for writer in writers:
    writer.join()
sys.exit(sum(writer.exitcode != 0 for writer in writers))
"""


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


def test_sixteen_trials_write_at_once_and_none_meets_an_error(
    tmp_path: Path, postgres: str
) -> None:
    server = MlflowServer(tmp_path, f"postgresql://gan@{postgres}/mlflow")
    with server.running():
        done = subprocess.run(
            [sys.executable, "-c", WRITERS],
            check=False,
            cwd=tmp_path,
            env=os.environ
            | {"PYTHONPATH": str(ROOT), "MLFLOW_TRACKING_URI": server.url, "NO_PROXY": "127.0.0.1"}
            # What is refused shall not be sent again until it is taken.
            | {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        client = MlflowClient(server.url)
        experiment = client.get_experiment_by_name("mnist-gan")
        runs = client.search_runs([experiment.experiment_id])
        assert sorted(int(run.info.run_name) for run in runs) == [*range(NUM_WRITERS)]
        for run in runs:
            assert run.info.status == "FINISHED"
            assert len(run.data.params) == 16
            points = client.get_metric_history(run.info.run_id, "d_loss")
            assert [point.step for point in points] == [*range(1, EPOCHS + 1)]
            assert {point.value for point in points} == {int(run.info.run_name)}
