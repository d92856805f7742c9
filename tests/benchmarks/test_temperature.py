"""What a sampling temperature does, on a few hundred images."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import temperature
from gan.bundle import bundle_digest, save_bundle
from gan.config import ConvConfig, MlpConfig
from gan.networks import build_generator


@pytest.mark.slow
@pytest.mark.parametrize("config", [ConvConfig(width=1), MlpConfig()], ids=["conv", "mlp"])
def test_each_temperature_has_its_scores(
    config: MlpConfig | ConvConfig,
    mnist_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(temperature, "TEMPERATURES", (0.0, 1.0))
    torch.manual_seed(0)
    save_bundle(build_generator(config), tmp_path / "bundle")
    given = ["--bundle", tmp_path / "bundle", "--out", tmp_path, "--data", mnist_dir]
    given += ["--device", "cpu", "--num-draws", "2", "--num-samples", "100"]
    temperature.main([str(word) for word in given])

    said = capsys.readouterr().out
    assert ("digit_as_asked" in said) == (config.num_classes > 0)
    assert [line.split("|")[1].strip() for line in said.splitlines()[-2:]] == ["0", "1"]
    written = json.loads((tmp_path / "temperature.json").read_text())
    assert written["bundle"] == bundle_digest(tmp_path / "bundle")
    assert {t: len(draws) for t, draws in written["scores"].items()} == {"0": 2, "1": 2}
    cold, warm = (written["scores"][t][0]["recall"] for t in ("0", "1"))
    assert cold <= warm, "all drawings of a digit are the same"
