import pytest

from gan.training import Progress
from tasks.progress import describe
from tasks.training import is_picture_epoch


def test_published_epochs_get_pictures() -> None:
    assert all(is_picture_epoch(epoch, 100) for epoch in (1, 2, 20, 100))


@pytest.mark.parametrize("epochs", [1, 2, 3, 10, 19, 20, 100, 1000])
def test_pictures_are_few_and_hold_first_and_last(epochs: int) -> None:
    drawn = [epoch for epoch in range(1, epochs + 1) if is_picture_epoch(epoch, epochs)]
    assert drawn[0] == 1
    assert drawn[-1] == epochs
    assert len(drawn) <= 24
    if epochs >= 20:
        assert len(drawn) >= 20


def test_progress_line_says_losses_rate_and_time_left() -> None:
    progress = Progress(
        epoch=3,
        epoch_done=False,
        step=10,
        num_steps=100,
        d_loss=1.25,
        g_loss=0.94,
        d_real=0.6,
        d_fake=0.4,
        images_per_s=12345.6,
        seconds_left=3661.2,
    )
    line = describe(progress)
    assert line == ("D 1.250  G 0.940  D(x) 0.60  D(G(z)) 0.40  12,346 images/s  1:01:01 left")
