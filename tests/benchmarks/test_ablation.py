"""What each part of a recipe brings, on a few hundred images."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import ablation
from gan.config import ConvConfig
from gan.data import Mnist, Split, load_mnist
from gan.recipes import quick


def test_each_variant_changes_one_thing() -> None:
    variants = ablation.variants()
    assert variants.pop("`quick`") == quick()
    assert len({*variants.values(), quick()}) == len(variants) + 1
    for variant in variants.values():
        assert variant.recipe == "quick"


def test_every_training_is_written_down_and_none_is_done_twice(
    mnist_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    whole = load_mnist(mnist_dir)
    few = Mnist(
        train=Split(images=whole.train.images[:400], labels=whole.train.labels[:400]),
        test=Split(images=whole.test.images[:200], labels=whole.test.labels[:200]),
    )
    small = replace(quick(), networks=ConvConfig(latent_dim=2, width=1))
    monkeypatch.setattr(ablation, "load_mnist", lambda *_: few)
    pair = {"whole": small, "halved": replace(small, batch_size=64)}
    monkeypatch.setattr(ablation, "variants", lambda: pair)

    def run(seeds: int) -> str:
        given = ["ablation", "--epochs", "1", "--seeds", str(seeds), "--num-samples", "60"]
        monkeypatch.setattr(sys, "argv", [*given, "--out", str(tmp_path), "--device", "cpu"])
        ablation.main()
        return capsys.readouterr().out

    first = run(1)
    assert first.count("of training") == 2
    again = run(2)
    assert again.count("of training") == 2, "those of the second seed alone"
    rows = ablation.read(tmp_path / "ablation.jsonl")
    assert [(row["variant"], row["config"]["seed"]) for row in rows] == [
        ("whole", 0), ("halved", 0), ("whole", 1), ("halved", 1)
    ]  # fmt: skip
    lines = again.splitlines()[-2:]
    assert [line.split("|")[1:3] for line in lines] == [[" whole ", " 2 "], [" halved ", " 2 "]]
    distances = [row["scores"]["frechet_distance"] for row in rows if row["variant"] == "whole"]
    assert f"{sum(distances) / 2:.3f} ± " in lines[0]
