"""The way from the textbook's loop to ours, a trick at a time, for the fully connected pair.

Each of `TRICKS` leaves the algorithm as it is. `train_with` knows them all and uses those it is
given, so that what a trick gains can be measured by itself.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch
from torch import Tensor, nn

from benchmarks import textbook
from benchmarks.textbook import Losses
from gan.config import TrainConfig
from gan.data import Split
from gan.losses import discriminator_loss, generator_loss
from gan.networks import build_discriminator, build_generator
from gan.training import uses_bfloat16

RESIDENT = "data resident on the device"
NO_ITEM = "no `.item()` each step"
NO_IDLE_GRADIENT = "no gradient for the network that rests"
ONE_PASS = "reals and fakes in one pass"
FUSED_ADAM = "fused Adam"
BFLOAT16 = "bfloat16 products (autocast)"
INTEGER_MASKS = "dropout masks of 16 bits a unit"

TRICKS = (
    RESIDENT,
    NO_ITEM,
    NO_IDLE_GRADIENT,
    ONE_PASS,
    FUSED_ADAM,
    BFLOAT16,
    INTEGER_MASKS,
)
"""In the order in which they are added."""

COMPILED = "torch.compile"
"""Not among them, as it does not always help. It cannot see through our own dropout."""


def train_with(
    tricks: Collection[str], config: TrainConfig, data: Split, device: torch.device
) -> Iterator[Losses | Tensor]:
    """Train a fresh pair on data that lies on the CPU; yields the losses of each step.

    They are floats or, with `NO_ITEM`, float32 [2] on the device. Weights and noise come from
    torch's global state.
    """
    generator: nn.Module = build_generator(config.networks).to(device)
    rng = torch.Generator(device).manual_seed(config.seed)
    discriminator: nn.Module = build_discriminator(config.networks, rng).to(device)
    if INTEGER_MASKS not in tricks:
        discriminator = textbook.with_plain_dropout(discriminator)
    if COMPILED in tricks:
        generator.compile()
        discriminator.compile()
    d_optimizer, g_optimizer = (
        torch.optim.Adam(
            network.parameters(), lr=config.learning_rate, fused=FUSED_ADAM in tricks or None
        )
        for network in (discriminator, generator)
    )
    in_bfloat16 = BFLOAT16 in tricks and uses_bfloat16(config, device)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=in_bfloat16)
    wasteful = NO_IDLE_GRADIENT not in tricks

    for real in _batches(RESIDENT in tricks, config, data, device):
        with autocast, torch.set_grad_enabled(wasteful):
            fake = generator(textbook.noise(len(real), config, device)).detach().float()
        d_optimizer.zero_grad()
        with autocast:
            if ONE_PASS in tricks:
                on_real, on_fake = discriminator(torch.cat([real, fake])).float().chunk(2)
            else:
                on_real, on_fake = discriminator(real).float(), discriminator(fake).float()
        d_loss = discriminator_loss(config.loss, on_real, on_fake)
        d_loss.backward()
        d_optimizer.step()

        discriminator.requires_grad_(wasteful)
        g_optimizer.zero_grad()
        with autocast:
            fake = generator(textbook.noise(len(real), config, device))
            logits = discriminator(fake).float()
        g_loss = generator_loss(config.loss, None, logits)
        g_loss.backward()
        g_optimizer.step()
        discriminator.requires_grad_(True)

        if NO_ITEM in tricks:
            yield torch.stack([d_loss, g_loss]).detach()
        else:
            yield d_loss.item(), g_loss.item()


def _batches(
    resident: bool, config: TrainConfig, data: Split, device: torch.device
) -> Iterator[Tensor]:
    """Real images, float32 [batch_size, 1, 28, 28] in [-1, 1], in a new order every epoch."""
    images = data.images.to(device) if resident else data.images
    whole = len(data) // config.batch_size * config.batch_size
    for _ in range(config.epochs):
        if resident:
            order = torch.randperm(len(data), device=device)
            for index in order[:whole].split(config.batch_size):
                yield images[index].unsqueeze(1).float() / 127.5 - 1
        else:
            for batch, _ in textbook.load(data, config):
                yield batch.to(device)
