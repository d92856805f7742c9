"""Drawing: digits and seeds in, 8-bit images out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from gan.errors import UserError
from gan.networks import Generator

ANY_DIGIT = -1
"""Asks for whatever digit the seed decides."""


class SamplingError(UserError):
    """A drawing that cannot be made."""


@torch.no_grad()
def draw(
    generator: Generator, digits: Sequence[int] | Tensor, *, num: int = 1, seed: int
) -> Tensor:
    """Draw `num` images of each digit, in order: uint8 [len(digits) * num, 28, 28], on the CPU.

    The noise is drawn on the CPU, so that a seed means the same pictures on every device. A digit
    is 0 to 9, or -1 for any.

    Raises:
        SamplingError: a digit, num or seed out of range, or a digit asked of a generator that
            draws without being told which.
    """
    wished = torch.as_tensor(digits, device="cpu")
    asked = wished.long()
    config = generator.config
    if num < 1:
        raise SamplingError(f"num must be at least 1, not {num}")
    if not 0 <= seed < 2**63:
        raise SamplingError(f"seed must be 0 to 2**63 - 1, not {seed}")
    known = (asked >= ANY_DIGIT) & (asked <= 9) & (asked == wished)
    if asked.ndim != 1 or not bool(known.all()):
        raise SamplingError("a digit must be 0 to 9, or -1 for any")
    if config.num_classes == 0 and bool((asked != ANY_DIGIT).any()):
        raise SamplingError("this generator is unconditional: it takes the digit -1 (any) alone")

    asked = asked.repeat_interleave(num)
    rng = torch.Generator().manual_seed(seed)
    noise = torch.randn(len(asked), config.latent_dim, generator=rng)
    if config.num_classes:
        chosen = torch.randint(config.num_classes, asked.shape, generator=rng)
        asked = torch.where(asked == ANY_DIGIT, chosen, asked)

    device = next(generator.parameters()).device
    was_training = generator.training
    generator.eval()
    try:
        batches = [
            to_bytes(generator(z.to(device), digit.to(device))).cpu()
            for z, digit in zip(noise.split(1000), asked.split(1000), strict=True)
        ]
    finally:
        generator.train(was_training)
    return torch.cat(batches)


def to_bytes(images: Tensor) -> Tensor:
    """Round float images [n, 1, 28, 28] in [-1, 1] to uint8 [n, 28, 28]."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).squeeze(1)


def draw_sheet(generator: Generator, *, seed: int) -> Tensor:
    """Draw a sheet of 100 digits, a row a digit where digits can be asked for: uint8 [302, 302]."""
    digits = [ANY_DIGIT] * 10 if generator.config.num_classes == 0 else list(range(10))
    return tile(draw(generator, digits, num=10, seed=seed), columns=10)


def tile(images: Tensor, *, columns: int) -> Tensor:
    """Lay uint8 images [rows * columns, 28, 28] on one sheet, with a border of 2 around each."""
    framed = F.pad(images, (2, 0, 2, 0))
    rows = framed.unflatten(0, (-1, columns)).transpose(1, 2).flatten(0, 1).flatten(1)
    return F.pad(rows, (0, 2, 0, 2))
