"""Training as a step, on real MNIST with tiny budgets, against a real MLflow on SQLite."""

import asyncio
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from prefect import flow
from prefect.testing.utilities import prefect_test_harness

from flows.command_line import PATIENCE_S
from gan.bundle import PRETRAINED, load_bundle
from gan.checkpoint import Checkpoints
from gan.config import MlpConfig, TrainConfig
from gan.data import DATASET_DIGEST
from gan.parallel import PeerError
from gan.recipes import best, vanilla
from gan.training import DivergenceError, Progress, TrainState
from tasks.data import DatasetRef
from tasks.journal import sheet_path
from tasks.progress import describe, heed_pause
from tasks.tracking import EXPERIMENT
from tasks.training import (
    MIN_STEPS_TO_COLLAPSE,
    check_diversity,
    is_picture_epoch,
    save_sheet,
    train_generator,
)
from tests.gan.test_parallel import find_peers
from tests.long import takes_minutes
from tests.mlflow_store import mlflow_store, new_run

TINY = replace(vanilla(), epochs=1, batch_size=5000)


@pytest.fixture(scope="module")
def _servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A Prefect API for the step's log and page, and an MLflow store."""
    with (
        mlflow_store(tmp_path_factory.mktemp("store"), EXPERIMENT),
        prefect_test_harness(server_startup_timeout=PATIENCE_S),
    ):
        yield


def train_in(
    folder: Path,
    mnist_dir: Path,
    config: TrainConfig = TINY,
    devices: int = 1,
    look: Callable[[TrainState], None] | None = None,
    heed: Callable[[], None] = heed_pause,
) -> str:
    """Train as the only step of a flow; the digest of the bundle."""
    dataset = DatasetRef(folder=mnist_dir, digest=DATASET_DIGEST, sources=())
    run_id = new_run(EXPERIMENT)

    @flow
    def only_train() -> str:
        return train_generator(
            config, dataset, "cpu", run_id, folder, 0.0, devices, look=look, heed=heed
        ).digest

    return only_train()


@pytest.mark.slow
@pytest.mark.usefixtures("_servers")
def test_an_exception_keeps_the_last_good_checkpoint_and_leaves_no_bundle(
    tmp_path: Path, mnist_dir: Path
) -> None:
    hopeless = replace(TINY, r1_gamma=1e38, penalty_interval=10**9)
    good = Checkpoints(tmp_path / "checkpoints").save(TrainState(hopeless, torch.device("cpu")))
    with pytest.raises(DivergenceError, match="the losses are no numbers any more in epoch"):
        train_in(tmp_path, mnist_dir, hopeless)
    assert Checkpoints(tmp_path / "checkpoints").find() == [good]
    assert not (tmp_path / "bundle").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("_servers")
