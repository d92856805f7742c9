from dataclasses import replace

import pytest
import torch
from torch import Tensor

from gan.data import Mnist
from gan.evaluation.two_sample import (
    TWO_SAMPLE_10K,
    TWO_SAMPLE_50K,
    TwoSampleProtocol,
    share_told,
    train_adversary,
    two_sample_accuracy,
)

SMALL = TwoSampleProtocol(
    id="two_sample_test", num_images=1000, epochs=4, width=8, learning_rate=5e-3
)


def accuracy(generated: Tensor, data: Mnist, seed: int = 0) -> float:
    return two_sample_accuracy(
        SMALL,
        generated=generated[:1000],
        new_generated=generated[1000:2000],
        real=data.train.images[10_000:11_000],
        new_real=data.test.images[:1000],
        seed=seed,
    )


def test_real_images_cannot_be_told_from_real_ones(mnist: Mnist) -> None:
    assert accuracy(mnist.train.images[:2000], mnist) == pytest.approx(0.5, abs=0.06)


def test_noisy_images_are_told_from_real_ones(mnist: Mnist) -> None:
    images = mnist.train.images[:2000] / 255
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    noisy = ((images + 0.1 * noise).clamp(0, 1) * 255).round().byte()
    assert accuracy(noisy, mnist) > 0.98


def test_a_seed_decides_all_and_the_global_random_state_is_neither_read_nor_moved(
    mnist: Mnist,
) -> None:
    drawn = mnist.train.images[20_000:22_000]
    before = torch.get_rng_state()
    first = accuracy(drawn, mnist)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(1)
    assert accuracy(drawn, mnist) == first
    assert accuracy(drawn, mnist, seed=1) != first


def test_held_out_images_choose_the_epoch(mnist: Mnist) -> None:
    noise = torch.randint(0, 60, (1300, 28, 28), generator=torch.Generator().manual_seed(0))
    noisy = (mnist.train.images[:1300].int() + noise).clamp(max=255).byte()
    real = mnist.train.images[10_000:11_300]
    protocol = replace(SMALL, num_held_out=300, epochs=3)
    assert protocol.num_needed == 1300
    chosen = train_adversary(protocol, noisy, real, seed=0)
    last = train_adversary(replace(protocol, num_held_out=0), noisy[:1000], real[:1000], seed=0)
    told = [share_told(each, noisy[1000:], real[1000:]) for each in (chosen, last)]
    assert told[0] >= told[1]


def test_fewer_images_make_another_protocol() -> None:
    short = TWO_SAMPLE_50K.with_images(1000)
    assert (short.num_images, short.num_held_out, short.num_needed) == (1000, 200, 1200)
    cut = TWO_SAMPLE_10K.with_images(500)
    assert (cut.id, cut.num_images) == ("two_sample_10k_cut_to_500", 500)
    assert TWO_SAMPLE_10K.with_images(10_000) is TWO_SAMPLE_10K
