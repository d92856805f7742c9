"""Every loop runs side by side, and what it gave is told as a table, a file and a plot."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from benchmarks import speed, variants
from benchmarks.measuring import save
from gan.recipes import RECIPES
from tests.gan.test_training import noise_data

NO_TIME = speed.Setting(
    data=noise_data(128), device=torch.device("cpu"), rounds=1, seconds=0, compiled=False
)


@pytest.fixture(scope="module")
def content() -> dict[str, Any]:
    return speed.measure(NO_TIME)


def test_every_recipe_meets_its_textbook_and_every_trick_is_shown(content: dict[str, Any]) -> None:
    rates = content["images_per_s"]
    for recipe in RECIPES:
        assert {f"{recipe}: {speed.TEXTBOOK}", f"{recipe}: {speed.OURS_FLOAT32}"} <= rates.keys()
    assert [name for name in rates if name.startswith("vanilla: +")] == [
        f"vanilla: + {trick}" for trick in variants.TRICKS
    ]
    assert all(len(rate.rounds) == 1 and rate.median > 0 for rate in rates.values())


def test_the_table_has_a_row_for_all_and_says_what_was_not_measured(
    content: dict[str, Any],
) -> None:
    text = speed.describe(content)
    for name in (*content["images_per_s"], *content["flops_per_s"]):
        assert name in text
    (line,) = (line for line in text.splitlines() if f"vanilla: {speed.TEXTBOOK} " in line)
    assert " 1.00 " in line
    assert "not measured: this machine has no CUDA device" in text
    measured = speed.describe(content | {"whole_runs": {speed.GRAPHS: {"seconds": 9.876}}})
    assert "in 9.9 s" in measured
    assert "not measured" not in measured


def test_what_was_measured_comes_back_from_its_file(
    content: dict[str, Any], tmp_path: Path
) -> None:
    save(tmp_path, "speed", content)
    found = json.loads((tmp_path / "speed.json").read_text())
    assert found["flops_a_step"] == content["flops_a_step"]
    for name, rate in content["images_per_s"].items():
        assert found["images_per_s"][name]["rounds"] == list(rate.rounds)


def test_the_plot_is_a_small_picture(content: dict[str, Any], tmp_path: Path) -> None:
    speed.plot(content, tmp_path / "speed.png")
    with Image.open(tmp_path / "speed.png") as picture:
        assert picture.width > 300
    assert (tmp_path / "speed.png").stat().st_size < 60_000
