"""All scores of a generator: `evaluate` draws, looks and measures; `METRICS` says what it means."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, Self

import torch
from torch import Tensor

from gan import sampling
from gan.data import Mnist
from gan.errors import UserError
from gan.evaluation.judge import JUDGE_ID, judge_images, load_judge, read_card
from gan.evaluation.metrics import (
    NUM_NEIGHBOURS,
    Closeness,
    closeness,
    frechet_distance,
    kernel_distance,
    nearest_distances,
    nearest_image_distances,
    support,
)
from gan.evaluation.reference import Reference, load_reference
from gan.evaluation.two_sample import TWO_SAMPLE_10K, TwoSampleProtocol, two_sample_accuracy
from gan.networks import Generator

Draw = Callable[[int, int], tuple[Tensor, Tensor | None]]
"""`draw(num, seed)`: uint8 images [num, 28, 28] and the digits asked for, int64 [num], if any."""


class EvaluationError(UserError):
    """An evaluation that cannot be made as asked."""


@dataclass(frozen=True, kw_only=True)
class Metric:
    """What a number tells."""

    meaning: str
    better: Literal["lower", "higher", "near the floor"]


METRICS: Mapping[str, Metric] = {
    "frechet_distance": Metric(
        meaning="distance between Gaussians fitted to the judge's features; more for few samples",
        better="lower",
    ),
    "kid_x1000": Metric(
        meaning="kernel distance of the judge's features, times 1000; 0 for equals at any number",
        better="lower",
    ),
    "precision": Metric(
        meaning="share of drawings that lie among real images in features",
        better="higher",
    ),
    "recall": Metric(
        meaning="share of real images that lie among drawings in features",
        better="higher",
    ),
    "density": Metric(
        meaning="how closely real images surround the drawings; past 1 where they crowd",
        better="higher",
    ),
    "coverage": Metric(
        meaning="share of real images that have a drawing in their neighbourhood",
        better="higher",
    ),
    "digit_as_asked": Metric(
        meaning="share of drawings that the judge reads as the digit asked for",
        better="higher",
    ),
    "two_sample": Metric(
        meaning="accuracy of a fresh classifier at telling drawings from real; 0.5 = cannot tell",
        better="lower",
    ),
    "memorisation_pixels": Metric(
        meaning="share of drawings nearer to a training image than 99% of test images; 1 = copies",
        better="lower",
    ),
    "memorisation_features": Metric(
        meaning="the same in the judge's features",
        better="lower",
    ),
    "nearest_pixels": Metric(
        meaning="median distance to the nearest training image, over that of test images",
        better="near the floor",
    ),
    "nearest_features": Metric(
        meaning="the same in the judge's features",
        better="near the floor",
    ),
    "synthetic_accuracy": Metric(
        meaning="accuracy on real images of a classifier that was trained on drawings alone",
        better="higher",
    ),
    "digit_share": Metric(
        meaning="share of drawings that the judge reads as this digit",
        better="near the floor",
    ),
}
"""One line on every metric. `two_sample` stands for each protocol, `digit_share` for each digit;
`synthetic_accuracy` is none of the `Scores`, as it takes minutes: see `gan.evaluation.examination`.
"""


def explain(name: str) -> Metric:
    """What a metric of `Scores.metrics()` tells, such as `two_sample_10k` or `digit_share_3`."""
    for family in ("two_sample", "digit_share"):
        if name.startswith(family):
            return METRICS[family]
    return METRICS[name]


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What evaluating a generator found. `METRICS` says what each number means."""

    judge: str
    """The judge's id: scores of different judges do not compare."""
    num_samples: int
    """Drawings that were scored, against all 10,000 test images."""
    protocol: str
    """The two-sample protocol's id, and the name of its metric."""
    frechet_distance: float
    kid_x1000: float
    precision: float
    recall: float
    density: float
    coverage: float
    digit_as_asked: float | None
    """None for a generator that is not told which digit to draw."""
    two_sample: float
    memorisation_pixels: float
    memorisation_features: float
    nearest_pixels: float
    nearest_features: float
    digit_histogram: tuple[float, ...]
    """The shares of the digits 0 to 9, as the judge reads them."""

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """Scores from what `dataclasses.asdict` gave, after a trip through JSON."""
        return cls(**{**content, "digit_histogram": tuple(content["digit_histogram"])})

    def metrics(self) -> dict[str, float]:
        """Every number under its stable name; what does not apply is left out."""
        values: dict[str, float | None] = {
            self.protocol if name == "two_sample" else name: getattr(self, name)
            for name in METRICS
            if hasattr(self, name)
        }
        values |= {f"digit_share_{digit}": n for digit, n in enumerate(self.digit_histogram)}
        return {name: value for name, value in values.items() if value is not None}


def average(several: Sequence[Scores]) -> Scores:
    """The means of scores that were measured alike, with several seeds."""

    def mean(values: list[Any]) -> Any:
        if isinstance(values[0], tuple):
            return tuple(map(fmean, zip(*values, strict=True)))
        return fmean(values) if isinstance(values[0], float) else values[0]

    names = [field.name for field in fields(Scores)]
    return Scores(**{name: mean([getattr(scores, name) for scores in several]) for name in names})


def load_floors() -> Scores:
    """The scores of 10,000 real training images in the place of drawings: what chance leaves.

    The means over three draws, measured by `floors.py` with the pinned judge.

    Raises:
        JudgeError: the judge's card is missing.
    """
    return average([Scores.from_json(scores) for scores in read_card()["floors"]])


def score_rows(scores: Scores) -> list[tuple[str, float, str, str]]:
    """Name, score, floor and meaning of a generator's scores: see `metric_rows`."""
    return metric_rows(scores.metrics(), scores.judge, scores.num_samples)


