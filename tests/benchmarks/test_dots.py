"""Of how many dots digits were made, told from a few of known and of real ones."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from benchmarks import dots
from gan.scan import MEAN_SIZE, SPREAD, Centring, Scan


def test_the_number_of_dots_is_told_from_the_greys() -> None:
    rng = torch.Generator().manual_seed(0)
    sizes = torch.arange(30, 60, 3)
    blots = F.avg_pool2d(torch.randn(len(sizes), 1, 80, 80, generator=rng), 9, 1, 4)
    drawn = Scan(dots=4)(F.pixel_unshuffle(blots, 4), (sizes - MEAN_SIZE) / SPREAD)
    sheets = ((Centring().eval()(drawn).squeeze(1) + 1) * 127.5).round().to(torch.uint8)
    found, nats = dots.number_of_dots(sheets, sizes=range(30, 60))
    assert torch.equal(found, sizes)
    assert nats.min() > dots.SURE


@pytest.mark.slow
def test_what_the_scan_takes_for_granted_is_what_mnist_has(
    mnist_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--data", mnist_dir, "--out", tmp_path, "--num-images", "1000"]
    dots.main([str(word) for word in given])
    assert "| images | 1000 |" in capsys.readouterr().out
    written = json.loads((tmp_path / "dots.json").read_text())
    number, nats = torch.tensor(written["dots"]), torch.tensor(written["nats"])
    known = number[nats > dots.SURE].double()
    assert len(known) > 900
    assert known.mean().item() == pytest.approx(MEAN_SIZE, abs=1.5)
    assert known.std().item() == pytest.approx(SPREAD, abs=1.5)
