"""Pictures of a training: its curves, and its sample sheets as an animation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure
from PIL import Image

FRAME_MS = 300
LAST_FRAME_MS = 2000


def plot_losses(curves: pd.DataFrame, path: Path) -> None:
    """Draw the losses and the discriminator's probabilities against the epochs, as a PNG."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    losses, probabilities = figure.subplots(1, 2)
    for axes, names in (
        (losses, {"d_loss": "discriminator (sum of two terms)", "g_loss": "generator"}),
        (probabilities, {"d_real": "D(x), real", "d_fake": "D(G(z)), drawn"}),
    ):
        for name, label in names.items():
            axes.plot(curves["epoch"], curves[name], label=label, marker="." * (len(curves) < 30))
        axes.set_xlabel("epoch")
        axes.grid(alpha=0.3)
        axes.legend()
    losses.set_ylabel("loss")
    probabilities.set_ylabel("probability of being real")
    probabilities.set_ylim(0, 1)
    figure.savefig(path, dpi=120)


def save_animation(pictures: Sequence[Path], path: Path) -> None:
    """Join PNG files to an animated GIF that rests on the last."""
    frames = [Image.open(picture) for picture in pictures]
    durations = [FRAME_MS] * (len(frames) - 1) + [LAST_FRAME_MS]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=durations, loop=0)
