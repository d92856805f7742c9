"""How a training grows with epochs, batch and processes: `python -m benchmarks.growth`.

The fully connected pair on the CPU, on a part of the data where that is enough.
"""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from benchmarks.measuring import Machine, Measured, count, interleave, launch, options, save, table
from gan.data import Split, load_mnist
from gan.recipes import vanilla
from gan.training import TrainState, choose_device, train

EPOCHS = 8
PART = 6_000
"""Images of an epoch where the number of epochs is what grows."""
BATCHES = (25, 50, 100, 200, 400, 800, 1600)
PROCESSES = (1, 2)
STEPS = 100
WARM_UP = 20
RATE = "real images a second"

Growth = dict[str, Any]
"""What was measured, under the names that it has in the JSON file."""


def against_epochs(data: Split, device: torch.device) -> list[float]:
    """Seconds from the start to the end of each epoch of one training on a part of the data."""
    part = Split(images=data.images[:PART], labels=data.labels[:PART]).to(device)
    state = TrainState(replace(vanilla(), epochs=EPOCHS), device)
    started = time.perf_counter()
    return [
        time.perf_counter() - started
        for report in train(state, part, report_every_s=math.inf)
        if report.epoch_done
    ]


def against_batch(
    data: Split, device: torch.device, *, rounds: int, seconds: float
) -> dict[int, Measured]:
    """Real images a second for each size of a batch."""
    here = data.to(device)

    def start(size: int) -> Iterator[int]:
        state = TrainState(replace(vanilla(), epochs=100_000, batch_size=size), device)
        for progress in train(state, here, report_every_s=0.1):
            yield progress.step * size

    found = interleave(
        {str(size): partial(start, size) for size in BATCHES}, rounds=rounds, seconds=seconds
    )
    return {int(size): measured for size, measured in found.items()}


def against_processes(folder: Path, *, rounds: int) -> dict[str, dict[int, Measured]]:
    """Real images a second of processes with one thread each, for batches of 100 and of 1,000."""
    rates: dict[tuple[str, int], list[float]] = {}
    for _ in range(rounds):
        for size in ("100", "1000"):
            for num in PROCESSES:
                rates.setdefault((size, num), []).append(_together(num, folder, size))
    return {
        f"batch {size}": {num: Measured(rounds=tuple(rates[size, num])) for num in PROCESSES}
        for size in ("100", "1000")
    }


def _together(num: int, folder: Path, size: str) -> float:
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num}"]
    member = ["-m", "benchmarks.growth", "--data", str(folder), "--member", size]
    done = subprocess.run(
        [sys.executable, *torchrun, *member],
        env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return float(done.stdout)


def join(folder: Path, size: int) -> None:
    """Train as one of several processes; the first one prints real images a second."""
    distributed.init_process_group("gloo")
    state = TrainState(replace(vanilla(), batch_size=size, epochs=100_000), torch.device("cpu"))
    started = 0.0
    for _ in train(state, load_mnist(folder).train, report_every_s=0):
        if state.step == WARM_UP:
            started = time.perf_counter()
        if state.step == WARM_UP + STEPS:
            break
    if distributed.get_rank() == 0:
        print(STEPS * size / (time.perf_counter() - started))
    distributed.barrier()  # who leaves while another is still at work is aborted now and then
    distributed.destroy_process_group()


def describe(found: Growth) -> str:
    """What grew, a row a measurement."""
    rows = [
        [f"{PART:,} images, {epoch} epochs", f"{seconds:.1f} s"]
        for epoch, seconds in enumerate(found["seconds_at_epoch"], start=1)
    ]
    for size, rate in found["images_per_s_at_batch"].items():
        rows.append([f"batch {size}", f"{rate.spread()} images/s"])
    for name, rates in found["images_per_s_at_processes"].items():
        for num, rate in rates.items():
            rows.append([f"{name}, processes of one thread: {num}", f"{rate.spread()} images/s"])
    return table(["vanilla", "median (lowest to highest)"], rows)


def plot(found: Growth, out: Path) -> None:
    """Draw what grew: a file each."""
    with _axes(out / "performance-epochs.png", f"epochs of {PART:,} images", "seconds") as axes:
        epochs = found["seconds_at_epoch"]
        axes.plot(range(1, len(epochs) + 1), epochs, "o-")
    with _axes(out / "performance-batch.png", "batch", RATE) as axes:
        rates = found["images_per_s_at_batch"]
        axes.semilogx(list(rates), [rate.median for rate in rates.values()], "o-", base=2)
    with _axes(out / "performance-processes.png", "processes, a thread each", RATE) as axes:
        for name, rates in found["images_per_s_at_processes"].items():
            axes.plot(list(rates), [rate.median for rate in rates.values()], "o-", label=name)
        axes.set_xticks(PROCESSES)
        axes.legend()


@contextmanager
def _axes(path: Path, x_label: str, y_label: str) -> Iterator[Any]:
    from matplotlib.figure import Figure  # noqa: PLC0415  # not on every machine

    figure = Figure(figsize=(5, 3.2), layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel=x_label, ylabel=y_label)
    yield axes
    axes.set_ylim(bottom=0)
    figure.savefig(path, dpi=80)


def main() -> None:
    """Measure; write JSON and plots, and print a table."""
    parser = options("growth")
    parser.add_argument("--rounds", type=count, default=2)
    parser.add_argument("--seconds", type=float, default=1.5, help="a batch's share of a round")
    parser.add_argument("--member", type=int, metavar="BATCH", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.member:
        join(given.data, given.member)
        return
    data, device = load_mnist(given.data).train, choose_device(given.device)
    found: Growth = {
        "seconds_at_epoch": against_epochs(data, device),
        "images_per_s_at_batch": against_batch(
            data, device, rounds=given.rounds, seconds=given.seconds
        ),
        "images_per_s_at_processes": against_processes(given.data, rounds=given.rounds),
    }
    print(f"{Machine.here()}\n\n{describe(found)}")
    save(given.out, "growth", found)
    if find_spec("matplotlib"):
        plot(found, given.out)


if __name__ == "__main__":
    launch(main)
