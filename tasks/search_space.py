"""What a sweep searches: values of the recipe's fields, all checked before anything runs."""

from __future__ import annotations

import json
import math
import reprlib
import sys
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from optuna import Trial
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from gan.config import ConfigError, TrainConfig
from gan.errors import UserError

SET_FOR_ALL = frozenset({"recipe", "networks", "num_classes", "epochs", "seed"})
"""Fields that are the same in all trials of a sweep, or else their scores would not compare."""
MAX_BATCH = 60_000
"""The training images there are."""
MAX_BYTES = 100_000
"""No space of a user is nearly as long."""


class SpaceError(UserError):
    """A search space that no sweep can search."""


class Range(BaseModel):
    """All numbers from `low` to `high`."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    low: int | float = Field(description="The smallest value.")
    high: int | float = Field(description="The largest value.")
    log: bool = Field(False, description="Spread the tries evenly over the magnitudes.")
    step: int | float | None = Field(None, description="Leave out what lies between such steps.")


Space = dict[str, Range | list[int | float | str]]
"""For each field a range, or the values to choose from."""
Distributions = Mapping[str, BaseDistribution]


def read_space(path: Path) -> Space:
    """Read a search space from a YAML or JSON file.

    Raises:
        SpaceError: there is no such file, or it holds something else.
    """
    try:
        with path.open("rb") as file:
            text = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise SpaceError(f"cannot read the search space {path}: {error.strerror}") from None
    if len(text) > MAX_BYTES:
        raise SpaceError(f"{path} is longer than {MAX_BYTES:,} bytes: that is no search space")
    try:
        content = _parse(text)
    except SpaceError as error:
        raise SpaceError(f"{path} {error}") from None
    except Exception:  # what a tag makes of its value raises half a dozen different ones
        raise SpaceError(f"{path} is neither YAML nor JSON") from None
    try:
        return TypeAdapter(Space).validate_python(content)
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(str(part) for part in fault["loc"])
        raise SpaceError(
            f"{path}: {where or 'the whole'}: {fault['msg']}; a field takes a list of values, or a "
            "range such as {low: 0.1, high: 1.0, log: true}"
        ) from None


def _parse(text: bytes) -> Any:
    # JSON comes first: in YAML 1.1, 1e-4 is a text and a tab no space.
    try:
        return json.loads(text, object_pairs_hook=_refuse_twins)
    except (json.JSONDecodeError, UnicodeDecodeError):
        return yaml.load(text, _Loader)


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """YAML without merged mappings, by which a few lines become more than fits into any memory."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Refuse what `SafeLoader` would merge, and names that are there twice."""
        if any(key.tag == "tag:yaml.org,2002:merge" for key, _ in node.value):
            raise SpaceError("merges mappings with <<: write them out")
        _refuse_twins([(key.value, value) for key, value in node.value])