def metric_rows(
    metrics: Mapping[str, float], judge: str, num_samples: int
) -> list[tuple[str, float, str, str]]:
    """Name, value, floor and meaning, in order; a floor holds for its judge and count alone.

    The shares of the ten digits are left out.
    """
    floor = load_floors()
    floors: dict[str, float] = {}
    if (floor.judge, floor.num_samples) == (judge, num_samples):
        floors = floor.metrics() | {"synthetic_accuracy": read_card()["test_accuracy"]}
    return [
        (name, value, f"{floors[name]:.4f}" if name in floors else "", explain(name).meaning)
        for name, value in metrics.items()
        if not name.startswith("digit_share")
    ]


def evaluate(
    draw: Draw,
    data: Mnist,
    *,
    num_samples: int = 10_000,
    seed: int = 0,
    device: torch.device | str = "cpu",
    protocol: TwoSampleProtocol = TWO_SAMPLE_10K,
    cache: Path | None = None,
) -> Scores:
    """Score what `draw` draws, with the pinned judge.

    It is asked once, for the drawings to score and to train the two-sample classifier with, and
    for as many new ones to test that on. On a CPU the same seed gives the same scores.

    Args:
        draw: the generator under judgement. The order of its images does not matter.
        data: the real images. Drawings are compared with all test images.
        num_samples: drawings to score. If there are fewer than the protocol says, it is cut down
            and its id says so.
        seed: decides what is drawn and how the two-sample classifier is trained.
        device: where to measure.
        protocol: how to train the two-sample classifier.
        cache: a folder in which to keep what the judge sees in the real images.

    Raises:
        EvaluationError: num_samples is too small, or larger than the training set.
        JudgeError: the judge's files are not the pinned ones.
    """
    device = torch.device(device)
    if not NUM_NEIGHBOURS < num_samples <= len(data.train):
        raise EvaluationError(
            f"num_samples must be {NUM_NEIGHBOURS + 1} to {len(data.train)}, not {num_samples}"
        )
    protocol = protocol.with_images(num_samples)
    judge = load_judge(device)
    reference = load_reference(judge, data, cache)

    num_new = min(num_samples, len(data.test))
    num_drawn = max(num_samples, protocol.num_needed) + num_new
    rng = torch.Generator().manual_seed(seed)
    images, asked = draw(num_drawn, seed)
    # Drawings may come sorted by digit; any part of them must be like the whole.
    order = torch.randperm(num_drawn, generator=rng)
    images = images[order.to(images.device)]
    scored, new = images[:num_samples], images[-num_new:]

    verdict = judge_images(judge, scored)
    features, digits = verdict.features, verdict.digits.cpu()
    as_asked = share_as_asked(digits, None if asked is None else asked.cpu()[order[:num_samples]])
    overlap = support(features, reference.test_features, reference.test_reach)
    close_pixels, close_features = nearness_to_training(scored, features, data, reference)
    chosen = torch.randperm(len(data.train), generator=rng)[: protocol.num_needed]
    tested = torch.randperm(len(data.test), generator=rng)[:num_new]
    accuracy = two_sample_accuracy(
        protocol,
        generated=images[: protocol.num_needed],
        real=data.train.images[chosen.to(data.train.images.device)],
        new_generated=new,
        new_real=data.test.images[tested.to(data.test.images.device)],
        seed=seed,
        device=device,
    )
    return Scores(
        judge=JUDGE_ID,
        num_samples=num_samples,
        protocol=protocol.id,
        frechet_distance=frechet_distance(features, reference.test_features),
        kid_x1000=1000 * kernel_distance(features, reference.test_features),
        precision=overlap.precision,
        recall=overlap.recall,
        density=overlap.density,
        coverage=overlap.coverage,
        digit_as_asked=as_asked,
        two_sample=accuracy,
        memorisation_pixels=close_pixels.memorisation,
        memorisation_features=close_features.memorisation,
        nearest_pixels=close_pixels.nearest,
        nearest_features=close_features.nearest,
        digit_histogram=tuple(
            count / num_samples for count in digits.bincount(minlength=10).tolist()
        ),
    )


def draws_like(generator: Generator, labels: Tensor, *, temperature: float = 1.0) -> Draw:
    """How a generator is judged: asked for digits as often as they are among `labels` [n].

    Real digits are not equally frequent. A generator that is not told digits draws any. The
    temperature is that of `sampling.draw`.
    """

    def draw_num(num: int, seed: int) -> tuple[Tensor, Tensor | None]:
        if generator.config.num_classes == 0:
            anything = [sampling.ANY_DIGIT]
            drawn = sampling.draw(generator, anything, num=num, seed=seed, temperature=temperature)
            return drawn, None
        rng = torch.Generator().manual_seed(seed)
        asked = labels.cpu()[torch.randint(len(labels), (num,), generator=rng)]
        return sampling.draw(generator, asked, seed=seed, temperature=temperature), asked

    return draw_num


def share_as_asked(digits: Tensor, asked: Tensor | None) -> float | None:
    """The share of read digits [n] that are those asked for [n]; None where none were."""
    return None if asked is None else int((digits.cpu() == asked.cpu()).sum()) / len(digits)


def nearness_to_training(
    images: Tensor, features: Tensor, data: Mnist, reference: Reference
) -> tuple[Closeness, Closeness]:
    """How close drawings, uint8 [n, 28, 28] with features [n, 128], lie to training images.

    First in pixels, then in features, measured on the device of the features.
    """
    near_pixels = nearest_image_distances(
        images.to(features.device), data.train.images.to(features.device)
    )
    near_features = nearest_distances(features, reference.train_features)
    return (
        closeness(near_pixels, reference.test_nearest_pixels),
        closeness(near_features, reference.test_nearest_features),
    )
