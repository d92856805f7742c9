"""The two pairs of networks: generators draw images, discriminators score them.

Images are float [n, 1, 28, 28] in [-1, 1]; noise is float [n, latent_dim]; digits are
int64 [n], or None for the unconditional pair. Scores are logits [n]: above 0 means "real".
A convolutional pair that draws dots plays with [n, 1, 20, 20], as `gan.scan.cut_out` cuts real
images; outside of training its drawings are laid on sheets of 28.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gan.config import ConvConfig, MlpConfig
from gan.exchange import MeanOverProcesses, num_processes
from gan.scan import Centring, Scan


class Dropout(nn.Module):
    """Inverted dropout whose masks come from a given generator (Srivastava et al. 2014).

    torch's own layer draws from the global state, which anything else may move; and it draws a
    float a unit, where sixteen bits do: `p` is rounded to a multiple of 1/65536.
    """

    def __init__(self, p: float, rng: torch.Generator) -> None:
        super().__init__()
        self.threshold = min(round(p * 65536), 65535)
        self.rng = rng

    def forward(self, x: Tensor) -> Tensor:
        """Zero a random share of `x` and scale the rest; in evaluation, return it as it is."""
        if not self.training or self.threshold == 0:
            return x
        words = torch.empty((x.numel() + 3) // 4, dtype=torch.int64, device=x.device)
        words.random_(-(2**63), None, generator=self.rng)
        draws = words.view(torch.int16)[: x.numel()].view_as(x)
        keep = draws >= self.threshold - 32768
        return x * keep * (65536 / (65536 - self.threshold))


class MlpGenerator(nn.Module):
    """100-256-512-1024-784 with LeakyReLU 0.2 and Tanh (Mosquera, "GANs from scratch", 2018)."""

    def __init__(self, config: MlpConfig) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.Sequential(
            nn.Linear(config.latent_dim, 256), nn.LeakyReLU(0.2),
            nn.Linear(256, 512), nn.LeakyReLU(0.2),
            nn.Linear(512, 1024), nn.LeakyReLU(0.2),
            nn.Linear(1024, 28 * 28), nn.Tanh(),
        )  # fmt: skip

    def forward(self, noise: Tensor, digits: Tensor | None = None) -> Tensor:
        """Draw an image for each row of noise."""
        images: Tensor = self.layers(noise)
        return images.view(-1, 1, 28, 28)


class MlpDiscriminator(nn.Module):
    """784-1024-512-256-1 with LeakyReLU 0.2 and Dropout (Mosquera 2018), without the sigmoid."""

    def __init__(self, config: MlpConfig, rng: torch.Generator) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(28 * 28, 1024), nn.LeakyReLU(0.2), Dropout(config.dropout, rng),
            nn.Linear(1024, 512), nn.LeakyReLU(0.2), Dropout(config.dropout, rng),
            nn.Linear(512, 256), nn.LeakyReLU(0.2), Dropout(config.dropout, rng),
            nn.Linear(256, 1),
        )  # fmt: skip

    def forward(self, images: Tensor, digits: Tensor | None = None) -> Tensor:
        """Score each image."""
        logits: Tensor = self.layers(images.flatten(1))
        return logits.squeeze(1)


class BatchNorm(nn.BatchNorm2d):
    """Batch norm (Ioffe and Szegedy 2015) by the whole batch, where processes share it, too.

    torch has that for CUDA alone.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalise each channel of [n, c, h, w]."""
        num = num_processes()
        if not self.training or num == 1:
            return super().forward(x)
        values = x.float()
        moments = torch.stack([values.mean((0, 2, 3)), values.square().mean((0, 2, 3))])
        mean, square = MeanOverProcesses.apply(moments)
        variance = square - mean.square()
        self._follow(mean.detach(), variance.detach(), num * values[:, 0].numel())
        scale = self.weight * (variance + self.eps).rsqrt()
        shift = self.bias - mean * scale
        return torch.addcmul(shift[:, None, None], values, scale[:, None, None]).to(x.dtype)

    def _follow(self, mean: Tensor, variance: Tensor, count: int) -> None:
        assert self.momentum is not None
        self.get_buffer("running_mean").lerp_(mean, self.momentum)
        self.get_buffer("running_var").lerp_(variance * count / (count - 1), self.momentum)
        self.get_buffer("num_batches_tracked").add_(1)


class ConvGenerator(nn.Module):
    """Noise and digit, three sizes up to the drawing's, after DCGAN (Radford et al. 2015)."""

    def __init__(self, config: ConvConfig) -> None:
        super().__init__()
        w, quarter = config.width, config.side // 4
        self.config = config
        fine = (
            layer
            for _ in range(config.fine_layers)
            for layer in (nn.Conv2d(w, w, 3, padding=1, bias=False), BatchNorm(w), nn.ReLU())
        )
        self.project = nn.Linear(
            config.latent_dim + config.num_classes, 4 * w * quarter**2, bias=False
        )
        self.layers = nn.Sequential(
            nn.Unflatten(1, (4 * w, quarter, quarter)), BatchNorm(4 * w), nn.ReLU(),
            nn.ConvTranspose2d(4 * w, 2 * w, 4, stride=2, padding=1, bias=False),
            BatchNorm(2 * w), nn.ReLU(),
            nn.ConvTranspose2d(2 * w, w, 4, stride=2, padding=1, bias=False),
            BatchNorm(w), nn.ReLU(),
            *fine,
            nn.Conv2d(w, config.dots**2 or 1, 3, padding=1),
        )  # fmt: skip
        if config.dots:
            self.scan, self.centring = Scan(config.dots), Centring()

    def forward(self, noise: Tensor, digits: Tensor | None = None) -> Tensor:
        """Draw the asked digit for each row of noise."""
        assert digits is not None
        one_hot = F.one_hot(digits, self.config.num_classes).to(noise.dtype)
        drawn: Tensor = self.layers(self.project(torch.cat([noise, one_hot], dim=1)))
        if not self.config.dots:
            return torch.tanh(drawn)
        images: Tensor = self.centring(self.scan(drawn, noise[:, 0]))
        return images


