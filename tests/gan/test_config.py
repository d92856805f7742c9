from dataclasses import FrozenInstanceError, fields, replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gan.bundle import MAX_BYTES, WEIGHTS
from gan.config import ConfigError, ConvConfig, MlpConfig, TrainConfig
from gan.networks import build_generator

CONFIG = TrainConfig(
    recipe="plain",
    networks=ConvConfig(),
    loss="logistic",
    epochs=1,
    batch_size=2,
    learning_rate=1e-3,
)

anything = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(10**399, 10**400),
    st.builds(lambda: 10**5000),
    st.floats(),
    st.text(max_size=3),
    st.lists(st.integers(), max_size=2),
    st.dictionaries(st.text(max_size=2), st.integers(), max_size=2),
)


def refusal_of(config: Any, field: str, value: Any) -> str | None:
    """What is said against this value of a config's field."""
    try:
        replace(config, **{field: value})
    except ConfigError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        ("epochs", 0, "epochs must be at least 1, not 0"),
        ("epochs", 10**18, "epochs must be of at most 18 digits, not 1000000000000000000"),
        ("batch_size", 1, "batch_size must be at least 2, not 1"),
        ("batch_size", 64.0, "batch_size must be a whole number, not 64.0"),
        ("batch_size", "64", "batch_size must be a whole number, not '64'"),
        ("batch_size", True, "batch_size must be a whole number, not True"),
        ("learning_rate", 0.0, "learning_rate must be above 0 and at most 1, not 0.0"),
        ("learning_rate", 1.1, "learning_rate must be above 0 and at most 1, not 1.1"),
        ("learning_rate", float("nan"), "learning_rate must be a finite number, not nan"),
        ("beta1", 1.0, "beta1 must be at least 0 and below 1, not 1.0"),
        ("beta2", -0.1, "beta2 must be at least 0 and below 1, not -0.1"),
        ("cooldown", 1.5, "cooldown must be 0 to 1, not 1.5"),
        ("r1_gamma", -1.0, "r1_gamma must be at least 0, not -1.0"),
        ("r2_gamma", float("inf"), "r2_gamma must be a finite number, not inf"),
        ("penalty_interval", 0, "penalty_interval must be at least 1, not 0"),
        ("ema_halflife_images", -1, "ema_halflife_images must be at least 0, not -1"),
        ("seed", -1, "seed must be 0 to 2**32 - 1, not -1"),
        ("seed", 2**32, "seed must be 0 to 2**32 - 1, not 4294967296"),
        ("loss", "hinge", "loss must be logistic or relativistic, not 'hinge'"),
        ("precision", "half", "precision must be float32 or mixed, not 'half'"),
    ],
)
def test_nonsense_is_refused_in_one_sentence(field: str, value: Any, sentence: str) -> None:
    assert refusal_of(CONFIG, field, value) == sentence


@pytest.mark.parametrize(
    ("kind", "sizes", "sentence"),
    [
        (MlpConfig, {"latent_dim": 0}, "latent_dim must be 1 to 512, not 0"),
        (MlpConfig, {"dropout": 1}, "dropout must be at least 0 and below 1, not 1"),
        (ConvConfig, {"latent_dim": 513}, "latent_dim must be 1 to 512, not 513"),
        (ConvConfig, {"width": 0}, "width must be 1 to 128, not 0"),
        (ConvConfig, {"num_classes": 11}, "num_classes must be 10, not 11"),
    ],
)
def test_impossible_sizes_are_refused(
    kind: type[MlpConfig | ConvConfig], sizes: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ConfigError) as refusal:
        kind(**sizes)
    assert str(refusal.value) == sentence


@pytest.mark.parametrize("config", [CONFIG, MlpConfig(), ConvConfig()])
@given(data=st.data())
def test_any_value_is_taken_in_its_type_or_refused_in_a_short_sentence(
    config: TrainConfig | MlpConfig | ConvConfig, data: st.DataObject
) -> None:
    field = data.draw(st.sampled_from(fields(config)))
    value = data.draw(anything)
    types = {"int": (int,), "float": (int, float), "str": (str,)}
    text = refusal_of(config, field.name, value)
    if text is None:
        assert type(value) in types[str(field.type)]
    else:
        assert len(text) < 200
        assert text.isprintable()


def test_the_largest_generators_fit_into_a_bundle() -> None:
    header = 4096
    for config in (
        MlpConfig(latent_dim=512),
        ConvConfig(latent_dim=512, width=128, fine_layers=4, dots=8),
    ):
        with torch.device("meta"):
            state = build_generator(config).state_dict()
        assert sum(values.nbytes for values in state.values()) + header <= MAX_BYTES[WEIGHTS]


def test_a_config_cannot_be_changed_nor_made_by_position() -> None:
    with pytest.raises(FrozenInstanceError):
        CONFIG.epochs = 2  # type: ignore[misc]
    with pytest.raises(TypeError):
        ConvConfig(64, 16)  # type: ignore[call-arg]


def test_either_penalty_makes_a_training_penalised() -> None:
    assert not CONFIG.penalised
    assert replace(CONFIG, r1_gamma=0.1).penalised
    assert replace(CONFIG, r2_gamma=0.1).penalised
