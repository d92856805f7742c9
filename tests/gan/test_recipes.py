from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from gan.config import ConfigError, ConvConfig, MlpConfig, TrainConfig
from gan.data import Split
from gan.recipes import RECIPES, best, configure, quick, vanilla
from gan.training import TrainState, train


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_bears_its_name_and_takes_a_first_step(name: str) -> None:
    config = RECIPES[name]()
    assert config.recipe == name
    size = config.batch_size
    data = Split(
        images=torch.zeros(size, 28, 28, dtype=torch.uint8),
        labels=torch.zeros(size, dtype=torch.int64),
    )
    state = TrainState(replace(config, epochs=1), torch.device("cpu"))
    assert [progress.step for progress in train(state, data)] == [1]


def test_vanilla_is_the_published_gan() -> None:
    # Whatever the precision, which is a matter of speed.
    assert replace(vanilla(), precision="float32") == TrainConfig(
        recipe="vanilla",
        networks=MlpConfig(latent_dim=100, dropout=0.3),
        loss="logistic",
        epochs=100,
        batch_size=100,
        learning_rate=2e-4,
        beta1=0.9,
        beta2=0.999,
        cooldown=0,
        ema_halflife_images=0,
        precision="float32",
    )
    assert not vanilla().penalised


@pytest.mark.parametrize("recipe", [quick, best])
def test_recipes_of_ours_draw_asked_digits_with_a_penalty_and_an_average(
    recipe: Callable[[], TrainConfig],
) -> None:
    config = recipe()
    assert isinstance(config.networks, ConvConfig)
    assert config.networks.num_classes == 10
    assert config.penalised
    assert config.ema_halflife_images > 0
    assert config.precision == "mixed"


@pytest.mark.parametrize("name", RECIPES)
def test_what_is_given_is_changed_and_the_rest_is_the_recipe(name: str) -> None:
    assert configure(name) == RECIPES[name]()
    assert configure(name, epochs=None, seed=None) == RECIPES[name]()
    assert configure(name, epochs=7, seed=0) == replace(RECIPES[name](), epochs=7)


def test_what_cannot_be_configured_is_refused_in_a_sentence() -> None:
    with pytest.raises(
        ConfigError, match=r"^there is no recipe slow; there are: quick, best, vanilla$"
    ):
        configure("slow")
    with pytest.raises(ConfigError, match=r"^epochs must be at least 1, not 0$"):
        configure("quick", epochs=0)
