from pathlib import Path

import pytest
import torch
from torch import Tensor

from gan.data import Mnist, Split, load_mnist
from gan.evaluation.scores import Draw


@pytest.fixture(scope="session")
def mnist(mnist_dir: Path) -> Mnist:
    return load_mnist(mnist_dir)


@pytest.fixture(scope="session")
def small(mnist: Mnist) -> Mnist:
    """Two thousand training and a thousand test images."""
    # The test set's first half is neater than its second, so every tenth is taken.
    test = Split(images=mnist.test.images[::10], labels=mnist.test.labels[::10])
    return Mnist(train=part(mnist.train, 0, 2000), test=test)


def part(split: Split, start: int, stop: int) -> Split:
    return Split(images=split.images[start:stop], labels=split.labels[start:stop])


def draw_from(split: Split, *, told: bool = True) -> Draw:
    """A generator that knows real images by heart and draws them sorted by digit."""

    def draw(num: int, seed: int) -> tuple[Tensor, Tensor | None]:
        index = torch.randperm(len(split), generator=torch.Generator().manual_seed(seed))[:num]
        index = index[split.labels[index].argsort()]
        return split.images[index], split.labels[index] if told else None

    return draw
