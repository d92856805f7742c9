from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from tasks.journal import sheet_path
from tasks.pictures import (
    ANIMATION_SCALE,
    SCALE,
    enlarge,
    epoch_of,
    find_sheets,
    plot_losses,
    save_animation,
)


@pytest.fixture
def sheets(tmp_path: Path) -> list[Path]:
    """Sheets of epochs 1, 2 and 10, of noise."""
    rng = np.random.default_rng(0)
    paths = [tmp_path / f"epoch-{epoch:04}.png" for epoch in (1, 2, 10)]
    for path in paths:
        Image.fromarray(rng.integers(0, 256, (302, 302), np.uint8)).save(path)
    return paths


def test_enlarged_sheet_has_the_same_pixels_only_larger(sheets: list[Path], tmp_path: Path) -> None:
    enlarge(sheets[0], tmp_path / "samples.png")
    small, large = (np.asarray(Image.open(p)) for p in (sheets[0], tmp_path / "samples.png"))
    np.testing.assert_array_equal(large, small.repeat(SCALE, 0).repeat(SCALE, 1))


def test_animation_has_a_frame_a_sheet_and_rests_on_the_last(
    sheets: list[Path], tmp_path: Path
) -> None:
    save_animation(sheets, tmp_path / "progress.gif")
    with Image.open(tmp_path / "progress.gif") as animation:
        assert animation.n_frames == 3
        durations, pictures = [], []
        for frame in range(3):
            animation.seek(frame)
            durations.append(animation.info["duration"])
            pictures.append(np.asarray(animation.convert("L")))
    assert durations[0] == durations[1] < durations[2]
    caption = pictures[0].shape[0] - 302 * ANIMATION_SCALE
    for path, picture in zip(sheets, pictures, strict=True):
        small = np.asarray(Image.open(path)).astype(int)
        shown = picture[caption::ANIMATION_SCALE, ::ANIMATION_SCALE]
        assert np.abs(shown - small).max() <= 16, "every grey is near its own"
    assert (pictures[0][:caption] != pictures[1][:caption]).any(), "each names its epoch"


def test_epoch_is_read_from_the_name() -> None:
    assert epoch_of(Path("7") / "epoch-0012.png") == 12
    assert epoch_of(Path("epoch-12345.png")) == 12345


def test_sheets_come_by_epoch_however_many_digits_it_has(tmp_path: Path) -> None:
    sheets = [sheet_path(tmp_path, epoch) for epoch in (0, 2, 10, 9500, 10_000, 100_000)]
    sheets[0].parent.mkdir()
    for sheet in (*reversed(sheets), sheets[0].with_suffix(".part")):
        sheet.touch()
    assert find_sheets(tmp_path) == sheets


@pytest.mark.parametrize("num_epochs", [1, 2, 500])
def test_losses_are_large_enough_for_a_slide(num_epochs: int, tmp_path: Path) -> None:
    names = ("d_loss", "g_loss", "d_real", "d_fake")
    curves = pd.DataFrame({name: [0.5] * num_epochs for name in names})
    plot_losses(curves.assign(epoch=range(1, num_epochs + 1)), tmp_path / "losses.png")
    with Image.open(tmp_path / "losses.png") as picture:
        assert picture.width >= 1600
