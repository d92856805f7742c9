"""Of how many dots MNIST's digits were made: `python -m benchmarks.dots`.

`gan.scan` scales black and white dots to a box of 20 as MNIST's makers did, and so leaves only some
greys to every pixel. The number of dots along the box that makes a digit's greys likeliest is the
digit's. `gan.scan.MEAN_SIZE` and `SPREAD` lie a little below what comes out, as the largest are cut
off there.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.measuring import Machine, count, launch, options, save, table
from gan.config import BOX
from gan.data import load_mnist
from gan.scan import cut_out, resampler

SIZES = range(BOX, 81)
SURE = 8.0
"""Nats by which the likeliest number must beat all others to count as known."""


def likelihoods(size: int, darkest: float, rng: torch.Generator, num_edges: int = 500) -> Tensor:
    """The logarithm of each level's likelihood at the ink's edge: [20, 20, 256].

    From rough straight edges through each pixel. `darkest` is what becomes 255.
    """
    matrix = resampler(size)
    kinds: dict[tuple[float, ...], list[int]] = {}
    for place, weights in enumerate(matrix):
        kinds.setdefault(tuple(weights[weights > 0].tolist()), []).append(place)
    found = torch.empty(BOX, BOX, 256)
    for down, rows in kinds.items():
        for across, columns in kinds.items():
            greys = _edges(torch.tensor(down), torch.tensor(across), num_edges, rng) / darkest
            grey = (greys > 0) & (greys < 0.97)
            counts = ((greys[grey] * 254 + 1e-4).floor().long() + 1).bincount(minlength=256)
            likely = 0.97 * counts / counts.sum().clamp_min(1) + 0.03 / 256
            found[torch.tensor(rows)[:, None], torch.tensor(columns)] = likely.log()
    return found


def _edges(down: Tensor, across: Tensor, num: int, rng: torch.Generator) -> Tensor:
    """Ink of `num` pixels, float [num], that an edge passes; the weights of a pixel's dots."""
    angle = 2 * torch.pi * torch.rand(num, 1, 1, generator=rng)
    offset = 0.75 * max(len(down), len(across)) * (2 * torch.rand(num, 1, 1, generator=rng) - 1)
    ys = torch.arange(len(down)) - (len(down) - 1) / 2
    xs = torch.arange(len(across)) - (len(across) - 1) / 2
    distance = angle.cos() * ys[:, None] + angle.sin() * xs + offset
    ink = distance + 0.35 * torch.randn(distance.shape, generator=rng) > 0
    return torch.einsum("nij,i,j->n", ink.float(), down.float(), across.float())


def number_of_dots(images: Tensor, *, sizes: Sequence[int] = SIZES) -> tuple[Tensor, Tensor]:
    """The likeliest number for each of some images, int64 [n], and by how many nats, float [n].

    Args:
        images: uint8 [n, 28, 28].
        sizes: the numbers that come into question.
    """
    rng = torch.Generator().manual_seed(0)
    levels = cut_out(images, BOX).flatten(1).long()
    # What is nearly full says how often borders cut it, not how the ink ends there.
    grey = (levels > 0) & (levels < 248)
    best = []
    for size in sizes:
        # The darkest pixel's dots may have been cut along neither, one or both of its sides.
        of_size = [
            likelihoods(size, (1 - 0.01 * BOX / size) ** cuts, rng)
            .view(-1, 256)[torch.arange(BOX**2), levels]
            .where(grey, 0)
            .sum(1)
            for cuts in range(3)
        ]
        best.append(torch.stack(of_size).amax(0))
    (first, second), places = torch.stack(best).topk(2, dim=0)
    return torch.tensor(sizes)[places[0]], first - second


def main(arguments: Sequence[str] | None = None) -> None:
    """Count the dots of the first training images, print what came out, and write it as JSON."""
    parser = options("dots")
    parser.add_argument("--num-images", type=count, default=6000)
    given = parser.parse_args(arguments)
    images = load_mnist(given.data).train.images[: given.num_images]
    dots, nats = number_of_dots(images)
    known = dots[nats > SURE].double()
    quantiles = known.quantile(torch.tensor([0.01, 0.16, 0.5, 0.84, 0.99]).double()).tolist()
    rows = [
        ["images", f"{len(dots)}"],
        [f"known by more than {SURE:g} nats", f"{len(known) / len(dots):.1%}"],
        ["mean", f"{known.mean():.1f}"],
        ["standard deviation", f"{known.std():.1f}"],
        ["1%, 16%, 50%, 84%, 99%", ", ".join(f"{value:.0f}" for value in quantiles)],
    ]
    print(f"{Machine.here()}\n\n{table(['dots along the box', ''], rows)}")
    save(given.out, "dots", {"dots": dots.tolist(), "nats": nats.tolist()})


if __name__ == "__main__":
    launch(main)
