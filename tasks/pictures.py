"""Pictures of a training, each good enough for a slide: its curves, its sheets, an animation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageDraw, ImageFont
from PIL.Image import Resampling

SCALE, ANIMATION_SCALE = 3, 2
"""How much larger pictures show a sheet: whole numbers, so that the pixels stay crisp."""
FRAME_MS = 400
LAST_FRAME_MS = 2500
NUM_GREYS = 16

COLOURS = "#1c5d99", "#c8541a"

_CAPTION_HEIGHT = 40


def plot_losses(curves: pd.DataFrame, path: Path) -> None:
    """Draw the losses and the discriminator's probabilities against the epochs, as a PNG."""
    with mpl.rc_context(
        {
            "font.size": 14,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "lines.linewidth": 2.25,
            "legend.frameon": False,
            "figure.constrained_layout.w_pad": 0.15,
            "figure.constrained_layout.h_pad": 0.15,
        }
    ):
        figure = Figure(figsize=(12, 5), layout="constrained")
        losses, probabilities = figure.subplots(1, 2)
        for axes, names in (
            (losses, {"d_loss": "discriminator (sum of two terms)", "g_loss": "generator"}),
            (probabilities, {"d_real": "D(x), real images", "d_fake": "D(G(z)), drawn images"}),
        ):
            for (name, label), colour in zip(names.items(), COLOURS, strict=True):
                marker = "o" if len(curves) < 30 else ""
                axes.plot(curves["epoch"], curves[name], label=label, color=colour, marker=marker)
            axes.set_xlabel("epoch")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.grid(axis="y", alpha=0.3)
        losses.set_title("Losses", loc="left")
        losses.set_ylim(bottom=0)
        probabilities.set_title("Probability of being real", loc="left")
        probabilities.set_ylim(0, 1)
        # Where both meet, the discriminator cannot tell real from drawn.
        probabilities.axhline(0.5, color="0.6", linewidth=1, linestyle=":")
        for axes in (losses, probabilities):
            axes.legend()
        figure.savefig(path, dpi=150)


def enlarge(sheet: Path, path: Path) -> None:
    """Save a sheet of digits as a larger PNG with the same crisp pixels."""
    with Image.open(sheet) as picture:
        _enlarged(picture, SCALE).save(path, optimize=True)


def save_animation(sheets: Sequence[Path], path: Path) -> None:
    """Join the sheets of several epochs, `epoch-NNNN.png`, to an animated GIF that names each.

    It rests on the last sheet, and begins again.
    """
    frames = [_frame(sheet, f"epoch {epoch_of(sheet)}") for sheet in sheets]
    durations = [FRAME_MS] * (len(frames) - 1) + [LAST_FRAME_MS]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=durations, loop=0)


def find_sheets(folder: Path) -> list[Path]:
    """The sheets in a run's folder, by epoch: as text, epoch-10000 would come before epoch-9500."""
    return sorted((folder / "samples").glob("epoch-*.png"), key=epoch_of)


def epoch_of(sheet: Path) -> int:
    """The epoch in the name of a sheet, `epoch-0012.png`."""
    return int(sheet.stem.removeprefix("epoch-"))


def _enlarged(picture: Image.Image, scale: int) -> Image.Image:
    return picture.resize((picture.width * scale, picture.height * scale), Resampling.NEAREST)


def _frame(sheet: Path, caption: str) -> Image.Image:
    with Image.open(sheet) as picture:
        large = _enlarged(picture.convert("L"), ANIMATION_SCALE)
    frame = Image.new("L", (large.width, large.height + _CAPTION_HEIGHT))
    frame.paste(large, (0, _CAPTION_HEIGHT))
    pen = ImageDraw.Draw(frame)
    font = ImageFont.load_default(size=24)
    pen.text((12, _CAPTION_HEIGHT // 2), caption, fill=255, font=font, anchor="lm")
    return frame.quantize(NUM_GREYS)
