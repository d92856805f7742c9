"""Measure the floors: `python -m gan.evaluation.floors`, some three minutes of one core.

Real training images stand in the place of drawings, so that what is left is chance and the
difference between the training and the test images. The rest of the training set stands in the
place of the whole, because an image must not be compared with itself.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from gan.data import Mnist, Split, load_mnist
from gan.errors import UserError
from gan.evaluation.judge import JUDGE_FOLDER, JUDGE_ID, read_card
from gan.evaluation.scores import Scores, evaluate

NUM_SAMPLES = 10_000
SEEDS = (0, 1, 2)


def measure_floors(data: Mnist, *, num_samples: int = NUM_SAMPLES, seed: int = 0) -> Scores:
    """The scores of real training images: a third of them drawn from, the rest compared with."""
    order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(seed))
    drawn, rest = order.tensor_split([2 * num_samples])

    def draw(num: int, seed: int) -> tuple[Tensor, Tensor | None]:
        index = drawn[:num]
        return data.train.images[index], data.train.labels[index]

    train = Split(images=data.train.images[rest], labels=data.train.labels[rest])
    return evaluate(draw, Mnist(train=train, test=data.test), num_samples=num_samples, seed=seed)


def main() -> None:
    """Measure the floors and write them on the judge's card."""
    parser = argparse.ArgumentParser(prog="python -m gan.evaluation.floors")
    parser.add_argument("--data", type=Path, default=Path("data/mnist/raw"), help="raw MNIST")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        data = load_mnist(arguments.data)
        floors = [measure_floors(data, seed=seed) for seed in SEEDS]
        card = {**read_card(), "floors": [asdict(scores) for scores in floors]}
    except UserError as error:
        sys.exit(str(error))
    (JUDGE_FOLDER / f"{JUDGE_ID}.json").write_text(json.dumps(card, indent=2) + "\n")
    for name in floors[0].metrics():
        values = "  ".join(f"{scores.metrics()[name]:.4f}" for scores in floors)
        logging.getLogger(__name__).info("%-24s %s", name, values)


if __name__ == "__main__":
    main()
