"""The whole pipeline on one machine: `python -m deployments.stack`, ended by Ctrl-C.

Honcho runs what the Procfile names: an S3 store, the servers of Prefect and MLflow, and a worker,
all of them on loopback. This module only checks the ports, makes their environment and sees to it
that nothing outlives it.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import shlex
import signal
import socket
import sys
import traceback
import uuid
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import FrameType

from filelock import FileLock, Timeout
from honcho.environ import parse_procfile
from honcho.manager import Manager
from honcho.printer import Printer

import flows  # noqa: F401
from tasks.sweeper import MARK, sweep, watch_over

ROOT = Path(__file__).resolve().parent.parent
PROCFILE = Path(__file__).with_name("Procfile")
BUCKET = "gan-models"
PORTS = {"PREFECT_SERVER_API_PORT": 4200, "MLFLOW_PORT": 5000, "S3_PORT": 8333}
"""The variables that set the ports, with their defaults."""
NUM_S3_PORTS = 10
"""The S3 store takes this many ports in a row, for its parts speak to each other."""
ASKED_TO_END = (130, 143)
"""Honcho's exit codes after SIGINT and SIGTERM."""


class StackError(Exception):
    """Why the stack cannot start, in a sentence."""


def read_ports(environ: Mapping[str, str]) -> dict[str, int]:
    """The three ports, from the environment or by default.

    Raises:
        StackError: one is no port number, or they overlap.
    """
    ports = {}
    for name, default in PORTS.items():
        value = environ.get(name) or str(default)
        highest = 65535 - (NUM_S3_PORTS - 1 if name == "S3_PORT" else 0)
        if not value.isdecimal() or not 1024 <= int(value) <= highest:
            raise StackError(f"{name} must be a port from 1024 to {highest}, not {value!r}.")
        ports[name] = int(value)
    taken = [port for name in ports for port in port_range(name, ports[name])]
    if len(set(taken)) < len(taken):
        shown = ", ".join(f"{name}={port}" for name, port in ports.items())
        raise StackError(f"The ports overlap: {shown}; S3 takes {NUM_S3_PORTS} in a row.")
    return ports


def port_range(name: str, port: int) -> range:
    """The ports that one of the servers binds."""
    return range(port, port + (NUM_S3_PORTS if name == "S3_PORT" else 1))


def check_ports(ports: Mapping[str, int]) -> None:
    """See whether every port is free.

    Raises:
        StackError: one is not; says which, and how to choose another.
    """
    for name, first in ports.items():
        for port in port_range(name, first):
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    probe.bind(("127.0.0.1", port))
                except OSError as error:
                    raise StackError(
                        f"Port {port} on 127.0.0.1 is taken ({error.strerror}). "
                        f"Free it, or choose another: make stack {name}={first + 100}"
                    ) from None


def read_keys(path: Path) -> dict[str, str]:
    """The S3 store's keys; drawn on the first start and kept in a file only its owner reads.

    Raises:
        StackError: the file holds something else.
    """
    if not path.exists():
        keys = {
            "AWS_ACCESS_KEY_ID": secrets.token_hex(10),
            "AWS_SECRET_ACCESS_KEY": secrets.token_urlsafe(30),
        }
        scratch = path.with_suffix(".new")
        scratch.touch(mode=0o600)
        scratch.write_text(json.dumps(keys))
        scratch.rename(path)
    kept = None
    with suppress(ValueError, RecursionError):
        kept = json.loads(path.read_text())
    match kept:
        case {"AWS_ACCESS_KEY_ID": str(key), "AWS_SECRET_ACCESS_KEY": str(secret)}:
            if key and secret:
                return {"AWS_ACCESS_KEY_ID": key, "AWS_SECRET_ACCESS_KEY": secret}
    raise StackError(
        f"{path} does not hold the S3 store's keys any more; delete it, and new ones are drawn."
    )


