import json
from dataclasses import asdict, replace

import pytest
import torch
from torch import Tensor

from gan.data import Mnist
from gan.evaluation.floors import measure_floors
from gan.evaluation.judge import JUDGE_ID, judge_images, load_judge, read_card
from gan.evaluation.metrics import frechet_distance, kernel_distance, support
from gan.evaluation.scores import (
    EvaluationError,
    Scores,
    average,
    evaluate,
    explain,
    load_floors,
)
from gan.evaluation.two_sample import TwoSampleProtocol
from tests.gan.evaluation.conftest import draw_from, part

QUICK = TwoSampleProtocol(id="two_sample_test", num_images=300, epochs=2, width=8)


@pytest.fixture(scope="module")
def unseen(mnist: Mnist, small: Mnist) -> Scores:
    """The scores of real images that are in neither set."""
    draw = draw_from(part(mnist.train, 10_000, 30_000))
    return evaluate(draw, small, num_samples=300, protocol=QUICK)


def test_unseen_real_images_score_as_real(unseen: Scores) -> None:
    assert (unseen.judge, unseen.num_samples) == (JUDGE_ID, 300)
    assert unseen.kid_x1000 == pytest.approx(0, abs=10)
    assert unseen.digit_as_asked is not None
    assert unseen.digit_as_asked > 0.98
    assert 0.35 < unseen.two_sample < 0.65
    assert unseen.memorisation_pixels < 0.04
    assert unseen.memorisation_features < 0.04
    assert unseen.nearest_pixels == pytest.approx(1, abs=0.15)
    assert sum(unseen.digit_histogram) == pytest.approx(1)
    assert all(0.03 < share < 0.2 for share in unseen.digit_histogram)


def test_the_same_seed_gives_the_same_scores(mnist: Mnist, small: Mnist, unseen: Scores) -> None:
    draw = draw_from(part(mnist.train, 10_000, 30_000))
    torch.rand(1)
    assert evaluate(draw, small, num_samples=300, protocol=QUICK) == unseen
    assert evaluate(draw, small, num_samples=300, protocol=QUICK, seed=1) != unseen


def test_copies_of_training_images_are_flagged(small: Mnist, unseen: Scores) -> None:
    copied = evaluate(draw_from(small.train), small, num_samples=300, protocol=QUICK)
    assert (copied.memorisation_pixels, copied.nearest_pixels) == (1, 0)
    assert (copied.memorisation_features, copied.nearest_features) == (1, 0)
    # A distance between distributions, on the contrary, takes copies for good drawings.
    assert copied.frechet_distance == pytest.approx(unseen.frechet_distance, rel=0.3)


def test_an_unconditional_generator_has_no_digit_as_asked(small: Mnist) -> None:
    draw = draw_from(small.train, told=False)
    scores = evaluate(draw, small, num_samples=100, protocol=QUICK)
    assert scores.digit_as_asked is None
    assert "digit_as_asked" not in scores.metrics()


def test_a_generator_that_draws_other_digits_than_asked_is_caught(small: Mnist) -> None:
    def draw(num: int, seed: int) -> tuple[Tensor, Tensor]:
        return small.train.images[:num], (small.train.labels[:num] + 1) % 10

    scores = evaluate(draw, small, num_samples=100, protocol=QUICK)
    assert scores.digit_as_asked is not None
    assert scores.digit_as_asked < 0.02


def test_too_few_drawings_cut_the_protocol_and_say_so(small: Mnist) -> None:
    scores = evaluate(draw_from(small.train), small, num_samples=100, protocol=QUICK)
    assert scores.protocol == "two_sample_test_cut_to_100"
    assert scores.metrics()["two_sample_test_cut_to_100"] == scores.two_sample


@pytest.mark.parametrize("num_samples", [0, 5, 2001])
def test_a_nonsense_number_of_samples_is_refused(small: Mnist, num_samples: int) -> None:
    with pytest.raises(EvaluationError, match="6 to 2000"):
        evaluate(draw_from(small.train), small, num_samples=num_samples)


def test_a_missing_digit_and_noise_make_scores_worse(mnist: Mnist) -> None:
    judge = load_judge()
    real = judge_images(judge, mnist.test.images[::4]).features
    images, labels = mnist.train.images[:3000], mnist.train.labels[:3000]
    noise = torch.randn(2500, 28, 28, generator=torch.Generator().manual_seed(0))
    noisy = ((images[:2500] / 255 + 0.1 * noise).clamp(0, 1) * 255).round().byte()
    fair, without_nine, noised = (
        judge_images(judge, x[:2500]).features for x in (images, images[labels != 9], noisy)
    )
    for worse in (without_nine, noised):
        assert frechet_distance(worse, real) > 2 * frechet_distance(fair, real)
        assert kernel_distance(worse, real) > kernel_distance(fair, real) + 0.01
        assert support(worse, real).recall < support(fair, real).recall - 0.02
        assert support(worse, real).coverage < support(fair, real).coverage - 0.04


def test_metrics_have_stable_names_that_are_explained(unseen: Scores) -> None:
    names = list(replace(unseen, protocol="two_sample_10k").metrics())
    assert names == [
        "frechet_distance",
        "kid_x1000",
        "precision",
        "recall",
        "density",
        "coverage",
        "digit_as_asked",
        "two_sample_10k",
        "memorisation_pixels",
        "memorisation_features",
        "nearest_pixels",
        "nearest_features",
        *(f"digit_share_{digit}" for digit in range(10)),
    ]
    assert all(explain(name).meaning for name in names)
    assert explain("two_sample_10k").better == "lower"


def test_scores_survive_json(unseen: Scores) -> None:
    assert Scores.from_json(json.loads(json.dumps(asdict(unseen)))) == unseen


def test_the_average_of_scores_is_that_of_their_numbers(unseen: Scores) -> None:
    other = replace(unseen, recall=unseen.recall + 1, digit_histogram=(1.0,) + 9 * (0.0,))
    mean = average([unseen, other])
    assert mean.recall == pytest.approx(unseen.recall + 0.5)
    assert mean.digit_histogram[0] == pytest.approx((unseen.digit_histogram[0] + 1) / 2)
    assert (mean.num_samples, mean.protocol) == (unseen.num_samples, unseen.protocol)
    assert average([replace(unseen, digit_as_asked=None)]).digit_as_asked is None


def test_the_floors_are_pinned_beside_the_judge() -> None:
    floors = load_floors()
    assert (floors.judge, floors.num_samples) == (JUDGE_ID, 10_000)
    assert floors.protocol == "two_sample_10k"
    assert floors.frechet_distance < 0.25
    assert floors.two_sample == pytest.approx(0.5, abs=0.02)
    assert floors.memorisation_pixels == pytest.approx(0.01, abs=0.005)
    assert floors.nearest_pixels == pytest.approx(1, abs=0.02)


@pytest.mark.slow
def test_the_floors_can_be_measured_again(mnist: Mnist) -> None:
    pinned, measured = Scores.from_json(read_card()["floors"][0]), measure_floors(mnist)
    assert measured.two_sample == pytest.approx(pinned.two_sample, abs=0.02)
    for name, value in pinned.metrics().items():
        if name != "two_sample_10k":
            assert measured.metrics()[name] == pytest.approx(value, abs=0.002), name
