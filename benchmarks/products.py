"""The matrix products of a training step, and how fast this machine multiplies at its best.

A product [m, k] x [k, n] takes 2 m k n floating-point operations. With G and D the numbers of
weights of the two fully connected networks, G1 and D1 those of their first layers, a step with a
batch of b takes

    2 b (4 G - G1 + 8 D - 2 D1)

that is: the generator forward twice and its gradients once (twice the work, but for the first
layer, as noise needs no gradient); the discriminator forward on 2 b images, then on b; its
gradients for 2 b images, but for the first layer's inputs; and for the generator's sake the
gradients of b inputs through all its layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import count

import torch
from torch import nn

from gan.config import TrainConfig
from gan.networks import build_discriminator, build_generator

Product = tuple[int, int, int]
"""m, k and n of [m, k] x [k, n]."""
SQUARE: Sequence[Product] = ((2048, 2048, 2048),)
"""A product that no cache holds, yet large enough for the machine's best."""


def step_products(config: TrainConfig) -> list[Product]:
    """The matrix products of one step of `gan.training.train` with the fully connected pair."""
    b = config.batch_size
    with torch.device("meta"):
        generator = _linear(build_generator(config.networks))
        discriminator = _linear(build_discriminator(config.networks, torch.Generator()))

    def forward(layers: list[Product], num: int) -> list[Product]:
        return [(num, k, n) for _, k, n in layers]

    def to_weights(layers: list[Product], num: int) -> list[Product]:
        return [(n, num, k) for _, k, n in layers]

    def to_inputs(layers: list[Product], num: int) -> list[Product]:
        return [(num, n, k) for _, k, n in layers]

    return [
        *forward(generator, b),
        *forward(discriminator, 2 * b),
        *to_weights(discriminator, 2 * b),
        *to_inputs(discriminator[1:], 2 * b),
        *forward(generator, b),
        *forward(discriminator, b),
        *to_inputs(discriminator, b),
        *to_weights(generator, b),
        *to_inputs(generator[1:], b),
    ]


def _linear(network: nn.Module) -> list[Product]:
    layers = (each for each in network.modules() if isinstance(each, nn.Linear))
    return [(1, each.in_features, each.out_features) for each in layers]


def flops(products: Sequence[Product]) -> int:
    """Floating-point operations of these products."""
    return sum(2 * m * k * n for m, k, n in products)


def multiply(
    products: Sequence[Product], dtype: torch.dtype, device: torch.device
) -> Callable[[], Iterator[int]]:
    """A contestant that does nothing else than these products, again and again; yields FLOPs."""

    def work() -> Iterator[int]:
        factors = [
            (torch.randn(m, k, device=device, dtype=dtype),
             torch.randn(k, n, device=device, dtype=dtype))
            for m, k, n in products
        ]  # fmt: skip
        for times in count(1):
            for a, b in factors:
                torch.mm(a, b)
            yield times * flops(products)

    return work
