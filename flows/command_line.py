"""A flow as a command: one option a parameter, checked by the flow's own types."""

from __future__ import annotations

import argparse
import functools
import gc
import inspect
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack, suppress
from importlib import import_module
from threading import Event, Thread
from types import SimpleNamespace
from typing import Any, TypeVar
from uuid import UUID, uuid4

import httpx
from prefect import Flow
from prefect.client.orchestration import get_client
from prefect.exceptions import CancelledRun, ParameterTypeError
from prefect.runtime import flow_run
from prefect.settings import (
    PREFECT_API_URL,
    PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS,
    temporary_settings,
)

from flows.explanation import ended_by_a_sentence, explain
from tasks.presence import presence, untagged
from tasks.reconciliation import read_flow_run
from tasks.services import check
from tasks.sweeper import MARK, watch_over

T = TypeVar("T")
LOOK_EVERY_S = 5
"""How often to ask a server whether the run is cancelled."""
PATIENCE_S = 120
"""How long Prefect's temporary server may take to start; its own 20 s are not enough for one on a
busy machine."""


def run(flow: Flow[..., Any]) -> None:
    """Run the flow with the options given; what the user can mend ends it with one sentence."""
    _quieten_user_errors()
    try:
        with ended_by_a_sentence(), ExitStack() as stack:
            parameters = flow.validate_parameters(_parse(flow))
            if server := PREFECT_API_URL.value():
                check("Prefect", f"{server}/health")
                flow.fn = _heeding_cancellation(flow.fn)
            else:
                patience = {PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS: PATIENCE_S}
                stack.enter_context(temporary_settings(set_defaults=patience))
                # That server ends idle connections after 5 s; Prefect's client keeps them for 25,
                # and waits 2 s when it meets one that is gone.
                os.environ.setdefault("UVICORN_TIMEOUT_KEEP_ALIVE", "30")
                # Killed, the flow would leave its temporary server behind, and its state there.
                os.environ[MARK] = uuid4().hex
                watch_over(os.environ[MARK])
                stack.enter_context(presence(os.environ[MARK]))
                flow.fn = untagged(flow.fn)
                # What is imported by now stays: no search for garbage looks at it again, least of
                # all the last. triton comes later: frozen, its bindings are reported as leaks.
                gc.freeze()
                # torch's optimizers and exporter want its compiler (and that wants triton), which
                # takes over a second: while that server starts, there is a core for it.
                Thread(target=import_module, args=["torch._dynamo"], daemon=True).start()
                _start_temporary_server()
            flow(**parameters)
    except ParameterTypeError as error:
        faults = str(error).splitlines()[1:]
        said = (fault.strip(" -").replace("Value error, ", "") for fault in faults)
        sys.exit("error: " + "; ".join(said))
    except CancelledRun as ended:
        sys.exit(str(ended))


def _start_temporary_server() -> None:
    """Start Prefect's temporary server in a process group of its own.

    A terminal sends Ctrl-C to the whole group of a command, and `timeout` SIGTERM, but the flow has
    yet to tell the server how it ended.
    """
    from prefect.server.api import server  # noqa: PLC0415  # of no use beside a lasting one

    # Prefect starts it without a way to say so.
    apart = functools.partial(subprocess.Popen, process_group=0)
    setattr(server, "subprocess", SimpleNamespace(**vars(subprocess) | {"Popen": apart}))  # noqa: B010
    try:
        get_client(sync_client=True)
    finally:
        setattr(server, "subprocess", subprocess)  # noqa: B010


def _heeding_cancellation(body: Callable[..., T]) -> Callable[..., T]:
    """The body of a flow that ends, as by SIGTERM, where its run is cancelled in Prefect.

    A deployed run has its worker for that.
    """

    def heed(flow_run_id: UUID, over: Event) -> None:
        while not over.wait(LOOK_EVERY_S):
            # Errors are for the flow to meet: the server may be away for a while.
            with suppress(httpx.HTTPError, RuntimeError), get_client(sync_client=True) as client:
                run = read_flow_run(client, flow_run_id)
                if run and run.state and (run.state.is_cancelling() or run.state.is_cancelled()):
                    os.kill(os.getpid(), signal.SIGTERM)
                    return

    @functools.wraps(body)
    def heeding(*args: Any, **kwargs: Any) -> T:
        over = Event()
        Thread(target=heed, args=[UUID(flow_run.get_id()), over], daemon=True).start()
        try:
            return body(*args, **kwargs)
        finally:
            over.set()

    return heeding


def _parse(flow: Flow[..., Any]) -> dict[str, str | None]:
    """The options given, as text; an empty one is None, as in Prefect's form."""
    module = inspect.getmodule(flow.fn)
    name = module.__spec__.name if module and module.__spec__ else flow.fn.__module__
    what = (flow.description or "").partition("\n\n")[0]
    parser = argparse.ArgumentParser(prog=f"python -m {name}", description=what, allow_abbrev=False)
    for parameter, schema in flow.parameters.properties.items():
        default = schema.get("default")
        switch = schema.get("type") == "boolean"
        parser.add_argument(
            f"--{parameter.replace('_', '-')}",
            default=argparse.SUPPRESS,
            nargs="?" if switch else None,
            const="true" if switch else None,
            metavar=parameter.upper(),
            help=schema["description"] + ("" if default is None else f" (default: {default})"),
        )
    return {option: value or None for option, value in vars(parser.parse_args()).items()}


def _quieten_user_errors() -> None:
    """Prefect logs every exception with its traceback; here one sentence is enough."""

    def shorten(record: logging.LogRecord) -> bool:
        if record.exc_info and record.exc_info[1] and explain(record.exc_info[1]):
            record.exc_info = record.exc_text = None
        return True

    for name in ("prefect.flow_runs", "prefect.task_runs"):
        logging.getLogger(name).addFilter(shorten)
    logging.getLogger("prefect.flows").setLevel(logging.CRITICAL)
