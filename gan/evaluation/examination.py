"""A close look at one generator, which takes minutes: several draws, two adversaries, a student."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import stdev

import torch
from torch import Tensor

from gan.config import NUM_SEEDS
from gan.data import Mnist, Split
from gan.evaluation.judge import Judge, judge_images, load_judge
from gan.evaluation.scores import Draw, Scores, average, evaluate
from gan.evaluation.train_judge import share_read, train_judge
from gan.evaluation.two_sample import (
    TWO_SAMPLE_50K,
    TWO_SAMPLE_50K_SMALL,
    believe,
    share_told,
    train_adversary,
)

NUM_SUSPICIOUS = 100
"""Drawings to show: half of them the judge's choice, half the adversary's."""
LEARNED_FROM = 5
"""Drawings that an adversary learns from, for each one that is scored."""


@dataclass(frozen=True, kw_only=True)
class Examination:
    """What a close look found."""

    scores: Sequence[Scores]
    """One for each draw."""
    adversaries: dict[str, float]
    """Two-sample accuracy by the protocol's id; 0.5 = cannot tell."""
    synthetic_accuracy: float | None
    """The share of the test images that a classifier like the judge reads rightly when it was
    trained on drawings alone: the classification accuracy score of Ravuri and Vinyals 2019. None
    for a generator that is not told which digit to draw."""
    suspicious: Tensor
    """Drawings that look least real, uint8 [100, 28, 28] or fewer: first those that the judge is
    least sure to be the digit asked for, then those that the larger adversary is surest about."""

    def means(self) -> dict[str, float]:
        """Every number under its stable name; the mean where there are several draws."""
        numbers = average(self.scores).metrics() | self.adversaries
        if self.synthetic_accuracy is not None:
            numbers["synthetic_accuracy"] = self.synthetic_accuracy
        return numbers

    def deviations(self) -> dict[str, float]:
        """Standard deviations over the draws; nothing where there is one."""
        several = [scores.metrics() for scores in self.scores]
        if len(several) < 2:
            return {}
        return {name: stdev(each[name] for each in several) for name in several[0]}


def examine(
    draw: Draw,
    data: Mnist,
    *,
    num_samples: int = 10_000,
    num_draws: int = 3,
    seed: int = 0,
    device: torch.device | str = "cpu",
    cache: Path | None = None,
) -> Examination:
    """Score several draws, then train two adversaries and a student on one more.

    Adversaries and student learn from five and six times `num_samples` drawings. No step sees
    a test image.

    Args:
        draw: the generator under judgement.
        data: the real images.
        num_samples: drawings to score, 10,000 at most.
        num_draws: how often to draw and score, with seeds from `seed` on (0 follows the largest).
        seed: decides what is drawn and how everything is trained.
        device: where to measure.
        cache: a folder in which to keep what the judge sees in the real images.

    Raises:
        EvaluationError: num_samples is out of range.
        JudgeError: the judge's files are not the pinned ones.
    """
    *seeds, last_seed = ((seed + each) % NUM_SEEDS for each in range(num_draws + 1))
    scores = [
        evaluate(draw, data, num_samples=num_samples, seed=each, device=device, cache=cache)
        for each in seeds
    ]
    num_learned_from = min(LEARNED_FROM * num_samples, len(data.train) * 5 // 6)
    protocols = [
        protocol.with_images(num_learned_from)
        for protocol in (TWO_SAMPLE_50K_SMALL, TWO_SAMPLE_50K)
    ]
    num_known = protocols[0].num_needed
    rng = torch.Generator().manual_seed(seed)
    images, asked = draw(num_known + num_samples, last_seed)
    order = torch.randperm(len(images), generator=rng)
    images = images[order.to(images.device)].to(device)
    asked = None if asked is None else asked.cpu()[order].to(device)
    known, new = images[:num_known], images[num_known:]
    real = data.train.images[torch.randperm(len(data.train), generator=rng)[:num_known]]

    adversaries = {
        protocol.id: train_adversary(protocol, known, real.to(device), seed)
        for protocol in protocols
    }
    student = None
    if asked is not None:
        student = train_judge(Split(images=known, labels=asked[:num_known]), seed=seed)
    return Examination(
        scores=scores,
        adversaries={
            name: share_told(adversary, new, data.test.images)
            for name, adversary in adversaries.items()
        },
        synthetic_accuracy=None if student is None else share_read(student, data.test),
        suspicious=find_suspicious(
            adversaries[protocols[-1].id],
            new,
            None if asked is None else asked[num_known:],
        ),
    )


def find_suspicious(adversary: Judge, images: Tensor, asked: Tensor | None) -> Tensor:
    """The images that the judge doubts most, then others that the adversary is surest about.

    Of images uint8 [n, 28, 28]; the judge doubts the digits asked for [n] or, where none were, that
    there is one at all. Gives [100, 28, 28] on the CPU, or all if there are fewer.
    """
    judge = load_judge(images.device)
    verdict = judge_images(judge, images)
    shares = judge.classify(verdict.features).softmax(1)
    sure = shares.amax(1) if asked is None else shares.gather(1, asked[:, None]).squeeze(1)
    doubted = sure.cpu().argsort()[: NUM_SUSPICIOUS // 2].tolist()
    unmasked = believe(adversary, images).argsort().tolist()
    others = [index for index in unmasked if index not in doubted]
    return images[doubted + others[: NUM_SUSPICIOUS - len(doubted)]].cpu()
