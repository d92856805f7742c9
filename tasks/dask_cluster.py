"""Running a sweep's trials on Dask: its own workers, or those of a scheduler that is there."""

from __future__ import annotations

import logging
import time
from collections import deque
from concurrent.futures import CancelledError
from typing import Any

import dask
from dask.system import CPU_COUNT
from dask.typing import Key
from distributed.client import as_completed
from distributed.scheduler import KilledWorker
from prefect.client.orchestration import get_client
from prefect.exceptions import Pause, TerminationSignal
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect_dask.task_runners import DaskTaskRunner, PrefectDaskFuture

from tasks.progress import heed_pause
from tasks.sweep import Sweep, SweepError, end_open_trials, record_death, run_trial

MAX_SQLITE_WRITERS = 8
"""Workers that may write to an MLflow store on SQLite at once. It takes one at a time: of 16 that
wrote without a pause, each waited up to 6 s."""
SETTINGS = {
    # Dask gives up a worker of ours that is not back in 15 s, which starting one may well take.
    "distributed.deploy.lost-worker-timeout": "1 hour",
    # Dask has workers return memory at once, which makes a step take twice as long.
    "distributed.nanny.pre-spawn-environ": {
        f"{library}_NUM_THREADS": 1 for library in ("OMP", "MKL", "OPENBLAS")
    },
    # A terminal sends Ctrl-C to workers, too, which would close while their trials are saved.
    "distributed.worker.preload": ["import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)"],
}
CONNECT_S, WORKERS_S = 10, 60
"""How long to wait for the scheduler at an address, and for its first worker."""
LOOK_EVERY_S = 0.2
STOP_S = 15
"""How long trials have to save themselves when their sweep is interrupted. Half of the time that
Prefect and Kubernetes give a process which they end."""


def count_workers(device: str, tracking_uri: str) -> int:
    """How many workers of our own to have where nobody says: one for each core that we may use,
    but no more than MLflow's store takes; or one for the GPU."""
    if device != "cpu":
        return 1
    return min(CPU_COUNT, MAX_SQLITE_WRITERS) if _is_sqlite(tracking_uri) else CPU_COUNT


def make_runner(
    dask_address: str | None, device: str, workers: int, memory_gib: float
) -> DaskTaskRunner:
    """Dask workers for one trial each: those at the address, or processes of our own.

    Our own talk on the loopback over TLS, and one that takes more than its memory is started anew.
    On a GPU a trial takes one unit of the resource `GPU`, which a worker at an address must have.
    """
    logging.getLogger("distributed").setLevel(logging.WARNING)
    # It logs tracebacks where a scheduler goes away, which `run_trials` says in a sentence.
    logging.getLogger("distributed.client").setLevel(logging.CRITICAL)
    if dask_address:
        return DaskTaskRunner(address=dask_address, client_kwargs={"timeout": CONNECT_S})
    return DaskTaskRunner(
        cluster_kwargs={
            "n_workers": workers,
            "threads_per_worker": 1,
            "memory_limit": f"{memory_gib}GiB",
            "host": "127.0.0.1",
            "dashboard_address": "127.0.0.1:0",
            "security": True,
            "resources": _resources(device),
            # Several progress bars in one terminal would overwrite each other.
            "env": {"TTY_COMPATIBLE": "0", "DASK_LOGGING__DISTRIBUTED": "warning"},
        }
    )


def _resources(device: str) -> dict[str, int]:
    return {"GPU": 1} if device == "cuda" else {}


def run_trials(sweep: Sweep, numbers: list[int], runner: DaskTaskRunner) -> None:
    """Run these trials on Dask and wait for them.

    A trial whose worker dies runs again on another one, from its checkpoint; one that takes
    several workers with it has failed. Where the sweep is interrupted or paused, those under way
    are saved and end as well.

    Raises:
        SweepError: Dask does not answer, went away or has no worker; the store cannot take so many
            writers; or a trial neither ended nor failed by its settings. What is finished stays.
    """
    if not numbers:
        return
    sweep.stop_sign.unlink(missing_ok=True)
    # A flow without a lasting server has one for itself; the workers shall not make theirs.
    api_url = str(get_client(sync_client=True).api_url)
    try:
        with dask.config.set(SETTINGS), temporary_settings({PREFECT_API_URL: api_url}), runner:
            require_store(sweep.tracking_uri, _connect(runner, sweep))
            left = _run(sweep, numbers, runner)
    except CancelledError:
        raise SweepError(
            f"the Dask scheduler at {_where(runner)} went away; what is finished is kept, and the "
            "same sweep with --resume goes on"
        ) from None
    except (KeyboardInterrupt, TerminationSignal, Pause):
        end_open_trials(sweep)
        raise
    if left:
        number, reason = next(iter(left.items()))
        raise SweepError(
            f"{len(left)} of {len(numbers)} trials are not at their end; trial {number}: {reason}; "
            "the same sweep with --resume goes on with them"
        )


