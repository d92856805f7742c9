"""What the processes of one training tell each other, where torch.distributed has several."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed

from gan.config import ConfigError


def num_processes() -> int:
    """How many processes share the training, as under torchrun; 1 where there is no other."""
    there = distributed.is_available() and distributed.is_initialized()
    return distributed.get_world_size() if there else 1


def share_of(batch_size: int) -> slice:
    """This process's part of a batch.

    Raises:
        ConfigError: the shares would differ.
    """
    num = num_processes()
    rank = distributed.get_rank() if num > 1 else 0
    require_even_shares(batch_size, num)
    return slice(rank * batch_size // num, (rank + 1) * batch_size // num)


def require_even_shares(batch_size: int, num: int) -> None:
    """See that a batch can be shared out to so many devices.

    Raises:
        ConfigError: the shares would differ.
    """
    if batch_size % num:
        raise ConfigError(f"batch_size must be a multiple of the {num} devices, not {batch_size}")


def average_over_processes(tensors: list[Tensor]) -> list[Tensor]:
    """Replace float tensors by their means over all processes, in one exchange; gives them."""
    if not tensors or num_processes() == 1:
        return tensors
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    distributed.all_reduce(flat)
    flat /= num_processes()
    parts = flat.split([tensor.numel() for tensor in tensors])
    for tensor, part in zip(tensors, parts, strict=True):
        tensor.copy_(part.view_as(tensor))
    return tensors


class MeanOverProcesses(torch.autograd.Function):
    """The mean of a float tensor over all processes, of equal shapes there.

    Its gradient is the mean of theirs, so that the mean over processes of all gradients is that
    of the mean of their losses.
    """

    @staticmethod
    def forward(_: Any, tensor: Tensor) -> Tensor:
        """Exchange the values."""
        return average_over_processes([tensor.clone()])[0]

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> Tensor:
        """Exchange the gradients."""
        return average_over_processes([gradient.clone()])[0]
