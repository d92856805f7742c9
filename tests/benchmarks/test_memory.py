"""What a training holds in memory, read from the process itself."""

import sys
from pathlib import Path

import pytest
import torch

from benchmarks import memory


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_the_data_is_held_once_and_peaks_are_peaks(
    mnist_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "STEPS", 1)
    found = {"vanilla": memory.measure("vanilla", mnist_dir, torch.device("cpu"))}
    each = found["vanilla"]
    assert each["data"] == 60_000 * (28 * 28 + 8)
    assert each["data"] < each["data_read"] <= each["peak_of_reading"] <= each["peak"]
    text = memory.describe(found)
    assert f"{each['peak'] / 1e6:,.0f}" in text
    assert {line.count("|") for line in text.splitlines()} == {len(memory.HEADINGS) + 1}
