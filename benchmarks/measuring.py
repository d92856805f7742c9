"""How things are measured here: interleaved rounds, medians, and on what machine."""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import torch

from gan.errors import UserError
from gan.training import name_device

OUT = Path("runs/bench")
"""Where the JSON files and plots go if no other folder is given."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What numbers belong to."""

    processor: str
    cores: int
    threads: int
    """Threads that torch computes with on the CPU."""
    gpu: str | None
    python: str
    torch: str
    commit: str

    @classmethod
    def here(cls) -> Self:
        """This machine, with the code as it lies in this folder."""
        return cls(
            processor=name_device(torch.device("cpu")),
            cores=len(os.sched_getaffinity(0)),
            threads=torch.get_num_threads(),
            gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            python=platform.python_version(),
            torch=torch.__version__,
            commit=_commit(),
        )

    def __str__(self) -> str:
        gpu = self.gpu or "no GPU"
        return (
            f"{self.cores} cores {self.processor}, {self.threads} threads, {gpu}; "
            f"Python {self.python}, torch {self.torch}; commit {self.commit}"
        )


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What the rounds of one thing gave."""

    rounds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The round that counts."""
        return statistics.median(self.rounds)

    def scaled(self, factor: float) -> Self:
        """The same in another unit."""
        return type(self)(rounds=tuple(factor * each for each in self.rounds))

    def spread(self, form: str = ",.0f") -> str:
        """The median, and the lowest and the highest round in brackets."""
        low, high = min(self.rounds), max(self.rounds)
        return f"{self.median:{form}} ({low:{form}} to {high:{form}})"


def interleave(
    contestants: Mapping[str, Callable[[], Iterator[int]]], *, rounds: int, seconds: float
) -> dict[str, Measured]:
    """How much a second each contestant gets done.

    A contestant is started once and goes on from round to round; it yields how much it has done
    since its start. They take turns, so that a busy moment touches all alike, in an order that
    moves on by one each round. A first round warms up and does not count.
    """
    running = {name: _Stopwatch(start()) for name, start in contestants.items()}
    found: dict[str, list[float]] = {name: [] for name in running}
    names = list(running)
    for turn in range(rounds + 1):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            rate = running[name].go_on(seconds)
            if turn:
                found[name].append(rate)
    return {name: Measured(rounds=tuple(rates)) for name, rates in found.items()}


class _Stopwatch:
    def __init__(self, work: Iterator[int]) -> None:
        self.work, self.done = work, 0

    def go_on(self, seconds: float) -> float:
        wait_for_device()
        before, started = self.done, time.perf_counter()
        while self.done == before or time.perf_counter() - started < seconds:
            self.done = next(self.work)
        wait_for_device()
        return (self.done - before) / (time.perf_counter() - started)


def options(module: str) -> argparse.ArgumentParser:
    """The options that all benchmarks have."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{module}")
    parser.add_argument("--data", type=Path, default=Path("data/mnist/raw"), help="raw MNIST")
    parser.add_argument("--out", type=Path, default=OUT, help=f"a folder (default: {OUT})")
    parser.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    return parser


def count(text: str) -> int:
    """An option that counts something: 1 or more."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {number}")
    return number


def launch(main: Callable[[], None]) -> None:
    """Run a benchmark; what the user can mend ends it with one sentence."""
    # As Ctrl-C does, SIGTERM ends what was started as well.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted")
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")


def wait_for_device() -> None:
    """Let a GPU finish what it was given."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown; the first column is text, the others are numbers."""
    lines = [headings, ["---", *("---:" for _ in headings[1:])], *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def save(out: Path, name: str, content: Mapping[str, Any]) -> None:
    """Write `content` and the machine that it belongs to into `out`: every round."""
    out.mkdir(parents=True, exist_ok=True)
    whole = json.dumps({"machine": Machine.here(), **content}, indent=2, default=asdict)
    (out / f"{name}.json").write_text(whole + "\n")


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
