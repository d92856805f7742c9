from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gan.data import load_mnist
from gan.scan import LARGEST, MEAN_SIZE, SHARPNESS, SPREAD, Centring, Scan, cut_out, resampler


def fineness(size: int) -> Tensor:
    """What makes the scanner see `size` dots along a side."""
    return torch.tensor([(size - MEAN_SIZE) / SPREAD])


def logits(canvas: Tensor) -> Tensor:
    """Those of a canvas, bool [n, side, side], that holds ink where it is true."""
    signs = torch.where(canvas, 1.0, -1.0).unsqueeze(1)
    return torch.nn.functional.pixel_unshuffle(signs, canvas.shape[-1] // 20)


def levels(drawings: Tensor) -> Tensor:
    return (drawings + 1) * 127.5


@given(st.data())
def test_what_is_cut_out_is_the_ink_in_the_middle(data: st.DataObject) -> None:
    side = data.draw(st.integers(1, 28))
    height, width = (data.draw(st.integers(1, side)) for _ in range(2))
    top, left = data.draw(st.integers(0, 28 - height)), data.draw(st.integers(0, 28 - width))
    image = torch.zeros(1, 28, 28, dtype=torch.uint8)
    ink = torch.arange(1, height * width + 1).remainder(255).add(1).to(torch.uint8)
    image[0, top : top + height, left : left + width] = ink.view(height, width)
    square = cut_out(image, side)
    # As near to the middle as the sheet allows.
    down = min(max(top - (side - height) // 2, 0), 28 - side)
    aside = min(max(left - (side - width) // 2, 0), 28 - side)
    assert torch.equal(square, image[:, down : down + side, aside : aside + side])
    assert square.long().sum() == image.long().sum()


def test_what_is_too_wide_to_be_cut_out_is_cut_off_and_empty_paper_stays_empty() -> None:
    images = torch.zeros(2, 28, 28, dtype=torch.uint8)
    images[0, 3:27, 3:27] = 1
    assert cut_out(images, 20).sum((1, 2)).tolist() == [400, 0]


def test_all_ink_of_mnist_fits_into_its_box(mnist_dir: Path) -> None:
    for split in (load_mnist(mnist_dir).train, load_mnist(mnist_dir).test):
        boxes = cut_out(split.images, 20)
        assert boxes.dtype == torch.uint8
        assert torch.equal(boxes.sum((1, 2)), split.images.sum((1, 2)))


def test_centring_puts_real_digits_where_they_were(mnist_dir: Path) -> None:
    pixels = load_mnist(mnist_dir, "cpu").test.images
    boxes = cut_out(pixels, 20).unsqueeze(1).float() / 127.5 - 1
    laid = Centring().eval()(boxes).squeeze(1)
    torch.testing.assert_close(laid, pixels.float() / 127.5 - 1)


@given(data=st.data())
@settings(max_examples=50)
def test_centring_moves_all_ink_and_nothing_else(data: st.DataObject) -> None:
    rng = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    ink = torch.rand(3, 1, 20, 20, generator=rng) ** data.draw(st.sampled_from([1, 9, 99]))
    drawings = (2 * ink - 1).requires_grad_()
    sheets = Centring().eval()(drawings)
    assert sheets.shape == (3, 1, 28, 28)
    torch.testing.assert_close((sheets + 1).sum((1, 2, 3)), (drawings + 1).sum((1, 2, 3)))
    # Each pixel of a drawing is one of its sheet.
    weights = torch.rand(sheets.shape, generator=rng)
    (gradient,) = torch.autograd.grad((weights * sheets).sum(), drawings)
    torch.testing.assert_close(
        (gradient * (drawings + 1)).sum((1, 2, 3)), (weights * (sheets + 1)).sum((1, 2, 3))
    )


def test_in_training_drawings_stay_in_their_box() -> None:
    drawings = torch.rand(2, 1, 20, 20)
    assert torch.equal(Centring().train()(drawings), drawings)


@pytest.mark.parametrize("size", range(20, LARGEST + 1))
def test_a_dot_counts_whole_unless_a_border_cuts_it(size: int) -> None:
    matrix = resampler(size)
    assert matrix.shape == (20, size)
    weight = matrix.sum(0) * size / 20
    cut = (matrix > 0).sum(0) == 2
    torch.testing.assert_close(weight, torch.where(cut, 0.99, 1.0).double())
    # Borders are at multiples of size / 20: all 19 but the whole ones cut a dot.
    assert cut.sum() == sum(border * size % 20 != 0 for border in range(1, 20))


def test_too_few_dots_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 20, not 19"):
        resampler(19)


@given(data=st.data())
@settings(max_examples=50)
def test_a_scan_fills_the_box_with_8_bits_wherever_the_ink_is(data: st.DataObject) -> None:
    rng = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    canvas = torch.zeros(1, 60, 60, dtype=torch.bool)
    height, width = (data.draw(st.integers(20, 50)) for _ in range(2))
    ink = torch.rand(height, width, generator=rng) < data.draw(st.sampled_from([0.05, 0.5, 1]))
    ink[0, 0] = ink[-1, -1] = True
    canvas[0, :height, :width] = ink
    down, aside = data.draw(st.integers(0, 60 - height)), data.draw(st.integers(0, 60 - width))
    scan = Scan(dots=3)
    # A scanner that sees every dot of the canvas.
    greys = levels(scan(logits(canvas), fineness(60)))
    moved = levels(scan(logits(canvas.roll((down, aside), (1, 2))), fineness(60)))
    assert torch.equal(greys, moved)
    torch.testing.assert_close(greys, greys.round(), atol=1e-4, rtol=0)
    assert greys.min() >= 0
    assert greys.max().round() in (254, 255)
    for length, across in ((height, 1), (width, 0)):
        if length == max(height, width):
            inked = (greys[0, 0].round() > 0).any(across)
            # The outermost dots may be too faint for a grey.
            assert inked[:2].any()
            assert inked[-2:].any()


def test_solid_ink_has_the_whites_of_mnist() -> None:
    canvas = torch.ones(1, 80, 80, dtype=torch.bool)
    box = levels(Scan(dots=4)(logits(canvas), fineness(34)))[0, 0].round()
    # As in the training image number 7, among others.
    expected = torch.full((20, 20), 252.0)
    expected[10], expected[:, 10], expected[0], expected[:, 0] = 253, 253, 253, 253
    for row in (0, 10):
        for column in (0, 10):
            assert box[row, column] in (254, 255)
            expected[row, column] = box[row, column]
    assert torch.equal(box, expected)


def test_two_dots_a_pixel_give_the_five_levels_of_real_digits_that_had_40(mnist_dir: Path) -> None:
    rng = torch.Generator().manual_seed(0)
    canvas = torch.rand(9, 80, 80, generator=rng) < 0.5
    box = levels(Scan(dots=4)(logits(canvas), fineness(40).expand(9))).round()
    five = torch.tensor([0, 64, 128, 191, 255])
    assert torch.equal(box.unique(), five.float())
    images = load_mnist(mnist_dir).train.images.flatten(1)
    # Without such a cause no image has five levels alone.
    assert 0.02 < torch.isin(images, five).all(1).float().mean() < 0.04


def test_fineness_says_how_many_dots_are_seen() -> None:
    rng = torch.Generator().manual_seed(0)
    canvas = torch.rand(1, 80, 80, generator=rng) < 0.5
    boxes = [Scan(dots=4)(logits(canvas), fineness(size)) for size in range(20, LARGEST + 1)]
    assert len(torch.unique(torch.cat(boxes), dim=0)) == LARGEST + 1 - 20
    for far in (-99.0, 99.0):
        limit = boxes[0] if far < 0 else boxes[-1]
        assert torch.equal(Scan(dots=4)(logits(canvas), torch.tensor([far])), limit)


def test_it_scans_as_ever_though_it_was_built_without_memory() -> None:
    with torch.device("meta"):
        scan = Scan(dots=4)
    canvas = torch.rand(3, 80, 80, generator=torch.Generator().manual_seed(0)) < 0.5
    scanned = scan(logits(canvas), torch.zeros(3))
    assert torch.equal(scanned, Scan(dots=4)(logits(canvas), torch.zeros(3)))
    assert not scan.state_dict()


def test_empty_paper_is_scanned_and_laid_too() -> None:
    empty = Scan(dots=4)(torch.full((2, 16, 20, 20), -3.0), torch.zeros(2))
    assert torch.equal(empty, torch.full((2, 1, 20, 20), -1.0))
    assert torch.equal(Centring().eval()(empty), torch.full((2, 1, 28, 28), -1.0))


def test_gradient_passes_the_scan_as_if_ink_were_logistic_and_nothing_rounded() -> None:
    rng = torch.Generator().manual_seed(0)
    drawn = torch.randn(5, 1, 20, 20, generator=rng)
    drawn[:, :, 0, 0] = drawn[:, :, -1, -1] = 1.0
    drawn.requires_grad_()
    weights = torch.randn(5, 1, 20, 20, generator=rng)
    # Of 20 dots along each side, each is a pixel.
    scanned = Scan(dots=1)(drawn, fineness(20).expand(5))
    torch.testing.assert_close(scanned, torch.where(drawn > 0, 1.0, -1.0))
    (scanned * weights).sum().backward()
    likely = torch.sigmoid(SHARPNESS * drawn.detach())
    slope = 254 / 127.5 * SHARPNESS * likely * (1 - likely)
    assert drawn.grad is not None
    torch.testing.assert_close(drawn.grad, slope * weights)
