"""What the real images look like to the judge: worked out once, kept by digest."""

from __future__ import annotations

import hashlib
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from gan.data import Mnist
from gan.evaluation.judge import Judge, judge_images
from gan.evaluation.metrics import nearest_distances, nearest_image_distances, squared_radii

SCHEMA = "reference-1"
"""Part of the digest: raise it when what is kept changes its meaning."""


@dataclass(frozen=True, kw_only=True)
class Reference:
    """What scoring needs to know of the real images; n training and m test images.

    Args:
        train_features: float32 [n, 128].
        test_features: float32 [m, 128].
        test_reach: `squared_radii` of test_features, [m].
        test_nearest_pixels: the distance from each test image to the nearest training image, [m].
        test_nearest_features: the same in features, [m].
    """

    train_features: Tensor
    test_features: Tensor
    test_reach: Tensor
    test_nearest_pixels: Tensor
    test_nearest_features: Tensor


def load_reference(judge: Judge, data: Mnist, cache: Path | None = None) -> Reference:
    """Look at the real images, or read from the folder `cache` what was seen there before.

    Everything lies on the judge's device. The kept file's name is a digest of the images and of
    the judge, so that nothing stale is ever read.
    """
    device = next(judge.parameters()).device
    if cache is None:
        return _look(judge, data)
    path = cache / f"{SCHEMA}-{_digest(judge, data)[:24]}.safetensors"
    if path.is_file():
        return Reference(**load_file(path, device=str(device)))
    reference = _look(judge, data)
    _write(path, save({name: value.contiguous() for name, value in vars(reference).items()}))
    return reference


@torch.inference_mode()
def _look(judge: Judge, data: Mnist) -> Reference:
    device = next(judge.parameters()).device
    train = judge_images(judge, data.train.images).features
    test = judge_images(judge, data.test.images).features
    return Reference(
        train_features=train,
        test_features=test,
        test_reach=squared_radii(test),
        test_nearest_pixels=nearest_image_distances(
            data.test.images.to(device), data.train.images.to(device)
        ),
        test_nearest_features=nearest_distances(test, train),
    )


def _digest(judge: Judge, data: Mnist) -> str:
    digest = hashlib.sha256()
    for images in (data.train.images, data.test.images, *judge.state_dict().values()):
        digest.update(f"{images.dtype} {tuple(images.shape)}".encode())
        digest.update(images.cpu().contiguous().numpy())
    return digest.hexdigest()


def _write(path: Path, payload: bytes) -> None:
    # Whole or not at all: another process may be reading, or writing the same.
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        whole = Path(scratch) / path.name
        whole.write_bytes(payload)
        whole.replace(path)
