import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator

import pytest

from tests.chaos.conftest import Trials
from tests.chaos.pipeline import ENOUGH_S, STEPS, Pipeline, Reference, check_result, kill
from tests.deployments.local_stack import wait_for
from tests.long import takes_minutes

pytestmark = [pytest.mark.slow, pytest.mark.chaos]

NUM_RUNS = int(os.environ.get("CHAOS_RUNS", "1"))
KILLS_A_RUN = 5 if NUM_RUNS > 1 else 2
"""At most: some moments turn out to lie behind the end of the run."""


def random_moments(
    pipeline: Pipeline,
    trials: Trials,
    rng: random.Random,
    steps: list[str],
    seconds: dict[str, float],
) -> Iterator["subprocess.Popen[bytes]"]:
    """Start a run and come to a random moment of some step of it, several times.

    A step takes so many seconds when nothing happens. Ends early where a run is over before.
    """
    for step in sorted(rng.choices(steps, k=KILLS_A_RUN), key=steps.index):
        delay_s = rng.uniform(0, seconds[step])
        print(f"{delay_s:.2f} s into {step}")
        pipeline.start()
        if not pipeline.wait_for_step(step):
            return
        time.sleep(delay_s)
        assert pipeline.process
        if pipeline.process.poll() is not None:
            return
        trials.begin()
        yield pipeline.process


@pytest.mark.parametrize("number", range(NUM_RUNS))
def test_killed_at_any_moment(
    number: int, pipeline: Pipeline, reference: Reference, trials: Trials, seed: int
) -> None:
    """SIGKILL at a random moment of the flow.

    A run is killed several times, in any of its steps, and started again each time.
    """
    print(f"seed {seed}, run {number}")
    rng, killed = random.Random(f"{seed}-{number}"), 0
    for _ in random_moments(pipeline, trials, rng, STEPS, reference.seconds):
        killed += 1
        kill(pipeline)
        if pipeline.is_done():
            break
    if pipeline.is_done():
        pipeline.reconcile()
    else:
        assert pipeline.run() == 0, pipeline.output
    assert check_result(pipeline) == reference
    trials.recover(killed)


@takes_minutes
def test_killed_before_mlflow_knows_of_it(pipeline: Pipeline) -> None:
    pipeline.start()
    wait_for(
        lambda: "Beginning flow run" in pipeline.output or None, seconds=ENOUGH_S, what="a start"
    )
    kill(pipeline)
    assert pipeline.flow_run_states() == ["RUNNING"]
    pipeline.reconcile()
    assert pipeline.flow_run_states() == ["CRASHED"]


def ask_to_end(process: "subprocess.Popen[bytes]", signum: signal.Signals) -> None:
    """Send a signal, Ctrl-C to every process of the command, as a terminal does."""
    if signum == signal.SIGINT:
        os.killpg(process.pid, signum)
    else:
        process.send_signal(signum)


@takes_minutes
@pytest.mark.parametrize("number", range(NUM_RUNS // 5))
def test_asked_to_end_at_any_moment(
    number: int, pipeline: Pipeline, reference: Reference, trials: Trials, seed: int
) -> None:
    """SIGTERM or Ctrl-C at a random moment of the flow, any step of it.

    Prefect and MLflow agree at the latest when runs are reconciled.
    """
    print(f"seed {seed}, run {number}")
    rng, asked = random.Random(f"{seed}-asked-{number}"), 0
    for process in random_moments(pipeline, trials, rng, STEPS[1:], reference.seconds):
        asked += 1
        ask_to_end(process, rng.choice((signal.SIGTERM, signal.SIGINT)))
        pipeline.wait(60)
        print(pipeline.output)
        if "Exception ignored in" in pipeline.output:
            break  # it came while Python was in a callback that may not raise, and was lost
        assert "Traceback" not in pipeline.output
        assert "FAILED" not in pipeline.flow_run_states()
        assert pipeline.wait_for_processes() == []
        assert pipeline.temporary_files() == []
        if pipeline.disagreements():
            pipeline.reconcile()
        assert pipeline.disagreements() == []
        if not pipeline.checkpoints:
            break
    if not pipeline.is_done():
        assert pipeline.run() == 0, pipeline.output
    assert check_result(pipeline) == reference
    trials.recover(asked)


@pytest.mark.parametrize(
    "signum", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=takes_minutes)]
)
def test_asked_to_end(
    signum: signal.Signals, pipeline: Pipeline, reference: Reference, trials: Trials
) -> None:
    """SIGTERM or Ctrl-C in the middle of training."""
    trials.begin()
    pipeline.start()
    assert pipeline.wait_for_step("train")
    time.sleep(2)
    assert pipeline.process
    ask_to_end(pipeline.process, signum)
    assert pipeline.wait(30) != 0
    assert "Finished in state Cancelled" in pipeline.output
    assert "Traceback" not in pipeline.output
    assert pipeline.statuses() == ["KILLED"]
    assert pipeline.wait_for_processes() == []
    assert pipeline.run() == 0, pipeline.output
    assert check_result(pipeline) == reference
    trials.recover()
