import json
import math
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.distributions import FloatDistribution, IntDistribution

from gan.recipes import quick, vanilla
from tasks.search_space import (
    Range,
    Space,
    SpaceError,
    build_distributions,
    change,
    describe_space,
    find_middle,
    read_space,
    suggest,
)

ROOT = Path(__file__).parents[2]
MERGED = "\n".join(f"a{n}: &a{n} {{<<: [{f'*a{n - 1}, ' * 10}]}}" for n in range(1, 30))
"""Thirty lines that stand for 10 to the 29th pairs."""


def refusal(tmp_path: Path, text: str) -> str:
    """What is said of a space in a file; one line."""
    path = tmp_path / "space.yaml"
    path.write_text(text)
    with pytest.raises(SpaceError) as refused:
        build_distributions(read_space(path), quick())
    said = str(refused.value)
    assert "\n" not in said
    assert len(said) < 400
    return said


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("lr: [0.1]", "'lr' is no field of recipe quick; to search there are: loss, batch_size"),
        ("dropout: [0.1]", "'dropout' is no field of recipe quick"),
        ("epochs: [1, 2]", "'epochs' is the same in all trials"),
        ("seed: {low: 0, high: 9}", "'seed' is the same in all trials"),
        ("recipe: [vanilla]", "'recipe' is the same in all trials"),
        ("batch_size: [32, many]", "batch_size must be a whole number, not 'many'"),
        ("batch_size: {low: 16.5, high: 64}", "batch_size must be a whole number, not 16.5"),
        ("batch_size: {low: 16, high: 64, step: 1.5}", "step must be a whole number"),
        ("batch_size: [60001]", "batch_size must be at most the 60000 images there are"),
        ("learning_rate: [1e-4]", "learning_rate must be a finite number, not '1e-4'"),
        ("learning_rate: {low: 0, high: 1}", "learning_rate must be above 0 and at most 1, not 0"),
        ("learning_rate: {low: .nan, high: .inf}", "learning_rate must be a finite number"),
        ("learning_rate: {low: 0.2, high: 0.1}", "the range of learning_rate cannot be searched"),
        ("beta1: {low: 0, high: 0.9, log: true}", "the range of beta1 cannot be searched"),
        ("beta1: {low: 0, high: 0.9, step: -1}", "the range of beta1 cannot be searched"),
        ("batch_size: {low: 16, high: 64, step: 0}", "the range of batch_size cannot be searched"),
        (f"penalty_interval: {{low: 1, high: {10**400}}}", "of at most 18 digits, not 1000"),
        (f"width: [0x{'f' * 5000}]", "not a number of thousands of digits"),
        (f"learning_rate: [0x{'f' * 5000}]", "not a number of thousands of digits"),
        (f"? {'x' * 50_000}\n: [1]", "xxx...xxx"),
        ("width: [8]\nwidth: [16]", "says one name twice"),
        ('{\t"width": [8], "width": [16]}', "says one name twice"),
        ("beta1: {low: 0.1, high: 0.9, low: 0.5}", "says one name twice"),
        (f"a0: &a0 {{k: [1]}}\n{MERGED}", "merges mappings with <<"),
        ("beta1: {low: 0.1, high: 0.9, step: .inf}", "searched: step must be a finite number"),
        ("beta1: {low: 0.1, high: 0.9, step: .nan}", "searched: step must be a finite number"),
        (f"beta1: {{low: 0.1, high: 0.9, step: {10**400}}}", "step must be a finite number"),
        (f"batch_size: {{low: 16, high: 64, step: {10**400}}}", "step must be a finite number"),
        ("beta1: {low: 0.1, high: 0.9, step: 1.0e-30}", "searched: step is too small"),
        ("beta1: {low: 0}", "beta1.Range.high: Field required"),
        ("beta1: {low: 0, high: 0.5, lgo: true}", "Extra inputs are not permitted"),
        ("beta1: []", "the choices of beta1 cannot be searched"),
        ("beta1: 0.5", "a field takes a list of values, or a range"),
        ("loss: {low: 0, high: 1}", "loss must be logistic or relativistic, not 0"),
        ("loss: [hinge]", "loss must be logistic or relativistic, not 'hinge'"),
        ("width: {low: 8, high: 1000}", "width must be 1 to 128, not 1000"),
        ("", "a field takes a list of values"),
        ("{}", "the search space is empty"),
        ("- learning_rate", "a field takes a list of values"),
        ("learning_rate: [", "is neither YAML nor JSON"),
        ("a: !!python/object/apply:os.system [ls]", "is neither YAML nor JSON"),
        ("beta1: [!!bool maybe]", "is neither YAML nor JSON"),
        ("beta1: [!!timestamp foo]", "is neither YAML nor JSON"),
        ("beta1: [!!int '']", "is neither YAML nor JSON"),
        ("beta1: &a [*a]", "a field takes a list of values"),
        ("x" * 200_000, "is longer than 100,000 bytes"),
        ("[" * 50_000, "is neither YAML nor JSON"),
    ],
)
def test_nonsense_is_refused_with_a_sentence(text: str, sentence: str, tmp_path: Path) -> None:
    assert sentence in refusal(tmp_path, text)


