"""Recipes: functions that return a config. Change one with `dataclasses.replace`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from gan.config import ConfigError, ConvConfig, MlpConfig, TrainConfig


def vanilla() -> TrainConfig:
    """The GAN of Goodfellow et al. 2014 as Mosquera's "GANs from scratch" (2018) built it."""
    return TrainConfig(
        recipe="vanilla",
        networks=MlpConfig(),
        loss="logistic",
        epochs=100,
        batch_size=100,
        learning_rate=2e-4,
        precision="mixed",
    )


def quick() -> TrainConfig:
    """Clean digits, drawn as asked, after about five minutes on two CPU cores."""
    return TrainConfig(
        recipe="quick",
        networks=ConvConfig(fine_layers=1, dots=4),
        loss="logistic",
        epochs=9,
        batch_size=128,
        learning_rate=1.5e-3,
        beta1=0.0,
        beta2=0.99,
        cooldown=0.5,
        r1_gamma=0.2,
        penalty_interval=8,
        ema_halflife_images=22_000,
        precision="mixed",
    )


def best() -> TrainConfig:
    """`quick` with twice the channels, a fine layer more and more time.

    Half an hour to an hour on two CPU cores of 2026.
    """
    return replace(
        quick(),
        recipe="best",
        networks=ConvConfig(width=32, fine_layers=2, dots=4),
        epochs=30,
        learning_rate=1e-3,
        ema_halflife_images=50_000,
    )


def configure(recipe: str, **changes: Any) -> TrainConfig:
    """The recipe's config with the changed fields; a field that is None keeps the recipe's value.

    Raises:
        ConfigError: there is no such recipe, or no training can run with a value.
    """
    if recipe not in RECIPES:
        raise ConfigError(f"there is no recipe {recipe}; there are: {', '.join(RECIPES)}")
    given = {name: value for name, value in changes.items() if value is not None}
    return replace(RECIPES[recipe](), **given)


RECIPES = {recipe.__name__: recipe for recipe in (quick, best, vanilla)}
