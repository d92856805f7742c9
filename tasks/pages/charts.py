"""Line charts as plain SVG: this computes, `page.html` draws."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import pandas as pd
from matplotlib.ticker import LogLocator, MaxNLocator

MAX_POINTS = 1000
"""More than this many points of a curve cannot be told apart on a chart."""
MAX_MARKED = 30
"""Curves of at most this many points get a mark at each."""
LOG_FROM = 4
"""A line that ends this many times earlier than another would be squeezed on a linear axis."""


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line of a chart."""

    label: str
    film: int
    """Which of the page's films it belongs to."""
    curve: str
    """The film's curve, such as `d_loss`."""
    colour: int
    """Which of the style sheet's colours it has."""
    values: pd.Series
    """The curve, by epoch; at least one value."""


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A few lines over the epochs, from 0 up, in a box of `SIZE`."""

    SIZE: ClassVar = (400, 200)
    LEFT, RIGHT, TOP, BOTTOM = 40, 8, 10, 24

    title: str
    note: str
    """How to read it, in a sentence."""
    series: Sequence[Series]
    top: float | None = None
    """The end of the vertical axis, where it is known beforehand."""

    @property
    def last_epoch(self) -> int:
        """The end of the horizontal axis."""
        return max(int(line.values.index[-1]) for line in self.series)

    @property
    def logarithmic(self) -> bool:
        """Whether the epochs lie on a logarithmic axis, as the lines differ much in length."""
        ends = [int(line.values.index[-1]) for line in self.series]
        return max(ends) >= LOG_FROM * min(ends)

    @property
    def highest(self) -> float:
        """The end of the vertical axis."""
        return self.top or float(self.y_ticks[-1])

    @property
    def x_ticks(self) -> list[int]:
        """Round epochs."""
        locator = LogLocator(subs=(1, 2, 5)) if self.logarithmic else MaxNLocator(6, integer=True)
        ticks = locator.tick_values(1, max(self.last_epoch, 2))
        return [int(tick) for tick in ticks if 1 <= tick <= self.last_epoch]

    @property
    def y_ticks(self) -> list[float]:
        """Round values that span the lines."""
        most = self.top or max(float(line.values.max()) for line in self.series)
        # Lines that are next to nothing lie on the axis: so small, there are no round values.
        return list(MaxNLocator(4).tick_values(0, most if most > 1e-12 else 1))

    def x(self, epoch: float) -> float:
        """Where an epoch lies; one before the first, at the left end."""
        epoch = max(epoch, 1)
        if self.logarithmic:
            share = math.log(epoch) / math.log(self.last_epoch)
        else:
            share = (epoch - 1) / max(self.last_epoch - 1, 1)
        return round(self.LEFT + share * (self.SIZE[0] - self.LEFT - self.RIGHT), 1)

    def y(self, value: float) -> float:
        """Where a value lies."""
        height = self.SIZE[1] - self.TOP - self.BOTTOM
        return round(self.TOP + (1 - value / self.highest) * height, 1)

    def points(self, line: Series) -> list[tuple[float, float]]:
        """The line's points, thinned where they are too many to see; the last is kept."""
        thin = line.values[:: -(-len(line.values) // MAX_POINTS)]
        kept = pd.concat([thin, line.values.iloc[-1:]])
        return [(self.x(epoch), self.y(value)) for epoch, value in kept.items()]

    def marked(self, line: Series) -> bool:
        """Whether each point is marked."""
        return len(line.values) <= MAX_MARKED

    @property
    def description(self) -> str:
        """The chart in words."""
        lines = (
            f"{line.label} from {line.values.iloc[0]:.3g} to {line.values.iloc[-1]:.3g}"
            for line in self.series
        )
        return f"{self.title} over {self.last_epoch} epochs: {'; '.join(lines)}."


LOSS_NOTE = "The discriminator's loss is the sum of its two terms, on real and on drawn images."
PROBABILITY_NOTE = (
    "How sure the discriminator is that an image is real, on average. Where it cannot tell real "
    "from drawn, both are 0.5."
)


def curves_at(curves: pd.DataFrame, epochs: Sequence[int]) -> Mapping[str, Sequence[float]]:
    """The value of every curve at the epochs, or at the next one before; NaN where none is."""
    chosen = curves.reindex(list(epochs), method="ffill")
    return {str(name): chosen[name].tolist() for name in curves}
