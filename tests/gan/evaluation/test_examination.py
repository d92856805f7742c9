from dataclasses import replace

import pytest
import torch
from torch import Tensor

from gan.config import NUM_SEEDS
from gan.data import Mnist
from gan.evaluation.examination import Examination, examine, find_suspicious
from gan.evaluation.two_sample import TWO_SAMPLE_50K, believe, train_adversary
from tests.gan.evaluation.conftest import draw_from, part


@pytest.fixture(scope="module")
def unseen(mnist: Mnist, small: Mnist) -> Examination:
    """What is found of real images that are in neither set."""
    return examine(
        draw_from(part(mnist.train, 10_000, 30_000)), small, num_samples=300, num_draws=2
    )


def test_unseen_real_images_deceive_adversaries_and_teach_a_student(unseen: Examination) -> None:
    assert unseen.adversaries.keys() == {
        "two_sample_50k_small_cut_to_1500",
        "two_sample_50k_cut_to_1500",
    }
    assert all(0.4 < told < 0.6 for told in unseen.adversaries.values())
    assert unseen.synthetic_accuracy is not None
    assert unseen.synthetic_accuracy > 0.85
    assert unseen.suspicious.shape == (100, 28, 28)


def test_numbers_are_means_and_deviations_over_the_draws(unseen: Examination) -> None:
    assert len(unseen.scores) == 2
    one, other = (scores.frechet_distance for scores in unseen.scores)
    assert one != other
    assert unseen.means()["frechet_distance"] == pytest.approx((one + other) / 2)
    assert unseen.deviations()["frechet_distance"] == pytest.approx(abs(one - other) / 2**0.5)
    assert unseen.means().keys() > unseen.deviations().keys()
    assert not replace(unseen, scores=unseen.scores[:1]).deviations()


def test_the_same_seed_finds_the_same(mnist: Mnist, small: Mnist, unseen: Examination) -> None:
    draw = draw_from(part(mnist.train, 10_000, 30_000))
    again = examine(draw, small, num_samples=300, num_draws=2)
    assert again.means() == unseen.means()
    assert torch.equal(again.suspicious, unseen.suspicious)


def test_the_seed_after_the_largest_is_0(mnist: Mnist, small: Mnist) -> None:
    draw, seeds = draw_from(part(mnist.train, 10_000, 30_000)), []

    def record(num: int, seed: int) -> tuple[Tensor, Tensor | None]:
        seeds.append(seed)
        return draw(num, seed)

    examine(record, small, num_samples=60, num_draws=2, seed=NUM_SEEDS - 2)
    assert seeds == [NUM_SEEDS - 2, NUM_SEEDS - 1, 0]


def test_drawings_of_wrong_digits_teach_nothing(mnist: Mnist, small: Mnist) -> None:
    known = part(mnist.train, 10_000, 30_000)
    wrong = replace(known, labels=(known.labels + 1) % 10)
    found = examine(draw_from(wrong), small, num_samples=300, num_draws=1)
    assert found.synthetic_accuracy is not None
    assert found.synthetic_accuracy < 0.1


def test_generator_that_is_told_no_digits_has_no_student(mnist: Mnist, small: Mnist) -> None:
    draw = draw_from(part(mnist.train, 10_000, 30_000), told=False)
    found = examine(draw, small, num_samples=60, num_draws=1)
    assert found.synthetic_accuracy is None
    assert "synthetic_accuracy" not in found.means()
    assert found.suspicious.shape == (60, 28, 28), "there are no more to show"


def test_no_more_is_learned_from_than_there_is(mnist: Mnist, small: Mnist) -> None:
    few = Mnist(train=part(small.train, 0, 600), test=small.test)
    found = examine(draw_from(part(mnist.train, 10_000, 30_000)), few, num_samples=300, num_draws=1)
    assert "two_sample_50k_cut_to_500" in found.adversaries


def test_the_most_suspicious_are_what_was_not_asked_for_and_what_is_no_digit(mnist: Mnist) -> None:
    images, asked = mnist.test.images[:1000].clone(), mnist.test.labels[:1000].clone()
    asked[:20] = (asked[:20] + 1) % 10
    noisy = images[20:40].int() + torch.randint(0, 60, (20, 28, 28))
    images[20:40] = noisy.clamp(max=255).byte()
    protocol = TWO_SAMPLE_50K.with_images(1000)
    grey = mnist.train.images[:1200].int() + torch.randint(0, 60, (1200, 28, 28))
    adversary = train_adversary(
        protocol, grey.clamp(max=255).byte(), mnist.train.images[1200:2400], seed=0
    )
    shown = find_suspicious(adversary, images, asked)

    def is_shown(image: Tensor) -> bool:
        return bool((shown == image).flatten(1).all(1).any())

    assert len(shown) == len(torch.unique(shown, dim=0)) == 100
    assert all(map(is_shown, images[:40]))
    rest = believe(adversary, shown[50:])
    assert torch.equal(rest, rest.sort().values), "the surest first"
