from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gan.bundle import CARD, MAX_BYTES, save_bundle
from gan.config import TrainConfig
from gan.evaluation.scores import load_floors
from gan.model_card import write_model_card
from gan.networks import build_generator
from gan.onnx_export import OPSET
from gan.recipes import quick, vanilla


def write(config: TrainConfig, **changes: Any) -> str:
    return write_model_card(
        config,
        replace(load_floors(), **changes),
        dataset_digest="sha256:0123",
        git_commit="c0ffee",
        computed_by={"processor": "Abacus (beads)", "threads": "3"},
    )


def rows(card: str) -> dict[str, list[str]]:
    """The rows of all tables by their first cells."""
    lines = (line.strip("| ").split(" | ") for line in card.splitlines() if line.startswith("|"))
    return {name: cells for name, *cells in lines}


@pytest.mark.parametrize("recipe", [quick, vanilla])
def test_it_says_every_parameter(recipe: Any) -> None:
    config = replace(recipe(), seed=7, epochs=3)
    fields = asdict(config)
    expected = {**fields.pop("networks"), **fields, "commit": "c0ffee", "data": "sha256:0123"}
    expected |= {"processor": "Abacus (beads)", "threads": "3"}
    card = write(config)
    for name, value in expected.items():
        assert f"| {name} | `{value}` |" in card


def test_scores_stand_beside_the_floors_that_were_measured_alike() -> None:
    floors = load_floors().metrics()
    shown = rows(write(quick(), frechet_distance=1.25))
    assert shown["frechet_distance"][:3] == ["1.2500", f"{floors['frechet_distance']:.4f}", "lower"]
    assert {name for name in floors if not name.startswith("digit_share")} <= shown.keys()
    for otherwise in ({"num_samples": 100}, {"judge": "mnist-judge-2"}):
        assert rows(write(quick(), **otherwise))["frechet_distance"][1].strip() == ""


def test_it_says_who_judged_how_many_images_and_how_many_are_too_near() -> None:
    card = write(quick(), num_samples=1234, memorisation_pixels=0.4321)
    assert "1,234 drawn images" in card
    assert load_floors().judge in card
    assert "43.21% of the drawings in pixels" in card


def test_it_says_whether_digits_can_be_asked_for() -> None:
    conditional = write(quick(), digit_as_asked=0.75)
    assert "another digit than asked in 25.00%" in conditional
    assert "`digit`, int64 [n]" in conditional
    unconditional = write(vanilla(), digit_as_asked=None)
    assert "It cannot be asked for a digit" in unconditional
    assert "`digit`" not in unconditional
    assert "digit_as_asked" not in unconditional


def test_it_names_the_range_of_values_the_opset_and_the_licence() -> None:
    card = write(quick())
    for fact in ("0 (paper) to 255 (ink)", f"opset {OPSET}", "Attribution-Share Alike 3.0", "MIT"):
        assert fact in card


@given(
    epochs=st.integers(1, 10**9),
    learning_rate=st.floats(1e-12, 1),
    distance=st.floats(0, 1e12),
    share=st.none() | st.floats(0, 1),
)
def test_the_same_training_has_the_same_card_and_it_fits_a_bundle(
    epochs: int, learning_rate: float, distance: float, share: float | None
) -> None:
    config = replace(quick(), epochs=epochs, learning_rate=learning_rate)
    changes = {"frechet_distance": distance, "digit_as_asked": share}
    card = write(config, **changes)
    assert card == write(config, **changes)
    assert card.isascii()
    assert len(card) < MAX_BYTES[CARD]


def test_the_code_on_the_card_runs_as_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for config in (quick(), vanilla()):
        save_bundle(build_generator(config.networks), tmp_path / "mnist-gan-generator")
        code = write(config).split("```python\n")[1].split("```")[0]
        names: dict[str, Any] = {}
        exec(code, names)
        assert names["images"].shape == (16, 28, 28)
