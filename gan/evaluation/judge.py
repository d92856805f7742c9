"""The judge: a small MNIST classifier whose pinned weights make scores comparable.

Distances between sets of images are measured in its 128 features, so every score belongs to one
judge: other weights are another judge, with another id. `train_judge.py` made the pinned ones.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load
from torch import Tensor, nn

from gan.errors import UserError

JUDGE_ID = "mnist-judge-1"
JUDGE_FOLDER = Path(__file__).parent
"""Where the weights and the card of the pinned judge lie."""

NUM_FEATURES = 128

FEATURE_SCALE = 1.18
"""The unit of all distances, kept with the weights. It puts the Frechet distance of 10,000 real
training images from the test images at 0.17 to 0.20, beside older numbers of this project."""


class JudgeError(UserError):
    """The judge's files are missing or are not the pinned ones."""


class Judge(nn.Module):
    """Two 5x5 convolutions without padding, 128 features, one linear layer.

    Pooling comes before normalisation because it is then four times less work.
    """

    def __init__(self, *, num_outputs: int = 10, width: int = 32) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, width, 5, bias=False),  # [n, width, 24, 24]
            nn.MaxPool2d(2),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 5, bias=False),  # [n, 2 * width, 8, 8]
            nn.MaxPool2d(2),
            nn.BatchNorm2d(2 * width),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(2 * width * 4 * 4, NUM_FEATURES, bias=False),
            nn.BatchNorm1d(NUM_FEATURES),
            nn.ReLU(),
        )
        self.scale = nn.Buffer(torch.tensor(FEATURE_SCALE))
        self.head = nn.Linear(NUM_FEATURES, num_outputs)
        self.to(memory_format=torch.channels_last)

    def features(self, images: Tensor) -> Tensor:
        """What the judge sees in uint8 images [n, 28, 28]: float32 [n, 128], not negative."""
        # MNIST's mean and deviation, on a scale where ink is 1.
        ink = images.unsqueeze(1).float() / 255
        features: Tensor = self.body((ink - 0.1307) / 0.3081)
        return self.scale * features

    def logits(self, images: Tensor) -> Tensor:
        """Unnormalised log-probabilities of uint8 images [n, 28, 28]: float32 [n, num_outputs]."""
        return self.classify(self.features(images))

    def classify(self, features: Tensor) -> Tensor:
        """Logits [n, num_outputs] of features [n, 128]."""
        logits: Tensor = self.head(features)
        return logits


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the judge makes of n images: features float32 [n, 128], digits int64 [n]."""

    features: Tensor
    digits: Tensor


@torch.inference_mode()
def judge_images(judge: Judge, images: Tensor, *, batch_size: int = 1000) -> Verdict:
    """Look at uint8 images [n, 28, 28] in batches; the verdict lies on the judge's device."""
    device = next(judge.parameters()).device
    features = torch.cat([judge.features(batch.to(device)) for batch in images.split(batch_size)])
    return Verdict(features=features, digits=judge.classify(features).argmax(dim=1))


def read_card(folder: Path = JUDGE_FOLDER) -> dict[str, Any]:
    """The judge's card: id, sha256 of the weights, how it was trained and tested, the floors.

    Raises:
        JudgeError: there is no card, or it is another judge's.
    """
    path = folder / f"{JUDGE_ID}.json"
    try:
        card: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:  # no JSON, or not even text
        raise JudgeError(
            f"cannot read the judge's card {path}; restore it from the repository"
        ) from error
    if card.get("id") != JUDGE_ID:
        raise JudgeError(f"{path} is the card of {card.get('id')!r}, not of {JUDGE_ID!r}")
    return card


def load_judge(device: torch.device | str = "cpu", *, folder: Path = JUDGE_FOLDER) -> Judge:
    """The pinned judge, ready to judge: in evaluation mode, without gradients.

    Raises:
        JudgeError: the weights are missing or their digest is not the one on the card.
    """
    path = folder / f"{JUDGE_ID}.safetensors"
    expected = read_card(folder)["sha256"]
    try:
        payload = path.read_bytes()
    except OSError as error:
        raise JudgeError(
            f"cannot read the judge's weights {path}; restore them from the repository"
        ) from error
    if hashlib.sha256(payload).hexdigest() != expected:
        raise JudgeError(
            f"{path} was altered: its sha256 is not the {expected} of {JUDGE_ID}; "
            "restore it from the repository, or give another judge another id"
        )
    judge = Judge()
    judge.load_state_dict(load(payload))
    return judge.requires_grad_(False).eval().to(device)
