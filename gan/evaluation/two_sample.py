"""The two-sample test: can a freshly trained classifier tell generated images from real ones?

Lopez-Paz and Oquab 2017. Its accuracy on new images of both kinds is 0.5 if it cannot. Stronger
classifiers and more images find more, so accuracies of different protocols never compare: the
protocol's id is the name of the metric.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from gan.evaluation.judge import Judge


@dataclass(frozen=True, kw_only=True)
class TwoSampleProtocol:
    """All that decides how strong the classifier gets."""

    id: str
    """The metric's name. Whatever else changes here or in the training below, this must too."""
    num_images: int
    """Images of each kind to train with."""
    num_held_out: int = 0
    """Images of each kind that choose the epoch to test; without them it is the last one."""
    epochs: int
    """Passes over the images to train with."""
    width: int = 32
    """Channels of the first convolution; 32 is the judge's size."""
    batch_size: int = 128
    """Images a step, half of each kind."""
    learning_rate: float = 1e-3
    """AdamW's peak; one cycle."""
    weight_decay: float = 0.01

    @property
    def num_needed(self) -> int:
        """Images of each kind that the training takes."""
        return self.num_images + self.num_held_out

    def with_images(self, num_images: int) -> Self:
        """The same with fewer images, under an id that says so; itself if it has no more."""
        if num_images >= self.num_images:
            return self
        return replace(
            self,
            id=f"{self.id}_cut_to_{num_images}",
            num_images=num_images,
            num_held_out=self.num_held_out * num_images // self.num_images,
        )


TWO_SAMPLE_10K = TwoSampleProtocol(id="two_sample_10k", num_images=10_000, epochs=8)
"""A classifier of the judge's size, 10,000 generated against 10,000 training images."""
TWO_SAMPLE_50K = TwoSampleProtocol(
    id="two_sample_50k", num_images=50_000, num_held_out=10_000, epochs=8
)
"""The same on 50,000 of each; 10,000 more of each choose the epoch."""
TWO_SAMPLE_50K_SMALL = replace(TWO_SAMPLE_50K, id="two_sample_50k_small", width=16)
"""The same with half the channels."""


def two_sample_accuracy(
    protocol: TwoSampleProtocol,
    *,
    generated: Tensor,
    real: Tensor,
    new_generated: Tensor,
    new_real: Tensor,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> float:
    """Train a fresh classifier on generated and real images, then test it on new ones of both.

    Args:
        protocol: how to train.
        generated: uint8 [protocol.num_needed, 28, 28].
        real: uint8 [protocol.num_needed, 28, 28], training images.
        new_generated: uint8 [n, 28, 28], none of which it was trained with.
        new_real: uint8 [m, 28, 28], test images.
        seed: decides the initial weights and the order of the images.
        device: where to train.

    Returns:
        The mean of the two shares that are told rightly, new generated and new real images.
    """
    adversary = train_adversary(protocol, generated.to(device), real.to(device), seed)
    return share_told(adversary, new_generated, new_real)


def train_adversary(
    protocol: TwoSampleProtocol, generated: Tensor, real: Tensor, seed: int
) -> Judge:
    """A classifier whose one logit is above 0 for what it takes for real.

    Of images [protocol.num_needed, 28, 28] of each kind, the last `num_held_out` choose the epoch.
    """
    rng = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        classifier = Judge(num_outputs=1, width=protocol.width).to(real.device)
    generated, held_out_generated = generated.split([protocol.num_images, protocol.num_held_out])
    real, held_out_real = real.split([protocol.num_images, protocol.num_held_out])
    half = protocol.batch_size // 2
    steps_per_epoch = max(1, len(real) // half)
    optimizer = torch.optim.AdamW(
        classifier.parameters(), weight_decay=protocol.weight_decay, fused=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        protocol.learning_rate,
        total_steps=protocol.epochs * steps_per_epoch,
        pct_start=0.2,
    )
    best, most_told = classifier, 0.0
    for _ in range(protocol.epochs):
        classifier.train()
        orders = [torch.randperm(len(kind), generator=rng) for kind in (generated, real)]
        for fake, true in zip(*(o.split(half)[:steps_per_epoch] for o in orders), strict=True):
            images = torch.cat([generated[fake.to(real.device)], real[true.to(real.device)]])
            targets = torch.ones(len(images), 1, device=real.device)
            targets[: len(fake)] = 0
            loss = F.binary_cross_entropy_with_logits(classifier.logits(images), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        if protocol.num_held_out:
            told = share_told(classifier.eval(), held_out_generated, held_out_real)
            if told >= most_told:
                best, most_told = copy.deepcopy(classifier), told
    return best.eval()


def share_told(adversary: Judge, generated: Tensor, real: Tensor) -> float:
    """The mean of the two shares that a classifier tells rightly, of uint8 images [n, 28, 28]."""
    told = [(believe(adversary, images) > 0).double().mean().item() for images in (generated, real)]
    return (1 - told[0] + told[1]) / 2


@torch.inference_mode()
def believe(adversary: Judge, images: Tensor) -> Tensor:
    """How real uint8 images [n, 28, 28] look to a classifier: logits [n], on the CPU."""
    device = next(adversary.parameters()).device
    return torch.cat(
        [adversary.logits(batch.to(device)).squeeze(1).cpu() for batch in images.split(1000)]
    )
