"""The local stack: how it starts, what it refuses, and that nothing of it is ever left."""

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
import uuid
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

from deployments.stack import (
    PORTS,
    StackError,
    check_ports,
    read_keys,
    read_ports,
    write_activation,
)
from tasks.sweeper import MARK, find_processes, sweep
from tests.deployments.local_stack import LocalStack, wait_for

PARTS = {"weed", "prefect", "mlflow", "deployments.worker"}


def test_ports_are_the_usual_ones_unless_set() -> None:
    assert read_ports({}) == PORTS
    assert read_ports({"MLFLOW_PORT": "5001", "S3_PORT": ""}) == PORTS | {"MLFLOW_PORT": 5001}


@pytest.mark.parametrize("value", ["80", "65536", "-1", "4200.5", "http"])
def test_port_that_is_none_is_refused(value: str) -> None:
    with pytest.raises(StackError, match=r"PREFECT_SERVER_API_PORT must be a port from 1024"):
        read_ports({"PREFECT_SERVER_API_PORT": value})


@pytest.mark.parametrize("mlflow", [4200, 8333, 8342])
def test_ports_that_overlap_are_refused(mlflow: int) -> None:
    with pytest.raises(StackError, match="overlap"):
        read_ports({"MLFLOW_PORT": str(mlflow)})


def test_taken_port_is_named_with_a_way_out() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(StackError, match=rf"Port {port} .* taken .*make stack MLFLOW_PORT="):
            check_ports({"MLFLOW_PORT": port})


