"""Showing how a training goes: a live bar in a terminal, a line now and then in a log."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from prefect import get_run_logger
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar

from gan.training import Progress

LINE_EVERY_S = 10.0


@contextmanager
def live_progress(epochs: int) -> Iterator[Callable[[Progress], None]]:
    """Gives a function that shows each report of the training."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _lines()
        return
    text = TextColumn("{task.fields[text]}")
    with Bar(TextColumn("epoch"), MofNCompleteColumn(), BarColumn(), text, console=console) as bar:
        shown = bar.add_task("train", total=epochs, text="")

        def show(progress: Progress) -> None:
            done = progress.step / progress.num_steps * epochs
            bar.update(shown, completed=done, text=describe(progress))

        yield show


def _lines() -> Callable[[Progress], None]:
    logger = get_run_logger()
    last = float("-inf")

    def show(progress: Progress) -> None:
        nonlocal last
        finished = progress.step == progress.num_steps
        if finished or time.monotonic() - last >= LINE_EVERY_S:
            last = time.monotonic()
            logger.info("epoch %d: %s", progress.epoch, describe(progress))

    return show


def describe(progress: Progress) -> str:
    """Losses, rate and time left, in one short line."""
    left = timedelta(seconds=round(progress.seconds_left))
    return (
        f"D {progress.d_loss:.3f}  G {progress.g_loss:.3f}  "
        f"D(x) {progress.d_real:.2f}  D(G(z)) {progress.d_fake:.2f}  "
        f"{progress.images_per_s:,.0f} images/s  {left} left"
    )
