"""Which of two generators draws better: judged alike, with the noise of the judgement stated."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gan.data import Mnist
from gan.evaluation.judge import JUDGE_ID, Judge, judge_images, load_judge
from gan.evaluation.metrics import NUM_NEIGHBOURS, frechet_distance, support
from gan.evaluation.reference import Reference, load_reference
from gan.evaluation.scores import Draw, EvaluationError, nearness_to_training, share_as_asked

NUM_REPLICATES = 400
CONFIDENCE = 0.95


@dataclass(frozen=True, kw_only=True)
class Standing:
    """The scores of one of the two; `scores.METRICS` says what each number means."""

    frechet_distance: float
    coverage: float
    digit_as_asked: float | None
    """None for a generator that is not told which digit to draw."""
    memorisation_pixels: float
    memorisation_features: float


@dataclass(frozen=True, kw_only=True)
class Interval:
    """Where a number lies, 95 times in 100."""

    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What comparing two generators found."""

    judge: str
    """The judge's id."""
    num_samples: int
    """Drawings of each, against all 10,000 test images."""
    seed: int
    challenger: Standing
    champion: Standing
    frechet_difference: Interval
    """The challenger's distance less the champion's: wholly below 0 where it is surely nearer."""


def compare(
    challenger: Draw,
    champion: Draw,
    data: Mnist,
    *,
    num_samples: int = 10_000,
    seed: int = 0,
    device: torch.device | str = "cpu",
    cache: Path | None = None,
) -> Comparison:
    """Compare two generators: same judge, same real images, same seed for what both of them draw.

    On a CPU the same seed gives the same comparison.

    Args:
        challenger: draws for the one.
        champion: draws for the other.
        data: the real images. Drawings are compared with all test images.
        num_samples: drawings of each; the fewer, the wider the interval.
        seed: decides what is drawn, and the bootstrap's choices.
        device: where to measure.
        cache: a folder in which to keep what the judge sees in the real images.

    Raises:
        EvaluationError: num_samples is too small.
        JudgeError: the judge's files are not the pinned ones.
    """
    if num_samples <= NUM_NEIGHBOURS:
        raise EvaluationError(f"num_samples must be above {NUM_NEIGHBOURS}, not {num_samples}")
    judge = load_judge(device)
    reference = load_reference(judge, data, cache)
    ours, our_features = _look(*challenger(num_samples, seed), data, judge, reference)
    theirs, their_features = _look(*champion(num_samples, seed), data, judge, reference)
    return Comparison(
        judge=JUDGE_ID,
        num_samples=num_samples,
        seed=seed,
        challenger=ours,
        champion=theirs,
        frechet_difference=bootstrap_difference(
            our_features, their_features, reference.test_features, seed=seed
        ),
    )


def _look(
    images: Tensor, asked: Tensor | None, data: Mnist, judge: Judge, reference: Reference
) -> tuple[Standing, Tensor]:
    verdict = judge_images(judge, images)
    pixels, features = nearness_to_training(images, verdict.features, data, reference)
    overlap = support(verdict.features, reference.test_features, reference.test_reach)
    standing = Standing(
        frechet_distance=frechet_distance(verdict.features, reference.test_features),
        coverage=overlap.coverage,
        digit_as_asked=share_as_asked(verdict.digits, asked),
        memorisation_pixels=pixels.memorisation,
        memorisation_features=features.memorisation,
    )
    return standing, verdict.features


def bootstrap_difference(
    challenger: Tensor,
    champion: Tensor,
    real: Tensor,
    *,
    seed: int,
    num_replicates: int = NUM_REPLICATES,
) -> Interval:
    """The interval of F(challenger, real) - F(champion, real), F being the Frechet distance.

    Each replicate draws as many rows again, with replacement. The two sets of drawings are
    resampled by the same rows: row by row they had the same digit, and the same noise if they take
    as many numbers of it, so what they share cancels. The real images are resampled too, once for
    both: they are a sample of the digits themselves, and without that the interval of two equals
    with different faults left 0 out in one case of four instead of one of twenty.

    A resampled set lies further away than the set itself, as that lies further away than the whole
    distribution; in the difference only what the two biases differ by is left. The basic
    bootstrap interval (Davison & Hinkley 1997, 5.2) reflects the replicates at the estimate, so
    that this is taken off where a percentile interval would add it once more.

    Two sets without any fault get an interval that is too wide, which errs towards the champion.

    Args:
        challenger: features [n, d].
        champion: features [n, d], row by row drawn as the challenger's.
        real: features [m, d].
        seed: decides which rows are taken.
        num_replicates: 400 take about 12 s of one core at n = m = 10,000 and d = 128.
    """
    # Around a mean and in float64, as sums of squares are subtracted; not every device has it.
    centre = real.mean(0)
    ours, theirs, reals = ((x - centre).cpu().double() for x in (challenger, champion, real))
    rng = torch.Generator().manual_seed(seed)

    def difference(drawn: Tensor, seen: Tensor) -> Tensor:
        mean, covariance = _moments(reals, seen)
        root = _root(covariance)
        ours_away, theirs_away = (
            _frechet(*_moments(points, drawn), mean, root) for points in (ours, theirs)
        )
        return ours_away - theirs_away

    def resample(n: int) -> Tensor:
        return torch.randint(n, (n,), generator=rng).bincount(minlength=n).double()

    estimate = difference(torch.ones(len(ours)).double(), torch.ones(len(reals)).double())
    replicates = torch.stack(
        [difference(resample(len(ours)), resample(len(reals))) for _ in range(num_replicates)]
    )
    tail = (1 - CONFIDENCE) / 2
    low, high = (2 * estimate - replicates.quantile(q) for q in (1 - tail, tail))
    return Interval(low=float(low), high=float(high))


def _moments(points: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [d] and covariance [d, d] of points [n, d] that are taken so many times [n]."""
    num = counts.sum()
    mean = counts @ points / num
    squares = (points * counts[:, None]).T @ points
    return mean, (squares - num * mean.outer(mean)) / (num - 1)


def _root(covariance: Tensor) -> Tensor:
    """Some A with A A^T = covariance, which may be singular."""
    values, vectors = torch.linalg.eigh(covariance)
    root: Tensor = vectors * values.clamp_min(0).sqrt()
    return root


def _frechet(mean: Tensor, covariance: Tensor, real_mean: Tensor, real_root: Tensor) -> Tensor:
    """`metrics.frechet_distance` from moments: trace (C_g C_r)^(1/2) by a symmetric product."""
    overlap: Tensor = torch.linalg.eigvalsh(real_root.T @ covariance @ real_root)
    spread = covariance.trace() + real_root.square().sum() - 2 * overlap.clamp_min(0).sqrt().sum()
    return (mean - real_mean).square().sum() + spread
