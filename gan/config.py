"""What a training is made of: frozen, typed, checked when made."""

from __future__ import annotations

import reprlib
import sys
from dataclasses import dataclass
from typing import Literal, get_args, get_origin, get_type_hints

from gan.errors import UserError

Loss = Literal["logistic", "relativistic"]
Precision = Literal["float32", "mixed"]

BOX = 20
"""Pixels: the side of the box that each of MNIST's digits fills, in height or width."""
NUM_SEEDS = 2**32
"""Seeds are below it: torch's generator on the CPU takes no more bits, and would draw one seed's
numbers for another."""


class ConfigError(UserError):
    """A setting that no training can run with."""


@dataclass(frozen=True, kw_only=True)
class MlpConfig:
    """The fully connected pair of the vanilla GAN; it knows no digits."""

    latent_dim: int = 100
    """Length of the noise vector, drawn from a standard normal."""
    dropout: float = 0.3
    """Share of the discriminator's hidden units zeroed in training."""

    @property
    def num_classes(self) -> int:
        """0: the pair is unconditional."""
        return 0

    @property
    def side(self) -> int:
        """28: the pair plays with whole images."""
        return 28

    def __post_init__(self) -> None:
        _require_types(self)
        _require(1 <= self.latent_dim <= 512, "latent_dim must be 1 to 512", self.latent_dim)
        _require(0 <= self.dropout < 1, "dropout must be at least 0 and below 1", self.dropout)


@dataclass(frozen=True, kw_only=True)
class ConvConfig:
    """The class-conditional convolutional pair."""

    latent_dim: int = 64
    """Length of the noise vector, drawn from a standard normal."""
    width: int = 16
    """Channels of the generator's finest layer; the others are multiples of it."""
    fine_layers: int = 0
    """3x3 convolutions at the images' full size that each network has besides."""
    dots: int = 0
    """Dots of ink along a pixel's side that the generator draws, for MNIST's own scanner to turn
    into greys (`gan.scan`); the pair then plays with what fills MNIST's box of 20. 0: it draws the
    28 x 28 pixels themselves."""
    num_classes: int = 10
    """Digits that can be asked for."""

    @property
    def side(self) -> int:
        """Pixels along the square that the pair plays with."""
        return BOX if self.dots else 28

    def __post_init__(self) -> None:
        _require_types(self)
        _require(1 <= self.latent_dim <= 512, "latent_dim must be 1 to 512", self.latent_dim)
        _require(1 <= self.width <= 128, "width must be 1 to 128", self.width)
        _require(0 <= self.fine_layers <= 4, "fine_layers must be 0 to 4", self.fine_layers)
        _require(0 <= self.dots <= 8, "dots must be 0 to 8", self.dots)
        _require(self.num_classes == 10, "num_classes must be 10", self.num_classes)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that decides the weights, given the data and the kind of device."""

    recipe: str
    """Name of the recipe that this config started from."""
    networks: MlpConfig | ConvConfig
    """The pair to train."""
    loss: Loss
    """`logistic`: the non-saturating loss; `relativistic`: real and fake paired (R3GAN)."""
    epochs: int
    """Passes over the training images."""
    batch_size: int
    """Real images a step; as many fakes are drawn."""
    learning_rate: float
    """Adam's step size, for both networks."""
    beta1: float = 0.9
    """Adam's decay of the gradient's mean."""
    beta2: float = 0.999
    """Adam's decay of the gradient's square."""
    cooldown: float = 0.0
    """Share of the steps, at the end, over which the learning rate falls linearly to 0."""
    r1_gamma: float = 0.0
    """Weight of the R1 penalty: squared gradient of the discriminator at real images."""
    r2_gamma: float = 0.0
    """Weight of the R2 penalty: the same at fakes."""
    penalty_interval: int = 1
    """Apply the penalties every so many steps, as many times as strong."""
    ema_halflife_images: float = 0.0
    """Real images after which a weight counts half in the generator's average; 0: no average."""
    precision: Precision = "float32"
    """`mixed`: bfloat16 products where the device computes in it natively, else float32."""
    seed: int = 0
    """Decides initial weights, order of the data, noise and dropout."""

    @property
    def penalised(self) -> bool:
        """Whether the discriminator pays for its gradient."""
        return self.r1_gamma > 0 or self.r2_gamma > 0

    def __post_init__(self) -> None:
        _require_types(self)
        _require(self.epochs >= 1, "epochs must be at least 1", self.epochs)
        _require(self.batch_size >= 2, "batch_size must be at least 2", self.batch_size)
        _require(0 < self.learning_rate <= 1, "learning_rate must be above 0 and at most 1",
                 self.learning_rate)  # fmt: skip
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            _require(0 <= value < 1, f"{name} must be at least 0 and below 1", value)
        _require(0 <= self.cooldown <= 1, "cooldown must be 0 to 1", self.cooldown)
        for name in ("r1_gamma", "r2_gamma", "ema_halflife_images"):
            value = getattr(self, name)
            _require(value >= 0, f"{name} must be at least 0", value)
        _require(self.penalty_interval >= 1, "penalty_interval must be at least 1",
                 self.penalty_interval)  # fmt: skip
        _require(0 <= self.seed < NUM_SEEDS, "seed must be 0 to 2**32 - 1", self.seed)


def _require(holds: bool, rule: str, value: object) -> None:
    if not holds:
        try:
            found = reprlib.repr(value)
        except ValueError:  # Python refuses to write out more than 4,300 digits
            found = "a number of thousands of digits"
        raise ConfigError(f"{rule}, not {found}")


def _require_types(config: object) -> None:
    """Hold the fields to their annotations, which Python itself does not."""
    for name, kind in get_type_hints(type(config)).items():
        value = getattr(config, name)
        if kind is int:
            _require(type(value) is int, f"{name} must be a whole number", value)
            _require(abs(value) < 10**18, f"{name} must be of at most 18 digits", value)
        elif kind is float:
            finite = type(value) in (int, float) and abs(value) <= sys.float_info.max
            _require(finite, f"{name} must be a finite number", value)
        elif get_origin(kind) is Literal:
            known = get_args(kind)
            _require(value in known, f"{name} must be {' or '.join(known)}", value)
        else:
            _require(isinstance(value, kind), f"{name} must be of type {kind}", value)
