"""One truth: MLflow and Prefect agree on every run, also where its process died without a word."""

from __future__ import annotations

import os
import socket
import time
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import mlflow
from mlflow import MlflowClient
from mlflow.entities import Run
from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterEndTime,
    FlowRunFilterState,
    FlowRunFilterStateType,
    FlowRunFilterTags,
)
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.client.schemas.sorting import FlowRunSort
from prefect.exceptions import MissingContextError, ObjectNotFound
from prefect.runtime import flow_run
from prefect.settings import PREFECT_API_URL
from prefect.states import AwaitingRetry, Cancelled, Completed, Crashed, Running

from tasks.presence import clear_dead
from tasks.run_folder import SCRATCH, clear_scratch, finish, is_abandoned, is_held
from tasks.settings import load_settings
from tasks.tracking import AWAY, EXPERIMENT, end_runs, find_done, find_signal, open_experiment

MAX_STARTS = 3
"""A training that crashes this often is given up."""
TIME_TO_START = timedelta(seconds=20)
"""How long a flow run may run without the lock of its folder."""
LATE_REPORTS = timedelta(seconds=40)
"""How long after a crash its worker may report it once more, and crash whatever runs by then."""
BY_A_USER = "Retry from the UI"
"""What Prefect's pages say with a retry that somebody asks for there."""
LOOK_BACK = timedelta(days=1)
"""What crashed before is left to the user."""
ENDS = {
    StateType.COMPLETED: "FINISHED",
    StateType.CANCELLED: "KILLED",
    StateType.FAILED: "FAILED",
    StateType.CRASHED: "FAILED",
}
"""How MLflow calls the ends of a flow run."""


def interrupted_by(error: BaseException, folder: Path) -> State[Any]:
    """The state of a run that a user or the system interrupted, told by what it raised: cancelled,
    or completed if all was done.

    Raises:
        BaseException: the same error, if no signal is behind it.
        TerminationSignal: the signal, where Prefect's supervisor of this process decides (a pod
            that is evicted is scheduled again).
    """
    signal = find_signal(error)
    if signal is None:
        raise error
    name = "Ctrl-C" if isinstance(signal, KeyboardInterrupt) else "SIGTERM"
    if _is_done():
        finish(folder)
        return Completed(message=f"{name} came when all was done.")
    # Prefect runs no hook for a state that a flow gives by itself.
    with suppress(*AWAY):
        end_runs(flow_run.get_id() or "", "KILLED")
    if os.environ.get("PREFECT_FLOW_RUN_EXECUTE_SIGTERM_BEHAVIOR"):
        raise signal
    return Cancelled(message=f"Ended by {name}; what was done is kept in {folder}.")


def _is_done() -> bool:
    try:
        return bool(find_done(flow_run.get_id() or ""))
    except AWAY:
        return False  # what was done, MLflow would have been told


@task(name="end left runs", cache_policy=NO_CACHE)
def end_left_runs(own_folder: Path | None = None) -> None:
    """End the MLflow runs that nobody works on any more, and the flow runs whose process died here.

    A run whose flow run is over ends like it. Where Prefect still believes in a run, or does not
    know it, its folder tells: a process that trains on this machine holds its lock. Who else was in
    `own_folder`, whose lock this process holds, is gone as well. On Prefect's temporary servers the
    end of its process tells of every flow run, also of one that had no MLflow run.

    What such processes had lying about on this machine is removed.
    """
    runs_dir = load_settings().runs_dir
    own_folder = own_folder and own_folder.absolute()
    open_experiment(runs_dir)
    running = mlflow.search_runs(
        experiment_names=[EXPERIMENT],
        filter_string="attributes.status = 'RUNNING' and tags.prefect_flow_run_id != ''",
        output_format="list",
    )
    with get_client(sync_client=True) as prefect:
        if not PREFECT_API_URL.value():
            _crash_dead(prefect)
        for run in running:
            if run.data.tags["prefect_flow_run_id"] != flow_run.get_id():
                _end_if_left(prefect, run, own_folder)
        _correct_ends(prefect)
    for left in runs_dir.glob(f"*/{SCRATCH}"):
        clear_scratch(left.parent)


def _crash_dead(prefect: SyncPrefectClient) -> None:
    """On a temporary server, crash what was run by a process that is gone."""
    for tag in clear_dead():
        mine = FlowRunFilter(tags=FlowRunFilterTags(all_=[tag]))
        for run in prefect.read_flow_runs(flow_run_filter=mine):
            # A signal in a run's last moments makes it crashed as well, though all was done.
            if run.state and run.state.is_final() and not run.state.is_crashed():
                continue
            if complete_if_done(prefect, run) or (run.state and run.state.is_crashed()):
                continue
            _crash(prefect, run)
            get_run_logger().info("Flow run %s was left open: CRASHED", run.name)


def complete_if_done(prefect: SyncPrefectClient, run: FlowRun) -> bool:
    """Whether a process ended after all its work and before it could say so; then it is said.

    Started again, such a run would find no checkpoint any more and train anew.
    """
    done = find_done(str(run.id))
    for each in done:
        folder = load_settings().runs_dir / each.data.tags["run_folder"]
        if is_abandoned(folder):
            finish(folder)
        completed: State[None] = Completed(message="The process ended when all was done.")
        prefect.set_flow_run_state(run.id, completed, force=True)
        with suppress(MissingContextError):  # also asked outside of flows
            get_run_logger().info("Flow run %s had done all: COMPLETED", run.name)
    return bool(done)


