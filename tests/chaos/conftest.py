"""Runs of the whole pipeline that are ended in every way, and the table of what became of them."""

import os
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos.pipeline import Pipeline, Reference, make_reference

TALLY = pytest.StashKey[Counter[tuple[str, str]]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[TALLY] = Counter()


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    tally = config.stash[TALLY]
    if not tally:
        return
    terminalreporter.section("faults")
    for fault in dict.fromkeys(fault for fault, _ in tally):
        terminalreporter.write_line(describe(tally, fault))


def describe(tally: Counter[tuple[str, str]], fault: str) -> str:
    """A row of the table."""
    trials, recovered = tally[fault, "trials"], tally[fault, "recovered"]
    return f"{fault:<44} trials {trials:>4}  recovered {recovered:>4}  lost {trials - recovered:>3}"


class Trials:
    """Counts the faults of one kind, and those after which nothing was lost.

    It says so at once, so that a suite that is interrupted has shown how far it came.
    """

    def __init__(
        self, tally: Counter[tuple[str, str]], fault: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        self.tally, self.fault, self.capsys = tally, fault, capsys

    def begin(self) -> None:
        self.tally[self.fault, "trials"] += 1

    def recover(self, num: int = 1) -> None:
        self.tally[self.fault, "recovered"] += num
        with self.capsys.disabled():
            print(f"\n{describe(self.tally, self.fault)}", flush=True)


@pytest.fixture
def trials(request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]) -> Trials:
    """The row of a test in the table; its fault is the first line of the test's docstring."""
    fault = request.function.__doc__.splitlines()[0].rstrip(".")
    return Trials(request.config.stash[TALLY], fault, capsys)


@pytest.fixture(scope="session")
def seed() -> int:
    """Decides when everything is killed: set CHAOS_SEED to repeat what is printed."""
    return int(os.environ.get("CHAOS_SEED") or random.SystemRandom().randrange(10**6))


@pytest.fixture(scope="session")
def reference(
    mnist_dir: Path,
    s3: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> Reference:
    """The same run, never disturbed."""
    return make_reference(tmp_path_factory.mktemp("reference"), mnist_dir.parent, s3)


@pytest.fixture
def pipeline(
    mnist_dir: Path,
    s3: str,
    tmp_path: Path,
) -> Iterator[Pipeline]:
    """A place to run the pipeline in; no process may be left of it."""
    pipeline = Pipeline(tmp_path, mnist_dir.parent, s3)
    try:
        yield pipeline
    finally:
        pipeline.end()
    assert pipeline.wait_for_processes() == []