def _refuse_twins(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    """The mapping of these names and values, of which the last of equal names would stand."""
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        raise SpaceError("says one name twice in a mapping")
    return mapping


def build_distributions(space: Space, config: TrainConfig) -> Distributions:
    """The space as Optuna knows it; a training can run with every end and every choice.

    Raises:
        SpaceError: an unknown field, an empty range, or a value that the field does not take.
    """
    if not space:
        raise SpaceError("the search space is empty: name a field and the values to try")
    return {name: _build(name, dimension, config) for name, dimension in space.items()}


def _build(
    name: str, dimension: Range | list[int | float | str], config: TrainConfig
) -> BaseDistribution:
    kinds = get_type_hints(TrainConfig) | get_type_hints(type(config.networks))
    known = [field for field in _names(config) if field not in SET_FOR_ALL]
    if name not in known:
        why = "is the same in all trials" if name in SET_FOR_ALL else "is no field"
        raise SpaceError(
            f"{reprlib.repr(name)} {why} of recipe {config.recipe}; to search there are: "
            f"{', '.join(known)}"
        )
    a_range = isinstance(dimension, Range)
    tried = [dimension.low, dimension.high] if isinstance(dimension, Range) else dimension
    try:
        for value in tried:
            change(config, {name: value})
    except ConfigError as error:
        raise SpaceError(f"the search space has {error}") from None
    if name == "batch_size" and any(value > MAX_BATCH for value in tried):  # type: ignore[operator]
        raise SpaceError(f"batch_size must be at most the {MAX_BATCH} images there are")
    try:
        if not isinstance(dimension, Range):
            return CategoricalDistribution(dimension)
        low, high, log, step = dimension.low, dimension.high, dimension.log, dimension.step
        # A whole number may be larger than any float.
        if step is not None and not abs(step) <= sys.float_info.max:
            raise ValueError("step must be a finite number")
        if kinds[name] is int:
            if not isinstance(step, int | None):
                raise ValueError("step must be a whole number")
            return IntDistribution(int(low), int(high), log=log, step=1 if step is None else step)
        try:
            return FloatDistribution(float(low), float(high), log=log, step=step)
        except ArithmeticError:
            raise ValueError("step is too small") from None
    except ValueError as error:
        reason = " ".join(str(error).replace("`", "").split()).rstrip(".")
        what = "range" if a_range else "choices"
        raise SpaceError(f"the {what} of {name} cannot be searched: {reason}") from None


def _names(config: TrainConfig) -> list[str]:
    return [field.name for part in (config, config.networks) for field in fields(part)]


def change(config: TrainConfig, values: Mapping[str, Any]) -> TrainConfig:
    """The config with other values of its fields or of its networks' fields.

    Raises:
        ConfigError: no training can run with a value.
    """
    inner = {field.name for field in fields(config.networks)}
    networks = {name: value for name, value in values.items() if name in inner}
    outer = {name: value for name, value in values.items() if name not in inner}
    return replace(config, networks=replace(config.networks, **networks), **outer)


def suggest(trial: Trial, distributions: Distributions) -> dict[str, Any]:
    """The values that the trial proposes; asked again, the same."""
    values: dict[str, Any] = {}
    for name, kind in distributions.items():
        match kind:
            case IntDistribution(low=low, high=high, step=step, log=log):
                values[name] = trial.suggest_int(name, low, high, step=step, log=log)
            case FloatDistribution(low=low, high=high, step=step, log=log):
                values[name] = trial.suggest_float(name, low, high, step=step, log=log)
            case CategoricalDistribution(choices=choices):
                values[name] = trial.suggest_categorical(name, choices)
    return values


def find_middle(distributions: Distributions) -> dict[str, Any]:
    """The middle of the space: of magnitudes where they are searched, and of lists as written."""
    return {name: _middle(kind) for name, kind in distributions.items()}


def _middle(kind: BaseDistribution) -> Any:
    if isinstance(kind, CategoricalDistribution):
        return kind.choices[len(kind.choices) // 2]
    assert isinstance(kind, IntDistribution | FloatDistribution)
    if kind.log:
        middle = min(
            max(math.exp((math.log(kind.low) + math.log(kind.high)) / 2), kind.low), kind.high
        )
    else:
        step = kind.step or 0
        half = (kind.high - kind.low) / 2
        middle = kind.low + (half // step * step if step else half)
    return round(middle) if isinstance(kind, IntDistribution) else middle


def describe_space(distributions: Distributions) -> dict[str, str]:
    """Each field's values in a few words."""
    return {name: _describe(kind) for name, kind in distributions.items()}


def _describe(kind: BaseDistribution) -> str:
    if isinstance(kind, CategoricalDistribution):
        return ", ".join(str(choice) for choice in kind.choices)
    assert isinstance(kind, IntDistribution | FloatDistribution)
    how = ", by magnitude" if kind.log else ""
    step = f", every {kind.step}" if kind.step and kind.step != 1 else ""
    return f"{kind.low} to {kind.high}{how}{step}"
