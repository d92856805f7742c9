from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gan.config import ConvConfig, MlpConfig
from gan.data import Mnist, Split
from gan.evaluation.comparison import Comparison, Interval, bootstrap_difference, compare
from gan.evaluation.metrics import frechet_distance
from gan.evaluation.scores import Draw, EvaluationError, draws_like
from gan.networks import build_generator

WIDTH = 6
"""Features of the synthetic points below."""
DEVIATIONS = torch.tensor([0.1, 0.2, 0.5, 1.0, 2.0, 3.0])


def normal(num: int, seed: int) -> Tensor:
    return torch.randn(num, WIDTH, generator=torch.Generator().manual_seed(seed)) * DEVIATIONS


def interval(challenger: Tensor, champion: Tensor, real: Tensor, seed: int = 0) -> Interval:
    return bootstrap_difference(challenger, champion, real, seed=seed, num_replicates=80)


def intervals(
    challenger: Callable[[Tensor], Tensor],
    champion: Callable[[Tensor], Tensor],
    *,
    shared: bool,
    trials: int = 100,
) -> list[Interval]:
    """Of as many fresh samples of two distortions of one normal distribution."""

    def trial(seed: int) -> Interval:
        noise, other = normal(200, 3 * seed), normal(200, 3 * seed + 1)
        return interval(
            challenger(noise), champion(noise if shared else other), normal(300, 3 * seed + 2), seed
        )

    return [trial(seed) for seed in range(trials)]


def shifted(points: Tensor) -> Tensor:
    return points + 0.2 * DEVIATIONS


def shifted_back(points: Tensor) -> Tensor:
    return points - 0.2 * DEVIATIONS


def narrow(points: Tensor) -> Tensor:
    return 0.8 * points


def broad(points: Tensor) -> Tensor:
    return 1.2 * points


@pytest.mark.parametrize("shared", [True, False], ids=["same noise", "other noise"])
@pytest.mark.parametrize(
    ("challenger", "champion"),
    [
        (shifted, shifted_back),  # the same distance, by other faults
        (narrow, broad),  # the broader one's distance is biased upwards by more
        (broad, narrow),
        (torch.clone, torch.clone),  # no fault at all
    ],
    ids=["other faults", "narrow", "broad", "perfect"],
)
def test_equals_win_no_more_often_than_chance_allows(
    challenger: Callable[[Tensor], Tensor], champion: Callable[[Tensor], Tensor], shared: bool
) -> None:
    """The Frechet distances of each pair are equal in closed form: 95 of 100 intervals hold 0."""
    found = intervals(challenger, champion, shared=shared)
    assert sum(each.high < 0 for each in found) <= 6, "2.5 of 100 are expected to win"
    assert sum(each.low <= 0 <= each.high for each in found) >= 90


def test_a_difference_lies_in_its_interval_as_often_as_stated() -> None:
    def further(points: Tensor) -> Tensor:
        return 0.8 * points + 0.5 * DEVIATIONS

    spread = float(DEVIATIONS.square().sum())
    truth = (0.2**2 - (0.2**2 + 0.5**2)) * spread  # of Gaussians: shift^2 + (1 - scale)^2
    found = intervals(narrow, further, shared=True)
    assert sum(each.low <= truth <= each.high for each in found) >= 88
    assert sum(each.high < 0 for each in found) >= 90, "so clear a difference is seen"


def test_the_plain_difference_of_many_points_lies_in_a_narrow_interval() -> None:
    ours, theirs, real = shifted(normal(5000, 0)), broad(normal(5000, 0)), normal(5000, 1)
    plain = frechet_distance(ours, real) - frechet_distance(theirs, real)
    found = interval(ours, theirs, real)
    assert found.low < plain < found.high
    assert found.high - found.low < 0.5


def test_noise_in_common_makes_the_interval_narrower() -> None:
    def mean_width(shared: bool) -> float:
        found = intervals(narrow, lambda points: 0.7 * points, shared=shared, trials=10)
        return sum(each.high - each.low for each in found)

    assert mean_width(True) < 0.7 * mean_width(False)


@settings(max_examples=20)
@given(seed=st.integers(0, 2**63 - 1), rows=st.integers(5, 60), scale=st.floats(0.1, 10))
def test_exchanging_the_two_mirrors_the_interval(seed: int, rows: int, scale: float) -> None:
    ours, theirs, real = normal(rows, 1), scale * normal(rows, 2), normal(70, 3)
    there, back = (interval(*pair, real, seed) for pair in ((ours, theirs), (theirs, ours)))
    assert there.low == pytest.approx(-back.high, abs=1e-6)
    assert there.high == pytest.approx(-back.low, abs=1e-6)
    assert there.low <= there.high
    assert interval(ours, theirs, real, seed) == there


