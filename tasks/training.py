"""Training as a step: numbers and pictures to MLflow on the way, a bundle at the end."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd
import torch
from mlflow import MlflowClient
from PIL import Image
from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE

from gan.bundle import save_bundle
from gan.checkpoint import Checkpoints
from gan.config import TrainConfig
from gan.data import load_mnist
from gan.errors import OUT_OF_MEMORY, UserError
from gan.evaluation.judge import judge_images, load_judge
from gan.parallel import share_out
from gan.sampling import ANY_DIGIT, draw, draw_sheet
from gan.training import DivergenceError, Progress, TrainState, train
from tasks.data import DatasetRef
from tasks.journal import open_journal, sheet_path
from tasks.pictures import enlarge, find_sheets, plot_losses, save_animation
from tasks.progress import heed_pause, live_progress

SHEET_SEED = 0
"""The noise of the sample sheets: the same in every epoch of every run."""
MIN_STEPS_TO_COLLAPSE = 3000
"""A generator that draws one digit before has perhaps not learned others yet."""
NUM_LOOKED_AT = 500
COLLAPSED_SHARE = 0.99
MIN_SPREAD = 0.02
"""Of drawings of one digit, in each pixel, 0 to 1: of real ones it is 0.1 to 0.2."""


class MemoryShortage(UserError):  # noqa: N818
    """The training does not fit into the memory there is."""


@dataclass(frozen=True, kw_only=True)
class TrainedGenerator:
    """What a training leaves behind."""

    bundle: Path
    digest: str
    """The bundle's sha256."""
    seconds: float
    """Wall time of the training since it was last taken up, pictures and tracking included."""
    images_per_s: float
    """Real images a second in that time."""
    taken_up_at: int = 0
    """The step that time began at, from a checkpoint; 0 if all was trained in one go."""


@task(name="train", cache_policy=NO_CACHE)
def train_generator(
    config: TrainConfig,
    dataset: DatasetRef,
    device: str,
    mlflow_run_id: str,
    folder: Path,
    checkpoint_every_s: float,
    devices: int = 1,
    look: Callable[[TrainState], None] | None = None,
    heed: Callable[[], None] = heed_pause,
) -> TrainedGenerator:
    """Train a generator; leaves its bundle, history and pictures in `folder` and in MLflow.

    Goes on from the newest checkpoint in `folder`, if there is one. Several `devices` share every
    batch. After every epoch that gets a picture, `look` is shown the state; what it raises ends
    the training. So does what `heed` raises, which is called at every report; the state is saved.

    Raises:
        CheckpointError: that checkpoint is of another training, or the disk refuses a new one.
        DivergenceError: the losses are no numbers any more, or only one digit is drawn.
        MemoryShortage: the batch does not fit.
        PeerError: the process of another device is gone.
        ServiceError: MLflow went away and did not come back; the training is whole on disk.
    """
    place = torch.device(device)
    checkpoints = Checkpoints(folder / "checkpoints", every_s=checkpoint_every_s)
    with memory_shortage_explained(config, device):
        data = load_mnist(dataset.folder, place).train
        state = checkpoints.load(config, place) or TrainState(config, place)
    began, started = state.step, time.perf_counter()
    if began:
        get_run_logger().info("going on after step %d, from a checkpoint", began)

    # A signal, or what Prefect raises where a run lost its slot, interrupts this thread, never the
    # one that takes the steps: the state stays whole.
    with (
        memory_shortage_explained(config, device),
        share_out(state, devices, dataset.folder, folder) as check_peers,
        live_progress(config.epochs) as show,
        open_journal(mlflow_run_id, folder, state.history) as journal,
        ThreadPoolExecutor(1, thread_name_prefix="steps") as steps,
    ):
        training = train(state, data)
        if state.step == 0:
            save_sheet(state, sheet_path(folder, 0))

        def advance() -> Progress | None:
            """Take the steps up to the next report, and keep what belongs to it."""
            progress = next(training, None)
            check_peers()
            if progress and progress.epoch_done and is_picture_epoch(progress.epoch, config.epochs):
                check_diversity(state)
                save_sheet(state, sheet_path(folder, progress.epoch))
                if look:
                    look(state)
            if progress:
                checkpoints.save_if_due(state, check_diversity)
            return progress

        def keep() -> None:
            """Save the state, unless a step broke off in the middle."""
            if not under_way.exception():
                check_diversity(state)
                checkpoints.save(state)

        under_way = steps.submit(advance)
        try:
            while progress := under_way.result():
                show(progress)
                heed()
                if progress.epoch_done:
                    journal.offer(progress)
                under_way = steps.submit(advance)
        except BaseException:
            steps.submit(keep)
            raise
        checkpoints.save(state)
        seconds = time.perf_counter() - started
        digest = save_bundle(state.sampler, folder / "bundle")
        journal.deliver()

    curves = pd.DataFrame(asdict(progress) for progress in state.history)
    curves.to_csv(folder / "history.csv", index=False)
    plot_losses(curves, folder / "losses.png")
    save_animation(find_sheets(folder), folder / "progress.gif")
    enlarge(sheet_path(folder, config.epochs), folder / "samples.png")
    for artifact in ("history.csv", "losses.png", "progress.gif", "samples.png"):
        MlflowClient().log_artifact(mlflow_run_id, str(folder / artifact))
    return TrainedGenerator(
        bundle=folder / "bundle",
        digest=digest,
        seconds=seconds,
        images_per_s=(state.step - began) * config.batch_size / seconds,
        taken_up_at=began,
    )


