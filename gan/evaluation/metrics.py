"""Metrics between two sets of points: pure functions on features [n, d], one row an image.

Which direction is better, and what each tells, stands in `scores.METRICS`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK = 500
"""Rows compared at a time, so that 10,000 against 10,000 takes 20 MB and not 400 MB."""
TILE = 600
"""Columns compared at a time where the least one is sought: so many are still in a cache then."""


def frechet_distance(generated: Tensor, real: Tensor) -> float:
    """The Frechet distance between Gaussians fitted to [n, d] and [m, d], in float64 on the CPU.

    |mean_g - mean_r|^2 + trace(C_g + C_r - 2 (C_g C_r)^(1/2)); Heusel et al. 2017.
    Biased upwards for few samples: compare only at equal n and m.
    """
    a, b = generated.cpu().double(), real.cpu().double()
    means = (a.mean(0) - b.mean(0)).square().sum()
    c_a, c_b = a.T.cov(), b.T.cov()
    # A product of two covariances has no negative eigenvalues, but for rounding.
    roots = torch.linalg.eigvals(c_a @ c_b).sqrt().real
    return float(means + c_a.trace() + c_b.trace() - 2 * roots.sum())


def kernel_distance(generated: Tensor, real: Tensor) -> float:
    """The kernel ("inception") distance, KID, between [n, d] and [m, d]: unbiased, so 0 for equals.

    The squared maximum mean discrepancy with the kernel (x.y / d + 1)^3; Binkowski et al. 2018.
    Over all pairs at once, where torchmetrics averages random subsets of 1,000 drawn
    from the global random state: this has less variance, and is the same each time.
    """
    n, m = len(generated), len(real)
    within_generated = (_kernel_sum(generated, generated) - _kernel_trace(generated)) / (
        n * (n - 1)
    )
    within_real = (_kernel_sum(real, real) - _kernel_trace(real)) / (m * (m - 1))
    return within_generated + within_real - 2 * _kernel_sum(generated, real) / (n * m)


def _kernel_sum(a: Tensor, b: Tensor) -> float:
    # Sums of a chunk's rows in float32, of chunks in float64 on the CPU: not every device has it.
    sums = [(rows @ b.T / b.shape[1] + 1).pow(3).mean() for rows in a.split(CHUNK)]
    sizes = torch.tensor([len(rows) for rows in a.split(CHUNK)])
    return float((torch.stack(sums).cpu().double() * sizes).sum()) * len(b)


def _kernel_trace(a: Tensor) -> float:
    return float((a.square().sum(1) / a.shape[1] + 1).pow(3).cpu().double().sum())


@dataclass(frozen=True, kw_only=True)
class Support:
    """How two sets overlap, judged by balls around points that reach their nearest neighbours."""

    precision: float
    recall: float
    density: float
    coverage: float


NUM_NEIGHBOURS = 5
"""A ball around a point reaches its 5th nearest neighbour, for all four, as Naeem et al. do."""


def squared_radii(points: Tensor) -> Tensor:
    """The squared distance from each of [n, d] to its 5th nearest other point: [n]; n > 5."""
    # The nearest of all is the point itself, so the sixth is sought.
    return torch.cat(
        [
            _squared_distances(rows, points).topk(NUM_NEIGHBOURS + 1, largest=False).values[:, -1]
            for rows in points.split(CHUNK)
        ]
    )


def support(generated: Tensor, real: Tensor, real_reach: Tensor | None = None) -> Support:
    """Precision, recall, density and coverage of generated [n, d] against real [m, d]; n, m > 5.

    Around each real point lies a ball that reaches its 5th nearest real neighbour. Precision: the
    share of generated points inside some ball. Recall: the same with the sets exchanged
    (Kynkaanniemi et al. 2019). Density: how many balls hold a generated point, on average and
    divided by 5; it can pass 1. Coverage: the share of balls that hold any generated point
    (Naeem et al. 2020).

    Args:
        generated: float32 [n, d].
        real: float32 [m, d].
        real_reach: `squared_radii(real)`, if known.
    """
    if real_reach is None:
        real_reach = squared_radii(real)
    reach = squared_radii(generated)

    num_balls = []
    recalled = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    covered = recalled.clone()
    for rows, rows_reach in zip(generated.split(CHUNK), reach.split(CHUNK), strict=True):
        squared = _squared_distances(rows, real)
        inside = squared <= real_reach
        num_balls.append(inside.sum(1))
        covered |= inside.any(0)
        recalled |= (squared <= rows_reach[:, None]).any(0)
    counts = torch.cat(num_balls)
    return Support(
        precision=int((counts > 0).sum()) / len(counts),
        recall=int(recalled.sum()) / len(real),
        density=int(counts.sum()) / len(counts) / NUM_NEIGHBOURS,
        coverage=int(covered.sum()) / len(real),
    )


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    # Around the mean, so that less is lost when large squares are subtracted.
    centre = b.mean(0)
    a, b = a - centre, b - centre
    products = torch.addmm(b.square().sum(1), a, b.T, alpha=-2)
    return (products + a.square().sum(1, keepdim=True)).clamp_min(0)


def nearest_distances(queries: Tensor, references: Tensor) -> Tensor:
    """The distance from each of [n, d] to the nearest of [m, d]: [n].

    The neighbour is found by products, the distance then taken directly, so a copy is at 0.
    """
    index = _least(
        torch.addmm(some.square().sum(1), queries, some.T, alpha=-2)
        for some in references.split(TILE)
    )
    distances: Tensor = torch.linalg.vector_norm(queries - references[index], dim=1)
    return distances


def nearest_image_distances(queries: Tensor, references: Tensor) -> Tensor:
    """The distance from each of uint8 [n, 28, 28] to the nearest of [m, 28, 28], ink being 1: [n].

    Where the CPU multiplies bytes, the neighbour is found in whole numbers: without rounding, and
    in less than a third of the time that `nearest_distances` takes to find the same one.
    """
    if not _multiplies_bytes(queries.device):
        return nearest_distances(_pixels(queries), _pixels(references))
    points = _centred(queries)
    index = _least(
        some.int().square().sum(1).int() - 2 * torch._int_mm(points, some.T)
        for some in _centred(references).split(TILE)
    )
    apart = _pixels(queries) - _pixels(references[index])
    distances: Tensor = torch.linalg.vector_norm(apart, dim=1)
    return distances


def _least(pieces: Iterable[Tensor]) -> Tensor:
    """Which column of [n, m] is least, the first of equals: [n]; given from left to right in pieces
    of TILE columns."""
    (least, index), *others = (piece.min(1) for piece in pieces)
    for number, (value, column) in enumerate(others, 1):
        lower = value < least
        least = torch.where(lower, value, least)
        index = torch.where(lower, column + number * TILE, index)
    return index


def _multiplies_bytes(device: torch.device) -> bool:
    return device.type == "cpu" and bool(torch.cpu.get_capabilities().get("avx512_vnni"))


def _pixels(images: Tensor) -> Tensor:
    """uint8 images [n, 28, 28] as points: float32 [n, 784] in [0, 1]."""
    return images.flatten(1).float() / 255


def _centred(images: Tensor) -> Tensor:
    """uint8 images [n, 28, 28] as points: int8 [n, 784], a byte's value less 128."""
    return images.flatten(1).bitwise_xor(128).view(torch.int8)


@dataclass(frozen=True, kw_only=True)
class Closeness:
    """How near generated images lie to training images, beside how near real test images lie.

    memorisation: the share of generated images that are nearer to a training image than 99 of 100
        test images are to theirs. 0.01 for unseen real images, 1 for copies.
    nearest: the median distance of generated images to the nearest training image, divided by
        that of test images. 1 for unseen real images, 0 for copies.
    """

    memorisation: float
    nearest: float


def closeness(generated: Tensor, test: Tensor) -> Closeness:
    """Compare distances to the nearest training image: of generated images [n], of test images [m].

    The comparison of both distances is that of Meehan et al. 2020, with a quantile in
    the place of their rank statistic, so that a few copies among many new images show.
    """
    return Closeness(
        memorisation=int((generated < test.quantile(0.01)).sum()) / len(generated),
        nearest=(generated.median() / test.median()).item(),
    )