def test_a_set_is_no_better_than_itself() -> None:
    points = normal(50, 0)
    found = interval(points, points, normal(60, 1))
    assert (found.low, found.high) == (0, 0)


def test_collapsed_drawings_get_a_finite_interval() -> None:
    found = interval(torch.zeros(50, WIDTH), normal(50, 0), normal(60, 1))
    assert 0 < found.low <= found.high < float("inf")


@pytest.fixture(scope="module")
def small(mnist: Mnist) -> Mnist:
    def part(split: Split, every: int) -> Split:
        return Split(images=split.images[::every], labels=split.labels[::every])

    return Mnist(train=part(mnist.train, 30), test=part(mnist.test, 20))


def draw_real(mnist: Mnist, *, noise: float = 0.0, lag: int = 0) -> Draw:
    """A generator whose place in the order is certain: real images, with so much noise on them."""

    def draw(num: int, seed: int) -> tuple[Tensor, Tensor]:
        rng = torch.Generator().manual_seed(seed + lag)
        index = torch.randperm(len(mnist.train), generator=rng)[:num]
        images = mnist.train.images[index] / 255
        images += noise * torch.randn(images.shape, generator=rng)
        return (images.clamp(0, 1) * 255).round().byte(), mnist.train.labels[index]

    return draw


Judge = Callable[[Draw, Draw, int], Comparison]


@pytest.fixture(scope="module")
def judge(small: Mnist, tmp_path_factory: pytest.TempPathFactory) -> Judge:
    """Compares a challenger and a champion with a seed."""
    cache = tmp_path_factory.mktemp("cache")

    def judge(challenger: Draw, champion: Draw, seed: int) -> Comparison:
        return compare(challenger, champion, small, num_samples=500, seed=seed, cache=cache)

    return judge


@pytest.mark.parametrize("seed", range(3))
def test_known_better_is_found_better(mnist: Mnist, judge: Judge, seed: int) -> None:
    found = judge(draw_real(mnist, noise=0.05), draw_real(mnist, noise=0.15), seed)
    assert found.frechet_difference.high < 0


@pytest.mark.parametrize("seed", range(3))
def test_known_worse_is_found_worse(mnist: Mnist, judge: Judge, seed: int) -> None:
    found = judge(draw_real(mnist, noise=0.15), draw_real(mnist, noise=0.1), seed)
    assert found.frechet_difference.low > 0


@pytest.mark.parametrize("seed", range(3))
def test_equals_that_draw_other_images_are_not_told_apart(
    mnist: Mnist, judge: Judge, seed: int
) -> None:
    ours, theirs = (draw_real(mnist, noise=0.1, lag=lag) for lag in (0, 1000))
    found = judge(ours, theirs, seed).frechet_difference
    assert found.low < 0 < found.high


def test_both_are_judged_as_they_are_and_alike(mnist: Mnist, small: Mnist, judge: Judge) -> None:
    fair, copies = draw_real(mnist, lag=1), draw_real(replace(mnist, train=small.train))
    found = judge(copies, fair, 0)
    assert (found.judge, found.num_samples, found.seed) == ("mnist-judge-1", 500, 0)
    assert found.challenger.memorisation_pixels == 1
    assert found.challenger.memorisation_features == 1
    assert found.champion.memorisation_pixels < 0.2
    assert found.champion.digit_as_asked is not None
    assert found.champion.digit_as_asked > 0.97
    assert found.champion.coverage > 0.9
    assert judge(copies, fair, 0) == found, "the same seed gives the same comparison"


def test_drawings_are_asked_for_by_the_same_digits_and_seed(mnist: Mnist) -> None:
    labels = torch.tensor([3, 3, 3, 7])
    generators = [build_generator(ConvConfig(width=4)) for _ in range(2)]
    first, second = (draws_like(generator, labels)(200, 5)[1] for generator in generators)
    assert first is not None
    assert second is not None
    assert torch.equal(first, second)
    assert set(first.tolist()) == {3, 7}
    assert (first == 3).float().mean() > 0.6
    images, asked = draws_like(build_generator(MlpConfig()), labels)(20, 5)
    assert images.shape == (20, 28, 28)
    assert asked is None


def test_too_few_drawings_are_refused(mnist: Mnist, small: Mnist) -> None:
    with pytest.raises(EvaluationError, match="above 5, not 5"):
        compare(draw_real(mnist), draw_real(mnist), small, num_samples=5)
