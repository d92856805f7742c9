from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from gan.config import NUM_SEEDS, ConvConfig, MlpConfig
from gan.networks import Generator, build_generator
from gan.sampling import ANY_DIGIT, SamplingError, draw, draw_sheet, interpolate, tile, to_bytes

DIGITS = st.lists(st.integers(-1, 9), max_size=6)


def make(config: MlpConfig | ConvConfig) -> Generator:
    """A generator whose pictures differ: the initial weights' are all but grey."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        generator = build_generator(config)
        with torch.no_grad():
            for name, weights in generator.named_parameters():
                if weights.ndim > 1 and "project" not in name:
                    weights.mul_(3)
    return generator


CONDITIONAL = make(ConvConfig(latent_dim=4, width=2))
UNCONDITIONAL = make(MlpConfig(latent_dim=4))
GENERATORS = pytest.mark.parametrize(
    "generator", [CONDITIONAL, UNCONDITIONAL], ids=["conditional", "unconditional"]
)


def images_of(generator: Generator, noise: Tensor, digits: Tensor) -> Tensor:
    was_training = generator.training
    with torch.no_grad():
        images = to_bytes(generator.eval()(noise, digits))
    generator.train(was_training)
    return images


def assert_same_pictures(images: Tensor, others: Tensor) -> None:
    """The same but for roundings: a product of matrices depends on how many rows it has."""
    assert images.shape == others.shape
    assert (images.int() - others.int()).abs().max() <= 1


@settings(max_examples=30)
@given(
    digits=DIGITS,
    num=st.integers(1, 3),
    seed=st.integers(0, NUM_SEEDS - 1),
    bit=st.integers(0, NUM_SEEDS.bit_length() - 2),
)
def test_the_same_wish_gives_the_same_pictures_and_another_seed_others(
    digits: list[int], num: int, seed: int, bit: int
) -> None:
    images = draw(CONDITIONAL, digits, num=num, seed=seed)
    assert images.shape == (len(digits) * num, 28, 28)
    assert images.dtype == torch.uint8
    torch.rand(3)
    assert torch.equal(draw(CONDITIONAL, torch.tensor(digits), num=num, seed=seed), images)
    if digits:
        assert not torch.equal(draw(CONDITIONAL, digits, num=num, seed=seed ^ (1 << bit)), images)


def test_rows_come_in_order_num_of_each() -> None:
    wish = [7, 0, 7, 3]
    images = draw(CONDITIONAL, wish, num=3, seed=1)
    noise = torch.randn(12, 4, generator=torch.Generator().manual_seed(1))
    digits = torch.tensor([7, 7, 7, 0, 0, 0, 7, 7, 7, 3, 3, 3])
    assert_same_pictures(images, images_of(CONDITIONAL, noise, digits))
    assert torch.equal(draw(CONDITIONAL, digits, seed=1), images)
    assert len(torch.unique(images, dim=0)) == 12


def test_the_noise_does_not_depend_on_the_digit() -> None:
    eights, any_digits = (draw(CONDITIONAL, [d], num=200, seed=3) for d in (8, -1))
    same = (eights == any_digits).flatten(1).all(1)
    assert 5 <= same.sum() <= 45


def test_any_digit_is_each_digit_sometimes() -> None:
    images = draw(CONDITIONAL, [-1], num=500, seed=0)
    shown = [
        (draw(CONDITIONAL, [d], num=500, seed=0) == images).flatten(1).all(1) for d in range(10)
    ]
    counts = torch.stack(shown).sum(1)
    assert counts.sum() == 500
    assert counts.min() > 20


@GENERATORS
def test_chunks_have_no_borders(generator: Generator) -> None:
    images = draw(generator, [-1], num=2345, seed=9)
    rng = torch.Generator().manual_seed(9)
    noise = torch.randn(2345, 4, generator=rng)
    digits = torch.randint(10, (2345,), generator=rng)
    assert_same_pictures(images, images_of(generator, noise, digits))


def test_an_unconditional_generator_takes_any_alone_and_says_so() -> None:
    assert draw(UNCONDITIONAL, [-1, -1], num=2, seed=0).shape == (4, 28, 28)
    with pytest.raises(SamplingError, match=r"unconditional: it takes the digit -1 \(any\) alone"):
        draw(UNCONDITIONAL, [-1, 3], seed=0)


@pytest.mark.parametrize(
    ("wish", "sentence"),
    [
        ({"digits": [10]}, "a digit must be 0 to 9, or -1 for any"),
        ({"digits": [-2]}, "a digit must be 0 to 9, or -1 for any"),
        ({"digits": [1.5]}, "a digit must be 0 to 9, or -1 for any"),
        ({"digits": [float("nan")]}, "a digit must be 0 to 9, or -1 for any"),
        ({"digits": [float("inf")]}, "a digit must be 0 to 9, or -1 for any"),
        ({"digits": [[1, 2]]}, "a digit must be 0 to 9, or -1 for any"),
        ({"digits": torch.tensor(3)}, "a digit must be 0 to 9, or -1 for any"),
        ({"num": 0}, "num must be at least 1, not 0"),
        ({"num": -5}, "num must be at least 1, not -5"),
        ({"seed": -1}, "seed must be 0 to 2**32 - 1, not -1"),
        ({"seed": 2**32}, "seed must be 0 to 2**32 - 1, not 4294967296"),
        ({"temperature": -0.1}, "temperature must be 0 to 2, not -0.1"),
        ({"temperature": 2.1}, "temperature must be 0 to 2, not 2.1"),
        ({"temperature": float("nan")}, "temperature must be 0 to 2, not nan"),
    ],
)
def test_nonsense_is_refused_in_a_sentence(wish: dict[str, Any], sentence: str) -> None:
    with pytest.raises(SamplingError) as refusal:
        draw(CONDITIONAL, **{"digits": [1], "seed": 0, **wish})
    assert str(refusal.value) == sentence


def test_temperature_scales_the_noise_and_1_changes_nothing() -> None:
    noise = torch.randn(5, 4, generator=torch.Generator().manual_seed(2))
    digits = torch.full((5,), 3)
    for temperature in (0.0, 0.5, 2.0):
        images = draw(CONDITIONAL, [3], num=5, seed=2, temperature=temperature)
        assert_same_pictures(images, images_of(CONDITIONAL, noise * temperature, digits))
    still = draw(CONDITIONAL, [3], num=5, seed=2, temperature=0.0)
    assert len(torch.unique(still, dim=0)) == 1
    assert torch.equal(
        draw(CONDITIONAL, [3], num=5, seed=2, temperature=1.0),
        draw(CONDITIONAL, [3], num=5, seed=2),
    )


@GENERATORS
@settings(max_examples=20)
@given(
    seed=st.integers(0, NUM_SEEDS - 1),
    to_seed=st.integers(0, NUM_SEEDS - 1),
    num=st.integers(2, 9),
)
def test_way_goes_from_one_seeds_image_to_the_others(
    generator: Generator, seed: int, to_seed: int, num: int
) -> None:
    assume(seed != to_seed)
    digit = ANY_DIGIT if generator is UNCONDITIONAL else 7
    way = interpolate(generator, digit, num=num, seed=seed, to_seed=to_seed)
    assert way.shape == (num, 28, 28)
    ends = torch.cat([draw(generator, [digit], seed=each) for each in (seed, to_seed)])
    assert_same_pictures(way[[0, -1]], ends)
    back = interpolate(generator, digit, num=num, seed=to_seed, to_seed=seed)
    assert_same_pictures(back.flip(0), way)


def test_way_keeps_to_one_digit() -> None:
    ways = [interpolate(CONDITIONAL, d, num=4, seed=5, to_seed=6) for d in range(10)]
    any_digit = interpolate(CONDITIONAL, ANY_DIGIT, num=4, seed=5, to_seed=6)
    assert sum(torch.equal(any_digit, way) for way in ways) == 1


@pytest.mark.parametrize(
    ("wish", "sentence"),
    [
        ({"num": 1}, "a way from one image to another takes at least 2, not 1"),
        ({"to_seed": 0}, "the way needs two seeds, not 0 twice"),
        ({"to_seed": -1}, "seed must be 0 to 2**32 - 1, not -1"),
        ({"digit": 10}, "a digit must be 0 to 9, or -1 for any"),
    ],
)
def test_way_to_nowhere_is_refused_in_a_sentence(wish: dict[str, Any], sentence: str) -> None:
    with pytest.raises(SamplingError) as refusal:
        interpolate(CONDITIONAL, **{"digit": 1, "num": 3, "seed": 0, "to_seed": 1, **wish})
    assert str(refusal.value) == sentence


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.float32])
def test_digits_may_come_in_any_type_that_holds_them(dtype: torch.dtype) -> None:
    expected = draw(CONDITIONAL, [0, 9], seed=0)
    assert torch.equal(draw(CONDITIONAL, torch.tensor([0, 9], dtype=dtype), seed=0), expected)


@GENERATORS
@pytest.mark.parametrize("training", [True, False])
def test_drawing_changes_neither_mode_nor_weights_nor_the_global_state(
    generator: Generator, training: bool
) -> None:
    generator.train(training)
    before = {k: v.clone() for k, v in generator.state_dict().items()}
    random_state = torch.get_rng_state()
    images = draw(generator, [-1], num=5, seed=0)
    assert generator.training is training
    assert all(module.training is training for module in generator.modules())
    assert all(torch.equal(v, before[k]) for k, v in generator.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.equal(draw(generator.eval(), [-1], num=5, seed=0), images)


def test_a_failed_drawing_restores_the_mode() -> None:
    generator = make(ConvConfig(latent_dim=4, width=2)).train()
    generator.project = torch.nn.Linear(3, 3)
    with pytest.raises(RuntimeError):
        draw(generator, [1], seed=0)
    assert generator.training


def test_bytes_round_and_clamp() -> None:
    values = torch.tensor([-7, -1, -1 + 0.9 / 255, -1 + 1.1 / 255, 0.25 / 127.5, 1, 1.0001, 9])
    images = to_bytes(values.view(-1, 1, 1, 1).expand(-1, 1, 28, 28))
    assert images.shape == (8, 28, 28)
    assert images[:, 0, 0].tolist() == [0, 0, 0, 1, 128, 255, 255, 255]


def test_bytes_undo_what_training_does_to_an_image() -> None:
    every = torch.arange(256, dtype=torch.uint8).view(-1, 1, 1).expand(-1, 28, 28)
    assert torch.equal(to_bytes(every.unsqueeze(1).float() / 127.5 - 1), every)
    # bfloat16 has steps of 1/256 near 1, so it may be off by one there.
    halved = to_bytes((every.unsqueeze(1).float() / 127.5 - 1).bfloat16())
    assert (halved.int() - every.int()).abs().max() <= 1


@given(rows=st.integers(1, 4), columns=st.integers(1, 4))
def test_a_sheet_shows_each_image_in_its_place(rows: int, columns: int) -> None:
    rng = torch.Generator().manual_seed(rows * columns)
    images = torch.randint(1, 256, (rows * columns, 28, 28), generator=rng).to(torch.uint8)
    sheet = tile(images, columns=columns)
    assert sheet.shape == (rows * 30 + 2, columns * 30 + 2)
    for place, image in enumerate(images):
        top, left = 2 + place // columns * 30, 2 + place % columns * 30
        assert torch.equal(sheet[top : top + 28, left : left + 28], image)
    assert sheet.long().sum() == images.long().sum()


def test_a_sheet_has_a_row_a_digit() -> None:
    sheet = draw_sheet(CONDITIONAL, seed=0)
    assert sheet.dtype == torch.uint8
    assert sheet.shape == (302, 302)
    expected = draw(CONDITIONAL, range(10), num=10, seed=0)
    assert torch.equal(sheet[2 + 30 * 7 : 30 * 8, 2:30], expected[70])
    assert draw_sheet(UNCONDITIONAL, seed=0).shape == (302, 302)