class ConvDiscriminator(nn.Module):
    """Convolutions, unnormalised, and a projection of the digit (Miyato and Koyama 2018)."""

    def __init__(self, config: ConvConfig) -> None:
        super().__init__()
        w = config.width
        seen = [1] + [w] * config.fine_layers
        fine = (
            layer
            for channels in seen[:-1]
            for layer in (nn.Conv2d(channels, w, 3, padding=1), nn.LeakyReLU(0.2))
        )
        self.features = nn.Sequential(
            *fine,
            nn.Conv2d(seen[-1], 2 * w, 4, stride=2, padding=1), nn.LeakyReLU(0.2),
            nn.Conv2d(2 * w, 4 * w, 4, stride=2, padding=1), nn.LeakyReLU(0.2),
            nn.Conv2d(4 * w, 8 * w, 3, padding=1), nn.LeakyReLU(0.2),
            nn.Conv2d(8 * w, 4 * w, config.side // 4), nn.LeakyReLU(0.2), nn.Flatten(),
        )  # fmt: skip
        self.score = nn.Linear(4 * w, 1)
        self.digit = nn.Embedding(config.num_classes, 4 * w)

    def forward(self, images: Tensor, digits: Tensor | None = None) -> Tensor:
        """Score each image as a drawing of its digit."""
        assert digits is not None
        # Paper is 0 here, so that what convolutions pad with looks like paper.
        features = self.features(images + 1)
        logits: Tensor = self.score(features).squeeze(1) + (self.digit(digits) * features).sum(1)
        return logits


Generator = MlpGenerator | ConvGenerator
Discriminator = MlpDiscriminator | ConvDiscriminator


def build_generator(config: MlpConfig | ConvConfig) -> Generator:
    """Make the config's generator, its weights drawn from torch's global state."""
    return MlpGenerator(config) if isinstance(config, MlpConfig) else ConvGenerator(config)


def build_discriminator(config: MlpConfig | ConvConfig, rng: torch.Generator) -> Discriminator:
    """Make the config's discriminator; `rng` draws its dropout masks."""
    if isinstance(config, MlpConfig):
        return MlpDiscriminator(config, rng)
    return ConvDiscriminator(config)
