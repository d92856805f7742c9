"""How a training goes, in the terminal or the log and on the flow run's page; and its pauses."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import cast
from uuid import UUID

from prefect import get_run_logger
from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.context import FlowRunContext
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar

from gan.training import Progress

NOTE_EVERY_S = 10.0
"""How often the log gets a line and the flow run's page a new percentage."""


@contextmanager
def live_progress(epochs: int) -> Iterator[Callable[[Progress], None]]:
    """Gives a function that shows each report of the training: a live bar in a terminal."""
    note = _notes()
    console = Console(stderr=True)
    if not console.is_terminal:
        yield note
        return
    text = TextColumn("{task.fields[text]}")
    with Bar(TextColumn("epoch"), MofNCompleteColumn(), BarColumn(), text, console=console) as bar:
        shown = bar.add_task("train", total=epochs, text="")

        def show(progress: Progress) -> None:
            done = progress.step / progress.num_steps * epochs
            bar.update(shown, completed=done, text=describe(progress))
            note(progress, quiet=True)

        yield show


def _notes() -> Callable[..., None]:
    """Gives a function that now and then writes a line and moves the page's percentage."""
    logger = get_run_logger()
    artifact = cast(UUID, create_progress_artifact(progress=0.0, key="training"))
    last = float("-inf")

    def note(progress: Progress, *, quiet: bool = False) -> None:
        nonlocal last
        finished = progress.step == progress.num_steps
        if not finished and time.monotonic() - last < NOTE_EVERY_S:
            return
        last = time.monotonic()
        update_progress_artifact(artifact, progress=100 * progress.step / progress.num_steps)
        if not quiet:
            logger.info("epoch %d: %s", progress.epoch, describe(progress))

    return note


def heed_pause() -> None:
    """End a deployed flow run that somebody pauses; resumed, it starts again and goes on.

    Prefect itself looks between tasks alone.

    Raises:
        Pause: Prefect's own, which makes the flow run Suspended.
    """
    if context := FlowRunContext.get():
        context.flow_run_suspension_request.raise_if_requested()


def describe(progress: Progress) -> str:
    """Losses, rate and time left, in one short line."""
    left = timedelta(seconds=round(progress.seconds_left))
    return (
        f"D {progress.d_loss:.3f}  G {progress.g_loss:.3f}  "
        f"D(x) {progress.d_real:.2f}  D(G(z)) {progress.d_fake:.2f}  "
        f"{progress.images_per_s:,.0f} images/s  {left} left"
    )
