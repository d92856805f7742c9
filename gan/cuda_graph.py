"""A training step as one launch: the many small kernels of a step otherwise wait for the host."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from gan.config import ConfigError
from gan.exchange import num_processes

WARM_UP = 3
"""Steps of each kind that are taken one operation at a time, before one is recorded."""

Step = Callable[[Tensor, float | Tensor, bool], None]
"""Takes a step: which images, the step size, and whether penalties are due."""


class CudaGraphs:
    """A step that is recorded as a CUDA graph, and from then on launched as a whole.

    A graph does the same operations on the same memory each time. So index and step size reach it
    in tensors that stay where they are, and steps with and without penalties are two graphs. Random
    numbers go on in the generator's sequence, as they would without graphs.
    """

    def __init__(self, step: Step, rng: torch.Generator) -> None:
        """`rng` is the generator, on the step's device, of all its random numbers."""
        self.step, self.rng = step, rng
        self.index = torch.empty(0, dtype=torch.int64, device=rng.device)
        self.lr = torch.empty((), device=rng.device)
        self.taken: Counter[bool] = Counter()
        self.replay: dict[bool, Callable[[], None]] = {}

    def __call__(self, index: Tensor, lr: float | Tensor, penalise: bool) -> None:
        """Take a step."""
        if len(self.index) == 0:
            self.index = torch.empty_like(index)
        self.index.copy_(index)
        self.lr.fill_(lr)
        self.taken[penalise] += 1
        work = partial(self.step, self.index, self.lr, penalise)
        if self.taken[penalise] <= WARM_UP:
            warm_up(work)
            return
        if penalise not in self.replay:
            self.replay[penalise] = record(work, self.rng)
        self.replay[penalise]()


def require_one_gpu(device: torch.device) -> None:
    """See that steps on this device can be graphs.

    Raises:
        ConfigError: it is no CUDA device, or several processes share the training.
    """
    if device.type != "cuda" or num_processes() > 1:
        raise ConfigError("steps are CUDA graphs on a CUDA device alone, and in one process")


def warm_up(work: Callable[[], None]) -> None:
    """Do the work, on a stream of its own as recording does; what is made once, is made now."""
    here, aside = torch.cuda.current_stream(), torch.cuda.Stream()
    aside.wait_stream(here)
    with torch.cuda.stream(aside):
        work()
    here.wait_stream(aside)


def record(work: Callable[[], None], rng: torch.Generator) -> Callable[[], None]:
    """Note what the work would do on the device, without doing it; what is given does it."""
    graph = torch.cuda.CUDAGraph()
    if torch.__version__ < "2.14":  # later ones do it by themselves, and say so
        graph.register_generator_state(rng)
    with torch.cuda.graph(graph):
        work()
    return graph.replay
