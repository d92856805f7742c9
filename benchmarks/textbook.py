"""The textbook's loop: the opponent that the others are measured against.

    python -m benchmarks.textbook --epochs 20 --seed 0 --out DIR

`train_vanilla` is what Mosquera's notebook "Vanilla GAN PyTorch" (2018) does, without its saving of
both models after each batch: PIL images through a DataLoader, reals and fakes in passes of their
own, a gradient for every weight on the way, `.item()` each step, float32, Adam as it comes.
`train_conditional` trains the convolutional pair in the same manner. Both are the algorithms of
`gan.training` with the networks of `gan.networks`, to the number of parameters.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from benchmarks.measuring import launch
from gan.bundle import holds_bundle, save_bundle
from gan.config import MlpConfig, TrainConfig
from gan.data import Split, load_mnist
from gan.losses import discriminator_loss, generator_loss, squared_gradients
from gan.networks import Dropout, Generator, build_discriminator, build_generator
from gan.recipes import RECIPES, configure
from gan.scan import cut_out
from gan.training import choose_device, learning_rate

Losses = tuple[float, float]
"""The discriminator's loss, which is the sum of its two terms, and the generator's."""
Batches = DataLoader[tuple[Tensor, int]]


class PilImages(Dataset[tuple[Tensor, int]]):
    """MNIST as torchvision hands it out: a PIL image at a time, made a tensor in [-1, 1]."""

    def __init__(self, data: Split, side: int) -> None:
        self.images = cut_out(data.images, side)
        self.labels = data.labels
        self.transform = transforms.Compose(
            [transforms.ToTensor(), transforms.Normalize((0.5,), (0.5,))]
        )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = Image.fromarray(self.images[index].numpy())
        return self.transform(image), int(self.labels[index])


@dataclass(frozen=True, kw_only=True)
class Pair:
    """What is trained."""

    generator: Generator
    discriminator: nn.Module
    """Of the fully connected pair it gives probabilities [n, 1], of the other one logits [n]."""
    average: Generator
    """The generator's average; of the fully connected pair the generator itself."""


def build_pair(config: TrainConfig, device: torch.device) -> Pair:
    """The networks of a config, with torch's own dropout, drawn from torch's global state."""
    generator = build_generator(config.networks).to(device)
    discriminator: nn.Module = build_discriminator(config.networks, torch.Generator())
    if isinstance(config.networks, MlpConfig):
        discriminator = nn.Sequential(*with_plain_dropout(discriminator), nn.Sigmoid())
    average = generator
    if config.ema_halflife_images:
        average = copy.deepcopy(generator).requires_grad_(False)
    return Pair(generator=generator, discriminator=discriminator.to(device), average=average)


def with_plain_dropout(discriminator: nn.Module) -> nn.Sequential:
    """The layers of the fully connected discriminator, with torch's own dropout: logits [n, 1]."""
    layers = discriminator.get_submodule("layers").children()
    plain = (
        nn.Dropout(each.threshold / 65536) if isinstance(each, Dropout) else each for each in layers
    )
    return nn.Sequential(nn.Flatten(), *plain)


def load(data: Split, config: TrainConfig) -> Batches:
    """Shuffled batches of data that lies on the CPU."""
    images = PilImages(data, config.networks.side)
    return DataLoader(images, batch_size=config.batch_size, shuffle=True, drop_last=True)


def noise(num: int, config: TrainConfig, device: torch.device) -> Tensor:
    """Standard normal noise, float32 [num, latent_dim]."""
    return torch.randn(num, config.networks.latent_dim, device=device)


def train(pair: Pair, batches: Batches, config: TrainConfig) -> Iterator[Losses]:
    """Train the pair of a config; yields the losses of each step."""
    unconditional = isinstance(config.networks, MlpConfig)
    return (train_vanilla if unconditional else train_conditional)(pair, batches, config)


def train_vanilla(pair: Pair, batches: Batches, config: TrainConfig) -> Iterator[Losses]:
    """Train the fully connected pair; yields the losses of each step."""
    generator, discriminator = pair.generator, pair.discriminator
    device = next(generator.parameters()).device
    d_optimizer, g_optimizer = (_adam(net, config) for net in (discriminator, generator))
    loss = nn.BCELoss()
    for _ in range(config.epochs):
        for images, _ in batches:
            real = images.to(device)
            ones = torch.ones(len(real), 1, device=device)
            zeros = torch.zeros(len(real), 1, device=device)

            fake = generator(noise(len(real), config, device)).detach()
            d_optimizer.zero_grad()
            on_real = loss(discriminator(real), ones)
            on_real.backward()
            on_fake = loss(discriminator(fake), zeros)
            on_fake.backward()
            d_optimizer.step()

            fake = generator(noise(len(real), config, device))
            g_optimizer.zero_grad()
            g_loss = loss(discriminator(fake), ones)
            g_loss.backward()
            g_optimizer.step()

            yield (on_real + on_fake).item(), g_loss.item()