def settings(folder: Path, ports: Mapping[str, int], keys: Mapping[str, str]) -> dict[str, str]:
    """The variables by which servers, worker and user find each other."""
    s3 = f"http://127.0.0.1:{ports['S3_PORT']}"
    return {
        "PREFECT_API_URL": f"http://127.0.0.1:{ports['PREFECT_SERVER_API_PORT']}/api",
        "PREFECT_HOME": str(folder / "prefect"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
        "DO_NOT_TRACK": "1",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        # With loopback among them, since flows are imported.
        **{name: os.environ[name] for name in ("NO_PROXY", "no_proxy")},
        "MLFLOW_TRACKING_URI": f"http://127.0.0.1:{ports['MLFLOW_PORT']}",
        "MLFLOW_ARTIFACTS_DESTINATION": f"s3://{BUCKET}/mlflow",
        "MLFLOW_S3_ENDPOINT_URL": s3,
        "AWS_ENDPOINT_URL_S3": s3,
        "AWS_DEFAULT_REGION": "us-east-1",
        **keys,
    }


def process_environment(
    folder: Path, ports: Mapping[str, int], shared: Mapping[str, str]
) -> dict[str, str]:
    """The whole environment of the stack's processes."""
    # Somebody's own cloud keys and profiles are not for servers that run here.
    foreign = ("AWS_", "PREFECT_API_KEY", "PREFECT_PROFILE")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    defaults = {
        # One worker process, so that nobody races to create the database.
        "MLFLOW_BACKEND_STORE_URI": f"sqlite:///{folder}/mlflow.db",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "PREFECT_WORKER_QUERY_SECONDS": "2",
        "PREFECT_SERVER_CONCURRENCY_MAXIMUM_CONCURRENCY_SLOT_WAIT_SECONDS": "5",
        "PYTHONUNBUFFERED": "1",
    }
    return {
        **defaults,
        **inherited,
        **shared,
        **{name: str(port) for name, port in ports.items()},
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
        "MNIST_GAN_ROOT": str(ROOT),
        "STACK_FOLDER": str(folder),
        "STACK_BUCKET": BUCKET,
        MARK: uuid.uuid4().hex,
    }


def write_activation(path: Path, shared: Mapping[str, str]) -> None:
    """A script for another terminal: the virtual environment, and the stack's addresses in it."""
    activate = Path(sys.prefix) / "bin" / "activate"
    lines = [
        f". {shlex.quote(str(activate))}",
        "unset AWS_PROFILE AWS_DEFAULT_PROFILE AWS_SESSION_TOKEN PREFECT_PROFILE",
        *(f"export {name}={shlex.quote(value)}" for name, value in shared.items()),
    ]
    path.touch(mode=0o600)
    path.write_text("\n".join(lines) + "\n")


def end_quietly(signum: int, frame: FrameType | None) -> None:
    """The terminal is gone: stop writing to it and end as for SIGTERM."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    signal.raise_signal(signal.SIGTERM)


def run(folder: Path) -> int:
    """Run the stack until it is asked to end; gives an exit code.

    Raises:
        StackError: it cannot start, or one of its processes died.
    """
    ports = read_ports(os.environ)
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    (folder / "s3").mkdir(exist_ok=True)
    try:
        lock = FileLock(folder / "stack.lock", timeout=0)
        lock.acquire()
    except Timeout:
        raise StackError(f"A stack is running already in {folder}.") from None
    check_ports(ports)
    shared = settings(folder, ports, read_keys(folder / "s3-keys.json"))
    write_activation(folder / "activate", shared)
    environment = process_environment(folder, ports, shared)

    watch_over(environment[MARK])
    stack = Manager(Printer(sys.stdout, colour=False, prefix=False))
    for name, command in parse_procfile(PROCFILE.read_text()).processes.items():
        stack.add_process(name, command, env=environment, cwd=str(ROOT))
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as nohup has it
        signal.signal(signal.SIGHUP, end_quietly)
    try:
        stack.loop()
    except BaseException:
        # A signal in the first moments, before honcho knows all its processes, fails in honcho.
        if stack.returncode not in ASKED_TO_END:
            traceback.print_exc()
        sweep(environment[MARK])
        os._exit(stack.returncode or 1)
    # A flow run has a session of its own, which honcho does not reach.
    sweep(environment[MARK])
    if stack.returncode in ASKED_TO_END:
        return int(stack.returncode)
    raise StackError(
        f"The stack ended because one of its processes did, the first that is called stopped above."
        f" Their logs are in {folder / 'logs'}."
    )


def main() -> None:
    """Run the stack as a command."""
    parser = argparse.ArgumentParser(prog="python -m deployments.stack", description=__doc__)
    parser.add_argument(
        "--folder", type=Path, default=ROOT / ".local", help="where all data is kept (%(default)s)"
    )
    try:
        sys.exit(run(parser.parse_args().folder.resolve()))
    except StackError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted")


if __name__ == "__main__":
    main()
