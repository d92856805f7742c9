"""How long judging takes and where its seconds go: `python -m benchmarks.evaluation`.

It scores 10,000 drawings of untrained networks: what they show does not change the work. Then the
parts are timed one by one.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from benchmarks.measuring import (
    Machine,
    Measured,
    count,
    launch,
    options,
    save,
    table,
    wait_for_device,
)
from gan.data import load_mnist
from gan.evaluation.judge import judge_images, load_judge
from gan.evaluation.metrics import frechet_distance, kernel_distance, support
from gan.evaluation.reference import load_reference
from gan.evaluation.scores import draws_like, evaluate, nearness_to_training
from gan.evaluation.two_sample import TWO_SAMPLE_10K, two_sample_accuracy
from gan.networks import build_generator
from gan.recipes import quick
from gan.training import choose_device

NUM = 10_000
FIRST, LATER = "everything, the first time", "everything, the real images known"


def measure(folder: Path, device: torch.device, rounds: int) -> dict[str, Measured]:
    """Seconds of an evaluation and of its parts."""
    data = load_mnist(folder, device)
    torch.manual_seed(0)
    draw = draws_like(build_generator(quick().networks).to(device), data.train.labels)
    judge = load_judge(device)
    with TemporaryDirectory() as scratch:
        cache = Path(scratch)
        whole = partial(evaluate, draw, data, num_samples=NUM, device=device, cache=cache)
        found = {FIRST: Measured(rounds=(_seconds(whole),))}
        images = draw(2 * NUM, 0)[0]
        scored = images[:NUM]
        features = judge_images(judge, scored).features
        reference = load_reference(judge, data, cache)
        parts: dict[str, Callable[[], object]] = {
            LATER: whole,
            "drawing 20,000 images": partial(draw, 2 * NUM, 0),
            "reading what is known of the real images": partial(load_reference, judge, data, cache),
            "looking at 10,000 drawings": partial(judge_images, judge, scored),
            "Frechet distance": partial(frechet_distance, features, reference.test_features),
            "KID": partial(kernel_distance, features, reference.test_features),
            "precision, recall, density, coverage": partial(
                support, features, reference.test_features, reference.test_reach
            ),
            "nearest training images, in pixels and features": partial(
                nearness_to_training, scored, features, data, reference
            ),
            "two-sample classifier": partial(
                two_sample_accuracy,
                TWO_SAMPLE_10K,
                generated=scored,
                real=data.train.images[:NUM],
                new_generated=images[NUM:],
                new_real=data.test.images,
                device=device,
            ),
        }
        for name, work in parts.items():
            found[name] = Measured(rounds=tuple(_seconds(work) for _ in range(rounds)))
    return found


def _seconds(work: Callable[[], object]) -> float:
    wait_for_device()
    started = time.perf_counter()
    work()
    wait_for_device()
    return time.perf_counter() - started


def main() -> None:
    """Measure, write JSON and print a table."""
    parser = options("evaluation")
    parser.add_argument("--rounds", type=count, default=2)
    given = parser.parse_args()
    found = measure(given.data, choose_device(given.device), given.rounds)
    rows = [[name, measured.spread(".2f")] for name, measured in found.items()]
    headings = ["judging 10,000 drawings", "seconds, median (lowest to highest)"]
    print(f"{Machine.here()}\n\n{table(headings, rows)}")
    save(given.out, "evaluation", {"seconds": found})


if __name__ == "__main__":
    launch(main)
