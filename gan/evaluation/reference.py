"""What the real images look like to the judge: worked out once, kept by digest."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
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
    the judge, so that nothing stale is ever read; it holds a digest of its own, so that nothing
    damaged is. A folder that cannot be written only costs the time to look again.
    """
    if cache is None:
        return _look(judge, data)
    seen = (data.train.images, data.test.images, *judge.state_dict().values())
    path = cache / f"{SCHEMA}-{_digest(seen)[:24]}.safetensors"
    if kept := _read(path, next(judge.parameters()).device):
        _clear_parts(path)
        return kept
    reference = _look(judge, data)
    with suppress(OSError):
        _write(path, reference)
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


def _digest(tensors: Iterable[Tensor]) -> str:
    digest = hashlib.sha256()
    for values in tensors:
        digest.update(f"{values.dtype} {tuple(values.shape)}".encode())
        digest.update(values.cpu().contiguous().numpy().data)
    return digest.hexdigest()


def _read(path: Path, device: torch.device) -> Reference | None:
    """What `_write` kept; None if there is nothing, or not what was written."""
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            kept = Reference(**{name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
            return kept if file.metadata() == {"sha256": _digest(vars(kept).values())} else None
    except Exception:  # a damaged header raises half a dozen different ones
        return None


def _write(path: Path, reference: Reference) -> None:
    tensors = {name: value.contiguous() for name, value in vars(reference).items()}
    payload = save(tensors, {"sha256": _digest(tensors.values())})
    # Whole or not at all: another process may be reading, or writing the same.
    path.parent.mkdir(parents=True, exist_ok=True)
    _clear_parts(path)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as scratch:
        whole = Path(scratch) / path.name
        whole.write_bytes(payload)
        whole.replace(path)


def _clear_parts(path: Path) -> None:
    """Remove what a killed process left. One that still writes loses its part: the same file is
    there already, or is about to be written."""
    for part in path.parent.glob(f".{path.name}-*"):
        shutil.rmtree(part, ignore_errors=True)