def test_what_prefect_raises_in_the_middle_has_the_state_saved_first(
    tmp_path: Path, mnist_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a run lost its slot because its machine was not heard of."""

    def lose_the_slot() -> None:
        raise asyncio.CancelledError

    monkeypatch.setattr(Checkpoints, "save_if_due", lambda *_: None)
    with pytest.raises(asyncio.CancelledError):
        train_in(tmp_path, mnist_dir, heed=lose_the_slot)
    kept = Checkpoints(tmp_path / "checkpoints").load(TINY, torch.device("cpu"))
    assert kept is not None
    assert kept.step > 0


@pytest.mark.slow
@pytest.mark.usefixtures("_servers")
def test_a_training_taken_up_at_its_end_only_writes_the_bundle_again(
    tmp_path: Path, mnist_dir: Path
) -> None:
    digest = train_in(tmp_path, mnist_dir)
    (tmp_path / "bundle" / "config.json").unlink()
    assert train_in(tmp_path, mnist_dir) == digest


@pytest.mark.slow
@pytest.mark.chaos
@takes_minutes
@pytest.mark.usefixtures("_servers")
def test_two_devices_learn_as_one_does_and_go_on_after_a_peer_was_killed(
    tmp_path: Path, mnist_dir: Path
) -> None:
    config = replace(vanilla(), networks=MlpConfig(dropout=0), epochs=2, batch_size=6000)

    def strike(state: TrainState) -> None:
        (peer,) = find_peers()
        peer.kill()

    train_in(tmp_path / "alone", mnist_dir, config)
    together = train_in(tmp_path / "together", mnist_dir, config, devices=2)
    sentence = r"device 2 of 2 is gone: ended by SIGKILL; the same training, resumed, goes on"
    with pytest.raises(PeerError, match=sentence):
        train_in(tmp_path / "struck", mnist_dir, config, devices=2, look=strike)
    assert not find_peers()
    assert train_in(tmp_path / "struck", mnist_dir, config, devices=2) == together

    losses = ["d_loss", "g_loss", "d_real", "d_fake"]
    ours, theirs = (
        pd.read_csv(tmp_path / name / "history.csv")[losses] for name in ("together", "alone")
    )
    pd.testing.assert_frame_equal(ours, theirs, rtol=0.01)


def collapsed_state(step: int) -> TrainState:
    """A generator that draws the same picture whatever the noise."""
    state = TrainState(vanilla(), torch.device("cpu"))
    state.step = step
    first = state.sampler.layers[0]  # type: ignore[union-attr]
    torch.nn.init.zeros_(first.weight)
    return state


def test_a_generator_that_draws_one_digit_only_is_stopped() -> None:
    with pytest.raises(DivergenceError, match=r"collapsed .* sees a \d in 500 of 500 drawings"):
        check_diversity(collapsed_state(MIN_STEPS_TO_COLLAPSE))


def test_a_conditional_generator_that_draws_one_picture_a_digit_is_stopped() -> None:
    """Its weights are those of the good one that comes with the package, without the noise."""
    state = TrainState(best(), torch.device("cpu"))
    generator = load_bundle(PRETRAINED)
    state.sampler.load_state_dict(generator.state_dict())
    state.step = MIN_STEPS_TO_COLLAPSE
    check_diversity(state)
    state.sampler.register_forward_pre_hook(lambda _, given: (torch.zeros_like(given[0]), given[1]))
    with pytest.raises(DivergenceError, match=r"collapsed .*: all its drawings of a digit are"):
        check_diversity(state)


def test_no_checkpoint_of_a_collapsed_generator_is_saved(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, every_s=0)
    good = collapsed_state(MIN_STEPS_TO_COLLAPSE - 1)
    checkpoints.save_if_due(good, check_diversity)
    with pytest.raises(DivergenceError):
        checkpoints.save_if_due(collapsed_state(MIN_STEPS_TO_COLLAPSE), check_diversity)
    (kept,) = checkpoints.find()
    assert f"{good.step:012}" in kept.name


def test_one_that_had_no_time_to_learn_is_not() -> None:
    check_diversity(collapsed_state(MIN_STEPS_TO_COLLAPSE - 1))


def test_a_sheet_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the power may fail; what the disk then has is beyond a test."""
    sheet, synced = sheet_path(tmp_path, 1), []

    def note(descriptor: int) -> None:
        synced.append((os.fstat(descriptor).st_size, sheet.exists()))

    monkeypatch.setattr(os, "fsync", note)
    save_sheet(TrainState(TINY, torch.device("cpu")), sheet)
    assert synced == [(sheet.stat().st_size, False)]
    assert list(sheet.parent.iterdir()) == [sheet]


BOUNDED = {
    "cpu": """
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 300 * 2**20,) * 2)
""",
    "cuda": "torch.cuda.set_per_process_memory_fraction(0.01)",
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
            ],
        ),
    ],
)
def test_a_batch_that_does_not_fit_is_said_in_a_sentence(device: str) -> None:
    """In a process of its own, whose memory is bounded."""
    script = f"""
import resource, torch
from dataclasses import replace
from gan.recipes import best, vanilla
from gan.training import TrainState, train
from tasks.training import memory_shortage_explained
from tests.gan.test_training import noise_data
config = replace(vanilla(), batch_size=60_000)
state, data = TrainState(config, torch.device("{device}")), noise_data(60_000)
{BOUNDED[device]}
with memory_shortage_explained(config, "{device}"):
    next(train(state, data.to(state.device)))
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        check=False,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": "."},
    )
    assert (
        f"MemoryShortage: the memory of device {device} does not hold a batch of 60000; "
        "ask for a smaller batch_size"
    ) in done.stderr


def test_published_epochs_get_pictures() -> None:
    assert all(is_picture_epoch(epoch, 100) for epoch in (1, 2, 20, 100))


@pytest.mark.parametrize("epochs", [1, 2, 3, 10, 19, 20, 100, 1000])
def test_pictures_are_few_and_hold_first_and_last(epochs: int) -> None:
    drawn = [epoch for epoch in range(1, epochs + 1) if is_picture_epoch(epoch, epochs)]
    assert drawn[0] == 1
    assert drawn[-1] == epochs
    assert len(drawn) <= 24
    if epochs >= 20:
        assert len(drawn) >= 20


def test_progress_line_says_losses_rate_and_time_left() -> None:
    progress = Progress(
        epoch=3,
        epoch_done=False,
        step=10,
        num_steps=100,
        d_loss=1.25,
        g_loss=0.94,
        d_real=0.6,
        d_fake=0.4,
        images_per_s=12345.6,
        seconds_left=3661.2,
    )
    line = describe(progress)
    assert line == ("D 1.250  G 0.940  D(x) 0.60  D(G(z)) 0.40  12,346 images/s  1:01:01 left")