def _run(sweep: Sweep, numbers: list[int], runner: DaskTaskRunner) -> dict[int, str]:
    """Run trials; gives those that could not come to an end, with the reason.

    No more are handed to Dask than it has threads, or GPUs: a trial that only waits on a worker
    would be blamed for that one's death.
    """
    waiting, left = deque(numbers), dict[int, str]()
    running: dict[Key, tuple[int, PrefectDaskFuture[Any]]] = {}
    ends = as_completed(loop=runner.client.loop)  # type: ignore[no-untyped-call]

    def fill() -> None:
        while waiting and len(running) < max(1, _count_slots(runner, sweep)):
            number = waiting.popleft()
            with dask.annotate(resources=_resources(sweep.device)):  # type: ignore[attr-defined]
                future = runner.submit(run_trial, {"sweep": sweep, "number": number})
            running[future.wrapped_future.key] = number, future
            ends.add(future.wrapped_future)  # type: ignore[no-untyped-call]

    fill()
    try:
        while running:
            heed_pause()
            if not ends.has_ready():  # type: ignore[no-untyped-call]
                time.sleep(LOOK_EVERY_S)
                continue
            number, future = running.pop(next(ends).key)
            try:
                future.result()
            except KilledWorker as error:
                deaths = error.allowed_failures + 1
                record_death(sweep, number, f"{deaths} workers died of it: too little memory?")
            except CancelledError:
                raise
            except Exception as error:
                left[number] = str(error)
            fill()
    except (KeyboardInterrupt, TerminationSignal, Pause):
        _stop(sweep, [future for _, future in running.values()])
        raise
    return left


def _stop(sweep: Sweep, running: list[PrefectDaskFuture[Any]]) -> None:
    """Have trials save themselves and end, and wait for them a while.

    Dask cannot interrupt them: it would kill those of our own workers, and let the others go on.
    """
    sweep.stop_sign.touch()
    deadline = time.monotonic() + STOP_S
    for future in running:
        future.wait(max(0, deadline - time.monotonic()))


def _connect(runner: DaskTaskRunner, sweep: Sweep) -> int:
    """Start or find the workers; gives how many trials they take at once.

    Raises:
        SweepError: no scheduler answers, or it has no worker that could take a trial.
    """
    deadline = time.monotonic() + WORKERS_S
    try:
        # Workers may have been started together with their scheduler.
        while not (slots := _count_slots(runner, sweep)) and time.monotonic() < deadline:
            time.sleep(0.5)
    # The last two come of TLS that is not configured, and of a port beyond all ports.
    except (OSError, ValueError, TypeError, OverflowError) as error:
        raise SweepError(f"Dask's scheduler at {_where(runner)} does not answer: {error}") from None
    if not slots:
        what = " with the resource GPU" if _resources(sweep.device) else ""
        raise SweepError(f"the Dask scheduler at {_where(runner)} has no worker{what}")
    return slots


def _count_slots(runner: DaskTaskRunner, sweep: Sweep) -> int:
    workers = runner.client.scheduler_info(n_workers=-1)["workers"].values()
    needed = _resources(sweep.device)
    return sum(
        min([worker["nthreads"], *(int(worker["resources"].get(name, 0)) for name in needed)])
        for worker in workers
    )


def _where(runner: DaskTaskRunner) -> str:
    return runner.address or "127.0.0.1"


def require_store(tracking_uri: str, writers: int) -> None:
    """See that MLflow's store takes so many writers at once.

    Raises:
        SweepError: it is a file of SQLite, and there are more than MAX_SQLITE_WRITERS.
    """
    if _is_sqlite(tracking_uri) and writers > MAX_SQLITE_WRITERS:
        raise SweepError(
            f"MLflow's store is a file of SQLite, which takes {MAX_SQLITE_WRITERS} writers at "
            f"once, not {writers}; set MLFLOW_TRACKING_URI to a server on PostgreSQL, or take "
            "fewer workers"
        )


def _is_sqlite(tracking_uri: str) -> bool:
    return tracking_uri.startswith("sqlite:")