def train_conditional(pair: Pair, batches: Batches, config: TrainConfig) -> Iterator[Losses]:
    """Train the convolutional pair, with penalties and average; yields the losses of each step."""
    generator, discriminator = pair.generator, pair.discriminator
    device = next(generator.parameters()).device
    d_optimizer, g_optimizer = (_adam(net, config) for net in (discriminator, generator))
    step, num_steps = 0, config.epochs * len(batches)
    for _ in range(config.epochs):
        for images, labels in batches:
            real, digits = images.to(device), labels.to(device)
            for optimizer in (d_optimizer, g_optimizer):
                optimizer.param_groups[0]["lr"] = learning_rate(config, step / num_steps)

            fake = generator(noise(len(real), config, device), digits).detach()
            penalise = config.penalised and step % config.penalty_interval == 0
            real.requires_grad_(penalise)
            fake.requires_grad_(penalise)
            d_optimizer.zero_grad()
            on_real, on_fake = discriminator(real, digits), discriminator(fake, digits)
            d_loss = discriminator_loss(config.loss, on_real, on_fake)
            total = d_loss
            if penalise:
                for gamma, logits, at in (
                    (config.r1_gamma, on_real, real),
                    (config.r2_gamma, on_fake, fake),
                ):
                    if gamma:
                        penalty = squared_gradients(logits, at).mean()
                        total = total + config.penalty_interval * gamma / 2 * penalty
            total.backward()
            d_optimizer.step()

            fake = generator(noise(len(real), config, device), digits)
            g_optimizer.zero_grad()
            rival = discriminator(real, digits) if config.loss == "relativistic" else None
            g_loss = generator_loss(config.loss, rival, discriminator(fake, digits))
            g_loss.backward()
            g_optimizer.step()

            _follow(pair, config)
            step += 1
            yield d_loss.item(), g_loss.item()


def _adam(network: nn.Module, config: TrainConfig) -> torch.optim.Adam:
    betas = (config.beta1, config.beta2)
    return torch.optim.Adam(network.parameters(), lr=config.learning_rate, betas=betas)


@torch.no_grad()
def _follow(pair: Pair, config: TrainConfig) -> None:
    if pair.average is pair.generator:
        return
    weight = 1 - 0.5 ** (config.batch_size / config.ema_halflife_images)
    kept, now = pair.average.state_dict(), pair.generator.state_dict()
    for name, value in kept.items():
        if value.is_floating_point():
            value.lerp_(now[name], weight)


def main() -> None:
    """Train as the textbook does and keep the generator, to be judged like any other."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.textbook")
    parser.add_argument("--recipe", choices=RECIPES, default="vanilla")
    parser.add_argument("--epochs", type=int, help="the recipe's if not given")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    parser.add_argument("--data", type=Path, default=Path("data/mnist/raw"), help="raw MNIST")
    parser.add_argument("--out", type=Path, required=True, help="the folder of its bundle")
    given = parser.parse_args()
    if given.out.exists() and not (given.out.is_dir() and holds_bundle(given.out)):
        parser.error(f"{given.out} is there already, and is no bundle")
    config = configure(given.recipe, epochs=given.epochs, seed=given.seed)
    device = choose_device(given.device)
    batches = load(load_mnist(given.data).train, config)
    torch.manual_seed(config.seed)
    pair = build_pair(config, device)
    started = time.perf_counter()
    for step, (d_loss, g_loss) in enumerate(train(pair, batches, config), start=1):
        if step % len(batches) == 0:
            rate = step * config.batch_size / (time.perf_counter() - started)
            print(
                f"epoch {step // len(batches)}: losses {d_loss:.3f} and {g_loss:.3f}, "
                f"{rate:,.0f} images/s",
                flush=True,
            )
    digest = save_bundle(pair.average, given.out)
    print(f"{given.out}: sha256 {digest}")


if __name__ == "__main__":
    launch(main)