def test_keys_are_drawn_once_and_only_their_owner_reads_them(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    keys = read_keys(path)
    assert read_keys(path) == keys
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert keys != read_keys(tmp_path / "others.json")
    assert len(keys["AWS_SECRET_ACCESS_KEY"]) >= 32


def test_keys_that_cannot_be_read_are_named_with_a_way_out(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    keys = read_keys(path)
    no_keys = ["5", "null", "{}", "[]", *(json.dumps(keys | {name: ""}) for name in keys)]
    no_keys += [json.dumps(keys | {name: 5}) for name in keys]
    for text in ("", "{", "no keys", "[" * 100_000, *no_keys):
        path.write_text(text)
        with pytest.raises(StackError, match=rf"^{path} does not hold .*; delete it, and new ones"):
            read_keys(path)
    path.unlink()
    path.with_suffix(".new").write_text("of a start that was killed")
    assert read_keys(path) == read_keys(path)
    assert [each.name for each in tmp_path.iterdir()] == ["keys.json"]


def test_profiles_of_the_user_are_gone_once_the_environment_is_activated(tmp_path: Path) -> None:
    write_activation(tmp_path / "activate", {"AWS_DEFAULT_REGION": "us-east-1"})
    theirs = {"AWS_PROFILE": "theirs", "AWS_DEFAULT_PROFILE": "theirs"}
    script = "import boto3; print(boto3.client('s3').meta.region_name)"
    said = subprocess.check_output(
        ["sh", "-c", f'. ./activate && "{sys.executable}" -c "{script}"'],
        cwd=tmp_path,
        env=os.environ | theirs,
        text=True,
    )
    assert said == "us-east-1\n"


def test_sweep_ends_processes_in_other_sessions_and_those_that_will_not_listen() -> None:
    stack_id = uuid.uuid4().hex
    meek = "import time; print(flush=True); time.sleep(60)"
    stubborn = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {meek}"
    with ExitStack() as stack:
        for script in (meek, stubborn):
            child = subprocess.Popen(
                [sys.executable, "-c", script],
                env=os.environ | {MARK: stack_id},
                stdout=subprocess.PIPE,
                start_new_session=True,
            )
            stack.enter_context(child)
            assert child.stdout
            child.stdout.readline()
        assert len(find_processes(stack_id)) == 2
        sweep(stack_id)
        assert find_processes(stack_id) == []


def test_taken_port_is_said_before_anything_starts(new_stack: LocalStack) -> None:
    port = int(new_stack.variables["MLFLOW_PORT"])
    with socket.create_server(("127.0.0.1", port)):
        started = new_stack.start().process
        assert started
        assert started.wait(timeout=15) == 1
    assert f"Port {port} on 127.0.0.1 is taken" in new_stack.output
    assert "started" not in new_stack.output
    assert "Traceback" not in new_stack.output


def parts(stack: LocalStack) -> set[str]:
    """The stack's parts that run by now."""
    found = set()
    for process in stack.processes():
        try:
            words = {Path(word).name for word in process.cmdline()}
        except psutil.Error:
            continue
        found |= words & PARTS
    return found


def wait_for_all_parts(stack: LocalStack) -> None:
    wait_for(lambda: parts(stack) == PARTS or None, seconds=30, what="all parts of the stack")


@pytest.mark.chaos
@pytest.mark.parametrize("delay_s", [0.3, 0.7, 1.2])
def test_interrupt_in_the_first_moments_leaves_nothing(
    new_stack: LocalStack, delay_s: float
) -> None:
    new_stack.start()
    time.sleep(delay_s)
    assert new_stack.end() != 0
    new_stack.wait_until_gone()
    assert "Traceback" not in new_stack.output


@pytest.mark.chaos
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signal_while_servers_start_leaves_nothing(
    new_stack: LocalStack, signum: signal.Signals
) -> None:
    wait_for_all_parts(new_stack.start())
    assert new_stack.end(signum) == (130 if signum == signal.SIGINT else 143)
    assert new_stack.processes() == []


@pytest.mark.chaos
def test_stack_goes_on_where_nohup_keeps_the_terminals_end_from_it(new_stack: LocalStack) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        new_stack.start()
    finally:
        signal.signal(signal.SIGHUP, before)
    wait_for_all_parts(new_stack)
    assert new_stack.process
    new_stack.process.send_signal(signal.SIGHUP)
    time.sleep(3)
    assert new_stack.process.poll() is None
    assert new_stack.end() == 130


@pytest.mark.chaos
def test_kill_of_the_stack_itself_leaves_nothing(new_stack: LocalStack) -> None:
    wait_for_all_parts(new_stack.start())
    assert new_stack.end(signal.SIGKILL) == -signal.SIGKILL
    new_stack.wait_until_gone()


@pytest.mark.chaos
def test_end_of_one_process_ends_all_with_a_sentence(new_stack: LocalStack) -> None:
    wait_for_all_parts(new_stack.start())
    (weed,) = [p for p in new_stack.processes() if p.name() == "weed"]
    weed.kill()
    assert new_stack.process
    assert new_stack.process.wait(timeout=30) == 1
    assert new_stack.processes() == []
    assert "s3 stopped" in new_stack.output
    assert "one of its processes did" in new_stack.output


def test_second_stack_in_the_same_folder_is_refused(new_stack: LocalStack) -> None:
    wait_for_all_parts(new_stack.start())
    second = LocalStack(new_stack.folder.parent)
    second.log = new_stack.folder.parent / "second.log"
    started = second.start().process
    assert started
    assert started.wait(timeout=15) == 1
    assert "running already" in second.output
    assert parts(new_stack) == PARTS
    new_stack.end()


def test_keys_of_the_user_never_reach_the_stack(tmp_path: Path) -> None:
    stack = LocalStack(tmp_path, AWS_SESSION_TOKEN="theirs", AWS_PROFILE="theirs")
    stack.start()
    try:
        wait_for_all_parts(stack)
        keys = json.loads((stack.folder / "s3-keys.json").read_text())
        for process in stack.processes():
            environment = process.environ()
            assert "theirs" not in environment.values()
            assert environment["AWS_ACCESS_KEY_ID"] == keys["AWS_ACCESS_KEY_ID"]
    finally:
        stack.end()