def test_missing_file_and_other_bytes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SpaceError, match=r"cannot read .* No such file"):
        read_space(tmp_path / "none.yaml")
    with pytest.raises(SpaceError, match=r"cannot read .* directory"):
        read_space(tmp_path)
    (tmp_path / "bytes").write_bytes(bytes(range(256)))
    with pytest.raises(SpaceError, match="neither YAML nor JSON"):
        read_space(tmp_path / "bytes")


@given(low=st.floats(1e-300, 0.4), high=st.floats(0.5, 1), indent=st.sampled_from(["", "\t", " "]))
def test_json_is_read_as_json_has_it(low: float, high: float, indent: str) -> None:
    """1e-05 is a number there, and a tab a space."""
    space = {"learning_rate": {"low": low, "high": high, "log": True}, "beta1": [low, 0]}
    with TemporaryDirectory() as folder:
        path = Path(folder) / "space.json"
        path.write_text(json.dumps(space, indent=indent))
        found = read_space(path)
    assert found == {"learning_rate": Range(low=low, high=high, log=True), "beta1": [low, 0]}


@settings(max_examples=200)
@given(
    space=st.dictionaries(
        st.sampled_from(
            [
                "learning_rate",
                "batch_size",
                "penalty_interval",
                "loss",
                "beta1",
                "width",
                "epochs",
                "é",
            ]
        ),
        st.builds(
            Range.model_construct,
            low=st.integers(-3, 3) | st.floats() | st.integers(),
            high=st.integers(-3, 100) | st.floats() | st.integers(),
            log=st.booleans(),
            step=st.none() | st.integers(-2, 10) | st.floats(),
        )
        | st.lists(st.integers() | st.floats() | st.text(max_size=3), max_size=4),
    )
)
@pytest.mark.filterwarnings("ignore:The distribution is specified")
def test_any_space_is_searched_or_refused(space: Space) -> None:
    try:
        distributions = build_distributions(space, quick())
    except SpaceError:
        return
    assert set(distributions) == set(space)
    change(quick(), find_middle(distributions))
    assert all(describe_space(distributions).values())


@settings(max_examples=20)
@given(seed=st.integers(0, 2**32 - 1))
def test_everything_proposed_can_be_trained(seed: int) -> None:
    space: Space = {
        "learning_rate": Range(low=1e-5, high=1, log=True),
        "batch_size": Range(low=16, high=64, step=16),
        "width": Range(low=1, high=128, log=True),
        "loss": ["logistic", "relativistic"],
    }
    distributions = build_distributions(space, quick())
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    values = suggest(study.ask(), distributions)
    assert values["batch_size"] in (16, 32, 48, 64)
    config = change(quick(), values)
    assert config.networks.width == values["width"]
    assert config.loss == values["loss"]


def test_a_trial_that_is_asked_again_proposes_the_same() -> None:
    distributions = build_distributions(read_space(ROOT / "sweep.yaml"), quick())
    trial = optuna.create_study().ask()
    assert suggest(trial, distributions) == suggest(trial, distributions)


@pytest.mark.parametrize(
    ("dimension", "middle"),
    [
        (Range(low=0.0, high=0.8), 0.4),
        (Range(low=0.0001, high=0.01, log=True), 0.001),
        ([0.5, 0.9, 0.1], 0.9),
        ([0.5], 0.5),
    ],
)
def test_middle_of_a_dimension(dimension: Any, middle: float) -> None:
    name = "learning_rate" if isinstance(dimension, Range) and dimension.log else "beta1"
    distributions = build_distributions({name: dimension}, quick())
    assert find_middle(distributions)[name] == pytest.approx(middle)


@given(low=st.integers(1, 40), more=st.integers(0, 80), step=st.integers(1, 5), log=st.booleans())
def test_middle_of_whole_numbers_lies_on_the_grid(
    low: int, more: int, step: int, log: bool
) -> None:
    steps = {} if log else {"step": step}
    space: Space = {"width": Range(low=low, high=low + more // step * step, log=log, **steps)}
    (kind,) = build_distributions(space, quick()).values()
    assert isinstance(kind, IntDistribution)
    assert kind._contains(find_middle({"width": kind})["width"])


@given(low=st.floats(1e-12, 0.5), factor=st.floats(1, 2))
def test_middle_of_magnitudes_lies_within(low: float, factor: float) -> None:
    kind = FloatDistribution(low, low * factor, log=True)
    assert kind.low <= find_middle({"x": kind})["x"] <= kind.high
    assert math.isfinite(find_middle({"x": kind})["x"])


def test_the_space_of_make_sweep_is_one_of_quick() -> None:
    distributions = build_distributions(read_space(ROOT / "sweep.yaml"), quick())
    assert "learning_rate" in describe_space(distributions)


def test_fields_of_the_networks_can_be_searched() -> None:
    distributions = build_distributions({"dropout": Range(low=0.0, high=0.5)}, vanilla())
    assert change(vanilla(), find_middle(distributions)).networks.dropout == 0.25
