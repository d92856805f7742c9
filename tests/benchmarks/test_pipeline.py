"""Where the seconds of a whole run go."""

from pathlib import Path

import pytest

from benchmarks import pipeline
from benchmarks.measuring import Measured


def test_own_cost_is_all_but_steps_and_judging() -> None:
    stages = {"imports": 3.0, "train": 20.0, "evaluate": 5.0, "promote": 1.0, "report": 1.0}
    assert pipeline.own_cost({"stages": stages, "steps": 18.0}) == 6.0


@pytest.mark.slow
def test_a_run_is_accounted_for_to_the_second(
    mnist_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = "--recipe vanilla --epochs 1 --batch-size 1000 --num-samples 100"
    monkeypatch.setattr(pipeline, "OPTIONS", tiny.split())
    monkeypatch.setenv("MNIST_GAN_RUNS_DIR", str(tmp_path / "theirs"))
    monkeypatch.setenv("MNIST_GAN_PUBLISH_TO", "s3://theirs/models")
    run = pipeline.run_timed(tmp_path, mnist_dir)
    stages = run["stages"]
    for name in ("imports", "the server's start", "train", "evaluate", "register", "report"):
        assert stages[name] > 0
    assert not (tmp_path / "theirs").exists()
    assert 0 < run["steps"] < stages["train"]
    assert 0 < run["callbacks"] < stages["train"]
    assert pipeline.own_cost(run) > 0
    text = pipeline.describe({"a run": run}, {"gan --help": Measured(rounds=(0.1, 0.2, 0.3))})
    assert f"| **in all** | {sum(stages.values()):.2f} |" in text
    assert "| gan --help | 0.20 (0.10 to 0.30) |" in text