def _crash(prefect: SyncPrefectClient, run: FlowRun) -> None:
    crashed: State[None] = Crashed(message="The process ended without a word.")
    prefect.set_flow_run_state(run.id, crashed, force=True)


def _end_if_left(prefect: SyncPrefectClient, run: Run, own_folder: Path | None) -> None:
    known = read_flow_run(prefect, UUID(run.data.tags["prefect_flow_run_id"]))
    if known and known.state and known.state.is_final():
        if known.state.is_crashed() and _lives_here(run, own_folder):
            alive: State[None] = Running(
                message="Its process is alive, though it was not heard of."
            )
            prefect.set_flow_run_state(known.id, alive, force=True)
            return
        status = ENDS[known.state.type]
    elif _died_here(run, known, own_folder):
        status = "FAILED"
        if known:
            _crash(prefect, known)
    else:
        return
    MlflowClient().set_terminated(run.info.run_id, status)
    get_run_logger().info("MLflow run %s was left open: %s", run.info.run_name, status)


def _died_here(run: Run, known: FlowRun | None, own_folder: Path | None) -> bool:
    if run.data.tags.get("host") != socket.gethostname():
        return False
    folder = _folder_of(run)
    if folder == own_folder:
        return True
    # One that is started again, or is being cancelled, holds no lock either.
    state = known.state if known else None
    if state and not (state.is_running() and datetime.now(UTC) - state.timestamp > TIME_TO_START):
        return False
    return is_abandoned(folder)


def _lives_here(run: Run, own_folder: Path | None) -> bool:
    """Whether a process on this machine, other than this one, works on a run."""
    here = run.data.tags.get("host") == socket.gethostname()
    return here and _folder_of(run) != own_folder and is_held(_folder_of(run))


def _folder_of(run: Run) -> Path:
    """Where the process of its flow run holds the lock: the trials of a sweep have workers, whose
    death is for the sweep to mend."""
    folder = load_settings().runs_dir.absolute() / run.data.tags["run_folder"]
    return folder.with_name(folder.name.rpartition("-")[0]) if "trial" in run.data.tags else folder


def _correct_ends(prefect: SyncPrefectClient) -> None:
    """Have MLflow say of runs that ended a short while ago what Prefect says.

    One that is started again may be cancelled, or fail, before it comes to tell MLflow.
    """
    since = datetime.now(UTC) - LOOK_BACK
    over = prefect.read_flow_runs(
        flow_run_filter=FlowRunFilter(
            state=FlowRunFilterState(type=FlowRunFilterStateType(any_=list(ENDS))),
            end_time=FlowRunFilterEndTime(after_=since),
        ),
        sort=FlowRunSort.END_TIME_DESC,  # a server gives no more than 200 at once
    )
    ends = {str(run.id): run.state_type for run in over}
    ended = mlflow.search_runs(
        experiment_names=[EXPERIMENT],
        filter_string=f"attributes.end_time > {since.timestamp() * 1000:.0f}",
        output_format="list",
    )
    for run in ended:
        state = ends.get(run.data.tags.get("prefect_flow_run_id", ""))
        if state is None or "trial" in run.data.tags or run.info.status == ENDS[state]:
            continue
        if state != StateType.CRASHED or run.info.status != "FINISHED":  # those are completed
            MlflowClient().set_terminated(run.info.run_id, ENDS[state])


def read_flow_run(prefect: SyncPrefectClient, flow_run_id: UUID) -> FlowRun | None:
    """A flow run, if this server knows it."""
    try:
        return prefect.read_flow_run(flow_run_id)
    except ObjectNotFound:
        return None


@task(name="take up crashed runs", cache_policy=NO_CACHE)
def take_up_crashed_runs() -> None:
    """Schedule deployed trainings again that crashed a short while ago, a few times each.

    One that crashed after all its work is completed instead, deployed or not. Waits until all that
    a worker may still say of a crash is said.
    """
    with get_client(sync_client=True) as prefect:
        crashed = prefect.read_flow_runs(
            flow_run_filter=FlowRunFilter(
                state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.CRASHED])),
                end_time=FlowRunFilterEndTime(after_=datetime.now(UTC) - LOOK_BACK),
            )
        )
        for found in crashed:
            # It may have been started again while another one was waited for.
            run = prefect.read_flow_run(found.id)
            if not (run.state and run.state.is_crashed()) or complete_if_done(prefect, run):
                continue
            if not (run.deployment_id and "training" in run.tags):
                continue
            starts = count_starts(prefect, run)
            if starts < MAX_STARTS and _stays_crashed(prefect, run):
                again: State[None] = AwaitingRetry(message=f"Taken up again after start {starts}.")
                prefect.set_flow_run_state(run.id, again, force=True)
                get_run_logger().info("Taken up again: %s", run.name)


def count_starts(prefect: SyncPrefectClient, run: FlowRun) -> int:
    """How often a run was started by itself: without a user's retries, and without those times when
    it was only said to run, as after a silence."""
    states = prefect.read_flow_run_states(run.id)
    again = (state.message for state in states if state.name == "AwaitingRetry")
    return 1 + sum(message != BY_A_USER for message in again)


def _stays_crashed(prefect: SyncPrefectClient, run: FlowRun) -> bool:
    while run.state and run.state.is_crashed():
        waited = datetime.now(UTC) - run.state.timestamp
        if waited >= LATE_REPORTS:
            return True
        time.sleep((LATE_REPORTS - waited).total_seconds())
        run = prefect.read_flow_run(run.id)
    return False
