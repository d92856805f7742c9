"""What grew is told as a table and as plots."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import growth
from benchmarks.measuring import Measured
from tests.gan.test_training import noise_data

SOME = Measured(rounds=(900.0, 1000.0, 1200.0))
FOUND: dict[str, Any] = {
    "seconds_at_epoch": [1.0, 2.5],
    "images_per_s_at_batch": {25: SOME, 50: SOME},
    "images_per_s_at_processes": {"batch 100": {1: SOME, 2: SOME}},
}


def test_each_epoch_ends_after_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growth, "EPOCHS", 3)
    ends = growth.against_epochs(noise_data(100), torch.device("cpu"))
    assert len(ends) == 3
    assert all(0 < before < after for before, after in pairwise(ends))


def test_the_table_has_a_row_for_each_number() -> None:
    text = growth.describe(FOUND)
    assert len(text.splitlines()) == 2 + 2 + 2 + 2
    assert "2 epochs | 2.5 s" in text
    assert text.count("1,000 (900 to 1,200) images/s") == 4


def test_there_is_a_small_plot_for_each_thing_that_grows(tmp_path: Path) -> None:
    growth.plot(FOUND, tmp_path)
    plots = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert plots.keys() == {f"performance-{x}.png" for x in ("epochs", "batch", "processes")}
    assert all(1_000 < size < 60_000 for size in plots.values())
