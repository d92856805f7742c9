"""Every loop that is measured computes what `gan.training` does, given the same noise."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import default_collate

from benchmarks import textbook, variants
from gan.config import ConvConfig, MlpConfig, TrainConfig
from gan.networks import build_discriminator, build_generator
from gan.recipes import RECIPES, quick, vanilla
from gan.training import TrainState, train
from tests.gan.test_training import noise_data

CPU = torch.device("cpu")
DATA = noise_data(32)
# One batch is the whole data: then its order decides nothing.
SHORT: dict[str, Any] = {"epochs": 6, "batch_size": len(DATA), "precision": "float32"}
STEADY = replace(vanilla(), networks=MlpConfig(dropout=0.0), **SHORT)


def shrink(config: TrainConfig) -> TrainConfig:
    """The recipe with smaller networks, and nothing random in them but the noise.

    Steps as large as those of `quick` let the order of sums grow into a difference.
    """
    conv = ConvConfig(width=2, dots=2)
    small = MlpConfig(dropout=0.0) if config.networks.num_classes == 0 else conv
    return replace(config, networks=small, learning_rate=min(config.learning_rate, 5e-4), **SHORT)


class Replay:
    """The order of the data and the noise that `train` draws for a config, step by step."""

    def __init__(self, config: TrainConfig) -> None:
        self.rng = TrainState(config, CPU).rng
        self.shape = (config.batch_size, config.networks.latent_dim)
        self.side = config.networks.side
        self.noise: list[Tensor] = []

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[list[Tensor]]:
        order = torch.randperm(len(DATA), generator=self.rng)
        self.noise = [torch.randn(self.shape, generator=self.rng) for _ in range(2)]
        images = textbook.PilImages(DATA, self.side)
        yield default_collate([images[index] for index in order])

    def draw(self, *_: Any) -> Tensor:
        if not self.noise:  # where the order is drawn elsewhere
            next(iter(self))
        return self.noise.pop(0)


@pytest.fixture
def replay(monkeypatch: pytest.MonkeyPatch) -> Callable[[TrainConfig], Replay]:
    """Gives the measured loops the weights and the noise that `train` begins with."""

    def prepare(config: TrainConfig) -> Replay:
        replayed = Replay(config)
        monkeypatch.setattr(textbook, "noise", replayed.draw)
        torch.manual_seed(config.seed)
        return replayed

    return prepare


def losses_of(state: TrainState) -> Tensor:
    """The losses of each step of a training to its end: float32 [steps, 2]."""
    reports = train(state, DATA, report_every_s=math.inf)
    return torch.tensor([(report.d_loss, report.g_loss) for report in reports])


@pytest.mark.parametrize(
    "config",
    [
        *(shrink(recipe()) for recipe in RECIPES.values()),
        shrink(replace(quick(), loss="relativistic", r2_gamma=0.2)),
        shrink(replace(quick(), r1_gamma=0.0, ema_halflife_images=0.0, cooldown=0.0)),
    ],
    ids=[*RECIPES, "relativistic", "bare"],
)
def test_the_textbook_trains_as_we_do(
    config: TrainConfig, replay: Callable[[TrainConfig], Replay]
) -> None:
    state = TrainState(config, CPU)
    expected = losses_of(state)
    batches = replay(config)
    pair = textbook.build_pair(config, CPU)
    found = torch.tensor(list(textbook.train(pair, batches, config)))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    # Adam takes whole steps by gradients that are rounding errors alone, which ink has many of; the
    # average of weights has little of the last.
    steps = config.epochs
    spread = 1e-4 if config.ema_halflife_images else steps * config.learning_rate
    for theirs, mine in zip(pair.average.parameters(), state.sampler.parameters(), strict=True):
        torch.testing.assert_close(theirs, mine, rtol=1e-3, atol=spread)


@pytest.fixture(scope="module")
def course() -> Tensor:
    """The losses of `train` in float32 without dropout."""
    return losses_of(TrainState(STEADY, CPU))


@pytest.mark.parametrize("num", range(len(variants.TRICKS) + 1))
def test_no_trick_changes_the_algorithm(
    num: int, course: Tensor, replay: Callable[[TrainConfig], Replay]
) -> None:
    # In bfloat16, where it is native, losses of about 1 are good to two digits.
    tricks = variants.TRICKS[:num]
    tolerance = 0.02 if variants.BFLOAT16 in tricks else 1e-4
    replay(STEADY)
    losses = variants.train_with(tricks, replace(STEADY, precision="mixed"), DATA, CPU)
    found = torch.stack([torch.as_tensor(each) for each in losses])
    torch.testing.assert_close(found, course, rtol=tolerance, atol=tolerance)


def test_both_have_the_same_number_of_parameters() -> None:
    for recipe in RECIPES.values():
        config = recipe()
        pair = textbook.build_pair(config, CPU)
        for theirs, mine in (
            (pair.generator, build_generator(config.networks)),
            (pair.discriminator, build_discriminator(config.networks, torch.Generator())),
        ):
            sizes = [sum(p.numel() for p in net.parameters()) for net in (theirs, mine)]
            assert sizes[0] == sizes[1] > 0


def test_masks_drop_the_asked_share_whoever_draws_them() -> None:
    pair = textbook.build_pair(vanilla(), CPU)
    (rate,) = {m.p for m in pair.discriminator.modules() if isinstance(m, torch.nn.Dropout)}
    assert rate == pytest.approx(0.3, abs=1e-5)
