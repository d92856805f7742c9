"""Drawing: digits and seeds in, 8-bit images out."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from gan.config import NUM_SEEDS
from gan.errors import UserError
from gan.networks import Generator

ANY_DIGIT = -1
"""Asks for whatever digit the seed decides."""
CHUNK = 100
"""Images drawn at a time: what a layer hands the next still lies in a core's cache."""


class SamplingError(UserError):
    """A drawing that cannot be made."""


def draw(
    generator: Generator,
    digits: Sequence[int] | Tensor,
    *,
    num: int = 1,
    seed: int,
    temperature: float = 1.0,
) -> Tensor:
    """Draw `num` images of each digit, in order: uint8 [len(digits) * num, 28, 28], on the CPU.

    The noise is drawn on the CPU, so that a seed means the same pictures on every device. A digit
    is 0 to 9, or -1 for any. The noise is multiplied by the temperature, 0 to 2: below 1 drawings
    are more typical and less varied (the truncation of Brock et al. 2019, section 3.1, made soft).

    Raises:
        SamplingError: a digit, num, seed or temperature out of range, or a digit asked of a
            generator that draws without being told which.
    """
    if not 0 <= temperature <= 2:
        raise SamplingError(f"temperature must be 0 to 2, not {temperature}")
    noise, asked = _draw_noise(generator, digits, num, seed)
    return _render(generator, noise * temperature, asked)


def interpolate(generator: Generator, digit: int, *, num: int, seed: int, to_seed: int) -> Tensor:
    """Draw the way from the image of one seed to that of another: uint8 [num, 28, 28], on the CPU.

    Both ends are among the `num` images. Each step's noise is again standard normal; the straight
    way would pass through noise that is shorter than any the generator was trained with (White
    2016, "Sampling generative networks"). Where any digit will do, -1, the first seed decides.

    Raises:
        SamplingError: as in `draw`; or fewer than 2 images, or twice the same seed.
    """
    if num < 2:
        raise SamplingError(f"a way from one image to another takes at least 2, not {num}")
    if seed == to_seed:
        raise SamplingError(f"the way needs two seeds, not {seed} twice")
    start, asked = _draw_noise(generator, [digit], 1, seed)
    end, _ = _draw_noise(generator, [digit], 1, to_seed)
    angle = torch.linspace(0, math.pi / 2, num)[:, None]
    return _render(generator, angle.cos() * start + angle.sin() * end, asked.expand(num))


def _draw_noise(
    generator: Generator, digits: Sequence[int] | Tensor, num: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Noise [n, latent_dim] and digits [n] for `num` images of each digit."""
    wished = torch.as_tensor(digits, device="cpu")
    asked = wished.long()
    config = generator.config
    if num < 1:
        raise SamplingError(f"num must be at least 1, not {num}")
    if not 0 <= seed < NUM_SEEDS:
        raise SamplingError(f"seed must be 0 to 2**32 - 1, not {seed}")
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
    return noise, asked


@torch.no_grad()
def _render(generator: Generator, noise: Tensor, digits: Tensor) -> Tensor:
    """The images of noise [n, latent_dim] and digits [n]: uint8 [n, 28, 28], on the CPU."""
    device = next(generator.parameters()).device
    was_training = generator.training
    generator.eval()
    try:
        batches = [
            to_bytes(generator(z.to(device), digit.to(device))).cpu()
            for z, digit in zip(noise.split(CHUNK), digits.split(CHUNK), strict=True)
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
