"""How MNIST's pictures came from ink, for generators that draw the ink.

NIST's digits were black and white. MNIST's makers cut each to its ink, scaled it to fill a box of
20 pixels, which gave it greys, and laid the box on a sheet of 28 by the ink's centre of mass (LeCun
et al. 1998, section III.A). How exactly, Yadav and Bottou found out ("Cold Case: The Lost MNIST
Digits", 2019, section 2). What follows from these rules alone need not be learned.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gan.config import BOX

SMALLEST, LARGEST = 20, 66
"""Dots: the sides between which nearly all digits were, before they were scaled."""
MEAN_SIZE, SPREAD = 46.5, 9.5
"""Dots: about the mean and the standard deviation of these sides; see `benchmarks.dots`."""
SHARPNESS = 8.0
"""How steeply the likelihood of ink rises with its logit, for the gradient's sake."""


def cut_out(images: Tensor, side: int) -> Tensor:
    """The square of each image with the ink in its middle, or the first whole pixel before it.

    With a side of 20 that is the box that a digit of MNIST filled before it was laid on its sheet.

    Args:
        images: uint8 [n, 28, 28].
        side: of the square, 1 to 28. Ink that lies wider apart is cut off below or on the right; a
            side of 20 loses none of MNIST's.

    Returns:
        uint8 [n, side, side].
    """
    if side == 28:
        return images
    for axis, other in ((1, 2), (2, 1)):
        first, length = _extent(images.amax(other) > 0)
        start = (first - (side - length).clamp_min(0) // 2).clamp(0, 28 - side)
        index = start[:, None] + torch.arange(side, device=images.device)
        shape = list(images.shape)
        shape[axis] = side
        images = images.gather(axis, index.unsqueeze(other).expand(shape))
    return images


class Scan(nn.Module):
    """Drawings in ink to MNIST's greys: cut to the ink, scaled to fill a box of 20, 8 bits.

    Ink is there or not. Forward that is exact; backward the gradient passes as if ink were
    logistic in its logit, and nothing rounded (straight through: Bengio et al. 2013).
    """

    def __init__(self, dots: int) -> None:
        super().__init__()
        self.dots = dots
        with torch.device("cpu"):  # real values also where a network is built without memory
            self.register_buffer("numbers", _numbers(BOX * dots), persistent=False)
            self.register_buffer("matrices", _matrices(), persistent=False)

    def forward(self, logits: Tensor, fineness: Tensor) -> Tensor:
        """Scan each drawing.

        Args:
            logits: float [n, dots * dots, 20, 20], above 0 where there is ink: `dots` by `dots` of
                them in each cell of the box.
            fineness: float [n], standard normal: decides how many dots the scanner sees along a
                side, which is to say how large the digit was written.

        Returns:
            float [n, 1, 20, 20] in [-1, 1], of 256 levels.
        """
        with torch.autocast(logits.device.type, enabled=False):
            canvas = F.pixel_shuffle(logits.float(), self.dots)[:, 0]
            ink: Tensor = _Ink.apply(canvas)
            side = canvas.shape[1]
            sizes = (MEAN_SIZE + SPREAD * fineness.float()).round().long()
            sizes = sizes.clamp(SMALLEST, min(LARGEST, side))
            rows, columns = self._resamplers(canvas > 0, sizes)
            greys = rows @ ink @ columns.mT
            # 1 and up to 254 more where there is ink at all; the darkest pixel has 255.
            greys = greys * (254 / greys.detach().amax((1, 2), keepdim=True).clamp_min(1e-3))
            scanned = (greys.floor() + 1).clamp_max(255).where(greys > 0, 0)
            exact = (greys + (scanned - greys).detach()).unsqueeze(1)
            return exact / 127.5 - 1

    def _resamplers(self, there: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
        """The matrices [n, 20, side] that scale the rows and the columns of canvases to their box.

        Args:
            there: bool [n, side, side], where there is ink.
            sizes: int64 [n], how many dots along a side are seen.
        """
        numbers = self.get_buffer("numbers")[sizes]
        seen = numbers < LARGEST
        there = there & seen[:, None, :] & seen[:, :, None]
        extents = []
        for across in (2, 1):
            first, length = _extent(there.any(across))
            last = (first + length - 1).clamp_min(0)
            begin, end = (numbers.gather(1, dot[:, None]) for dot in (first, last))
            extents.append((begin, (end - begin + 1).where(length[:, None] > 0, 0)))
        filled = torch.maximum(*(length for _, length in extents)).clamp_min(SMALLEST)
        matrices = self.get_buffer("matrices")[filled[:, 0]]
        scaled = []
        for begin, length in extents:
            # The ink to the square's middle, or the first whole dot before it.
            places = numbers - begin + (filled - length) // 2
            places = places.where(seen & (places >= 0) & (places < LARGEST), LARGEST)
            scaled.append(matrices.gather(2, places.unsqueeze(1).expand(-1, BOX, -1)))
        return scaled[0], scaled[1]


class _Ink(torch.autograd.Function):
    """1 where a logit is above 0, else 0; the gradient is that of a logistic curve."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        ctx.save_for_backward(logits)
        return (logits > 0).float()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        likely = torch.sigmoid(SHARPNESS * ctx.saved_tensors[0])
        return gradient * (SHARPNESS * likely * (1 - likely))


class Centring(nn.Module):
    """Drawings [n, 1, 20, 20] to sheets [n, 1, 28, 28]: the centre of mass into the middle.

    So were MNIST's digits laid, in whole pixels. In training they stay in their box, where the
    discriminator sees real ones, too.
    """

    def forward(self, drawings: Tensor) -> Tensor:
        """Lay each drawing, all of it, on paper."""
        if self.training:
            return drawings
        ink = drawings + 1
        mass = ink.sum((2, 3)).clamp_min(1e-3)
        places = torch.arange(BOX, device=ink.device)
        lines = torch.arange(28, device=ink.device)
        sheets = F.pad(drawings, (0, 28 - BOX, 0, 28 - BOX), value=-1.0)
        for along, across in ((2, 3), (3, 2)):
            centre = (ink.sum(across) * places).sum(2) / mass  # [n, 1]
            offset = (14 - centre).round().clamp(0, 28 - BOX).long()
            moved = ((lines - offset) % 28)[:, None].unsqueeze(across)
            sheets = sheets.gather(along, moved.expand_as(sheets))
        return sheets


def resampler(size: int) -> Tensor:
    """The matrix, float64 [20, size], that takes `size` dots to 20 pixels along one side.

    A dot is cut by the pixels' borders as if it were 0.99 of its size, but counts whole where none
    cuts it: hence MNIST's rows and columns of 252 or 253 where others have 255.

    Raises:
        ValueError: the size is below 20; so small digits were enlarged first.
    """
    if size < BOX:
        raise ValueError(f"size must be at least {BOX}, not {size}")
    matrix, scale = torch.zeros(BOX, size, dtype=torch.float64), BOX / size
    for dot in range(size):
        # Whole numbers where they can be: a border is crossed, or it is not.
        first, rest = divmod(dot * BOX, size)
        if (rest + 0.99 * BOX) <= size:
            matrix[first, dot] = scale
        else:
            matrix[first, dot] = (size - rest) / size
            matrix[first + 1, dot] = (rest + 0.99 * BOX - size) / size
    return matrix


def _numbers(side: int) -> Tensor:
    """Which dot of a scan each dot along a canvas is, or 66 if it is not seen: [67, side].

    A row for each number of dots that a scan has.
    """
    numbers = torch.full((LARGEST + 1, side), LARGEST)
    for size in range(SMALLEST, min(LARGEST, side) + 1):
        seen = torch.arange(size)
        numbers[size, (2 * seen + 1) * side // (2 * size)] = seen
    return numbers


def _matrices() -> Tensor:
    """The resampler of each size, then nothing: [67, 20, 67]."""
    matrices = torch.zeros(LARGEST + 1, BOX, LARGEST + 1)
    for size in range(SMALLEST, LARGEST + 1):
        matrices[size, :, :size] = resampler(size)
    return matrices


def _extent(inked: Tensor) -> tuple[Tensor, Tensor]:
    """The first true place along each row of [n, m] and the length up to the last, both [n]."""
    first = inked.int().argmax(1)
    end = inked.shape[1] - inked.flip(1).int().argmax(1)
    return first, (end - first).where(inked.any(1), 0)
