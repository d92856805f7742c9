"""What each part of a recipe brings: `python -m benchmarks.ablation`, or `make ablation`.

Trains `quick`, and `quick` with one thing changed at a time, from several seeds, and judges what
each draws. Every training is written down as it ends; a run that is started again goes on with
those that are missing.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch

from benchmarks.measuring import Machine, count, launch, options, table
from gan.checkpoint import plain
from gan.config import ConvConfig, TrainConfig
from gan.data import Mnist, load_mnist
from gan.evaluation.scores import draws_like, evaluate
from gan.evaluation.two_sample import TWO_SAMPLE_10K
from gan.recipes import quick
from gan.training import TrainState, choose_device, train

METRICS = {
    "frechet_distance": "Frechet",
    TWO_SAMPLE_10K.id: "two-sample (10k)",
    "precision": "precision",
    "recall": "recall",
    "digit_as_asked": "digit as asked",
}
"""What is tabled, and its heading."""


def variants() -> dict[str, TrainConfig]:
    """`quick`, and what it is compared with."""
    whole = quick()
    assert isinstance(whole.networks, ConvConfig)
    return {
        "`quick`": whole,
        "pixels are drawn, not ink": replace(whole, networks=replace(whole.networks, dots=0)),
        "no fine layers": replace(whole, networks=replace(whole.networks, fine_layers=0)),
        "half the batch and step size": replace(
            whole, batch_size=whole.batch_size // 2, learning_rate=whole.learning_rate / 2
        ),
        "a penalty half as strong": replace(whole, r1_gamma=whole.r1_gamma / 2),
        "no penalty": replace(whole, r1_gamma=0.0),
        "relativistic, R1 + R2": replace(whole, loss="relativistic", r2_gamma=whole.r1_gamma),
        "no average of weights": replace(whole, ema_halflife_images=0.0),
        "no cooldown": replace(whole, cooldown=0.0),
        "cooldown from the first step": replace(whole, cooldown=1.0),
        "float32": replace(whole, precision="float32"),
    }


def measure(
    config: TrainConfig, data: Mnist, device: torch.device, cache: Path, num_samples: int
) -> dict[str, Any]:
    """Train once and judge as the pipeline does: scores by name, and seconds of training."""
    state = TrainState(config, device)
    started = time.perf_counter()
    for _ in train(state, data.train, report_every_s=60):
        pass
    seconds = time.perf_counter() - started
    draw = draws_like(state.sampler, data.train.labels)
    scores = evaluate(draw, data, num_samples=num_samples, device=device, cache=cache)
    return {"seconds": seconds, "scores": scores.metrics()}


def describe(found: Sequence[Mapping[str, Any]]) -> str:
    """A row a variant: means over seeds, with their standard deviations."""
    # Fewer drawings than usual have two-sample tests of other names.
    names = [name for name in METRICS if name in found[0]["scores"]]
    rows = []
    for variant in dict.fromkeys(each["variant"] for each in found):
        runs = [each for each in found if each["variant"] == variant]
        cells = [_spread([run["scores"][name] for run in runs]) for name in names]
        rows.append([variant, str(len(runs)), *cells])
    return table(["", "seeds", *(METRICS[name] for name in names)], rows)


def _spread(values: Sequence[float]) -> str:
    deviation = f" ± {stdev(values):.3f}" if len(values) > 1 else ""
    return f"{fmean(values):.3f}{deviation}"


def read(path: Path) -> list[dict[str, Any]]:
    """The trainings that were written down."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def main() -> None:
    """Train what is missing, write JSON lines and print a table."""
    parser = options("ablation")
    parser.add_argument("--epochs", type=count, default=3, help="of each training (default: 3)")
    parser.add_argument("--seeds", type=count, default=3, help="trainings a variant (default: 3)")
    parser.add_argument("--num-samples", type=count, default=10_000, help="drawings to score")
    given = parser.parse_args()
    device = choose_device(given.device)
    data = load_mnist(given.data, device)
    given.out.mkdir(parents=True, exist_ok=True)
    path = given.out / "ablation.jsonl"
    print(Machine.here(), flush=True)
    known, found = read(path), []
    for seed in range(given.seeds):
        for variant, changed in variants().items():
            config = replace(changed, epochs=given.epochs, seed=seed)
            key = {"variant": variant, "samples": given.num_samples, "config": plain(config)}
            row = next((each for each in known if key.items() <= each.items()), None)
            if row is None:
                row = key | {"machine": asdict(Machine.here())}
                row |= measure(config, data, device, given.out, given.num_samples)
                with path.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(f"{variant}, seed {seed}: {row['seconds']:.0f} s of training", flush=True)
            found.append(row)
    print(f"\n{describe(found)}")


if __name__ == "__main__":
    launch(main)