def save_sheet(state: TrainState, path: Path) -> None:
    """Draw a sheet of digits from the noise that is the same for all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet = Image.fromarray(draw_sheet(state.sampler, seed=SHEET_SEED).numpy())
    # The name appears with the whole picture, on the disk: a process may die at any moment, and the
    # power fail. Who goes on from a checkpoint does not draw it again, and needs it at the end.
    part = path.with_suffix(".part")
    sheet.save(part, format="png")
    with part.open("rb") as file:
        os.fsync(file.fileno())
    part.rename(path)


def check_diversity(state: TrainState) -> None:
    """See that a generator that had time to learn draws more than one digit, and not one picture
    of each.

    Raises:
        DivergenceError: the judge sees the same digit in nearly all drawings, or those of a digit
            hardly differ.
    """
    if state.step < MIN_STEPS_TO_COLLAPSE:
        return
    drawn = draw(state.sampler, [ANY_DIGIT], num=NUM_LOOKED_AT, seed=SHEET_SEED)
    digits = judge_images(load_judge(), drawn).digits
    seen, collapsed = digits.bincount(minlength=10), f"collapsed by epoch {len(state.history)}"
    if int(seen.max()) > COLLAPSED_SHARE * NUM_LOOKED_AT:
        raise DivergenceError(
            f"the generator {collapsed}: the judge sees a {int(seen.argmax())} in "
            f"{int(seen.max())} of {NUM_LOOKED_AT} drawings"
        )
    groups = [drawn[digits == digit] / 255 for digit in range(10) if seen[digit] > 1]
    spread = float(torch.stack([group.std(0).mean() for group in groups]).mean())
    if spread < MIN_SPREAD:
        raise DivergenceError(f"the generator {collapsed}: all its drawings of a digit are alike")


def is_memory_shortage(error: BaseException) -> bool:
    """Whether the machine or its GPU had no more memory; torch's CPU allocator says so in words."""
    in_words = isinstance(error, RuntimeError) and OUT_OF_MEMORY.search(str(error))
    return isinstance(error, MemoryError) or bool(in_words)


@contextmanager
def memory_shortage_explained(config: TrainConfig, device: str) -> Iterator[None]:
    """Say in a sentence what a training that does not fit into memory can do.

    Raises:
        MemoryShortage: in the place of every error that says so.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_memory_shortage(error):
            raise
        raise MemoryShortage(
            f"the memory of device {device} does not hold a batch of {config.batch_size}; "
            f"ask for a smaller batch_size"
        ) from error


def is_picture_epoch(epoch: int, epochs: int) -> bool:
    """Whether to draw a sheet: the first two, the last, and about twenty at even distances."""
    return epoch in (1, 2, epochs) or epoch % max(1, epochs // 20) == 0
