"""MNIST as tensors: the four raw IDX files, accepted by digest alone, parsed strictly.

The IDX format is described on the page that published MNIST (LeCun, Cortes, Burges, 1998): two zero
bytes, a type code, the rank, each dimension as a big-endian uint32, then the values.
"""

import hashlib
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from gan.errors import UserError

FILES = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}
"""The four raw, unzipped IDX files and their md5 digests."""

DATASET_DIGEST = "sha256:" + hashlib.sha256(repr(sorted(FILES.items())).encode()).hexdigest()
"""One stable id of the whole data set, derived from the digests of its files."""

_UINT8 = 0x08
_RANKS = {1: "labels", 3: "images"}


class DataError(UserError):
    """The data is missing, damaged or not what it claims to be."""


@dataclass(frozen=True, kw_only=True)
class Split:
    """Images and what they show.

    Args:
        images: uint8 [n, 28, 28], 0 (paper) to 255 (ink).
        labels: int64 [n], the digits 0 to 9.

    Raises:
        DataError: shapes, types or counts disagree, or a label is not a digit.
    """

    images: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        if self.images.dtype != torch.uint8 or self.images.shape[1:] != (28, 28):
            raise DataError(f"images must be uint8 [n, 28, 28], not {_describe(self.images)}")
        if self.labels.dtype != torch.int64 or self.labels.ndim != 1:
            raise DataError(f"labels must be int64 [n], not {_describe(self.labels)}")
        if len(self.images) != len(self.labels):
            raise DataError(f"{len(self.images)} images but {len(self.labels)} labels")
        if len(self.labels) and not 0 <= int(self.labels.min()) <= int(self.labels.max()) <= 9:
            raise DataError("a label is not a digit from 0 to 9")

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str) -> Self:
        """The same split on another device."""
        return type(self)(images=self.images.to(device), labels=self.labels.to(device))


@dataclass(frozen=True, kw_only=True)
class Mnist:
    """The 60,000 training and the 10,000 test images."""

    train: Split
    test: Split


def parse_idx(payload: bytes) -> Tensor:
    """Parse one raw IDX file of MNIST: labels as uint8 [n] or images as uint8 [n, rows, columns].

    Raises:
        DataError: the header is not that of labels or images, or the size is not what it says.
    """
    if len(payload) < 4 or payload[:2] != b"\0\0" or payload[2] != _UINT8:
        raise DataError("not an IDX file of unsigned bytes: it does not begin with 00 00 08")
    rank = payload[3]
    if rank not in _RANKS:
        raise DataError(f"an IDX file of rank {rank}; MNIST has rank 1 (labels) and 3 (images)")
    header = 4 + 4 * rank
    if len(payload) < header:
        raise DataError(f"truncated IDX header: {len(payload)} bytes, needs {header}")
    shape = struct.unpack_from(f">{rank}I", payload, offset=4)
    expected = header + math.prod(shape)
    if len(payload) != expected:
        fault = "truncated" if len(payload) < expected else "oversized"
        raise DataError(
            f"{fault} IDX file: {len(payload)} bytes, but its header says {list(shape)} "
            f"{_RANKS[rank]} values, which takes {expected}"
        )
    if expected == header:
        return torch.empty(shape, dtype=torch.uint8)
    # A copy, as a tensor may be written to and bytes may not.
    return torch.frombuffer(bytearray(payload), dtype=torch.uint8, offset=header).reshape(shape)


def has_digest(payload: bytes, name: str) -> bool:
    """Whether these bytes are the file ``name`` of ``FILES``, to the last bit."""
    return hashlib.md5(payload, usedforsecurity=False).hexdigest() == FILES[name]


def load_mnist(folder: Path, device: torch.device | str = "cpu") -> Mnist:
    """Read MNIST from the folder that holds its four raw IDX files.

    Raises:
        DataError: a file is missing or is not the canonical one.
    """
    tensors = {name: parse_idx(_read_verified(folder / name)) for name in FILES}

    def split(prefix: str) -> Split:
        return Split(
            images=tensors[f"{prefix}-images-idx3-ubyte"],
            labels=tensors[f"{prefix}-labels-idx1-ubyte"].long(),
        ).to(device)

    return Mnist(train=split("train"), test=split("t10k"))


def _read_verified(path: Path) -> bytes:
    try:
        payload = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"cannot read {path} ({error.strerror}); `make train` downloads MNIST"
        ) from None
    if not has_digest(payload, path.name):
        raise DataError(
            f"{path} has the wrong digest, so it is not MNIST's; `make train` fetches it again"
        )
    return payload


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
