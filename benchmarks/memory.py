"""How much memory a training takes: `python -m benchmarks.memory`. Linux only.

Each recipe trains some steps in a process of its own; what the process held is read at each stage.
"""

from __future__ import annotations

import re
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from benchmarks.measuring import Machine, launch, options, save, table
from gan.data import load_mnist
from gan.recipes import RECIPES
from gan.training import TrainState, choose_device, train

STEPS = 50
HEADINGS = (
    "recipe",
    "with torch imported",
    "with the data read",
    "peak of reading",
    "peak of training",
    "the data's tensors",
    "peak on the GPU",
)


def measure(recipe: str, folder: Path, device: torch.device) -> dict[str, Any]:
    """Bytes held by this process, now and at most, as a recipe trains some steps."""
    found: dict[str, Any] = {"imported": _resident("VmRSS")}
    data = load_mnist(folder).train.to(device)
    found |= {
        "data_read": _resident("VmRSS"),
        "peak_of_reading": _resident("VmHWM"),
        "data": data.images.nbytes + data.labels.nbytes,
    }
    state = TrainState(RECIPES[recipe](), device)
    for _ in train(state, data):
        if state.step >= STEPS:
            break
    found["peak"] = _resident("VmHWM")
    if device.type == "cuda":
        found["peak_cuda"] = torch.cuda.max_memory_allocated()
    return found


def _resident(what: str) -> int:
    """Resident bytes: VmRSS for now, VmHWM for the most there were."""
    line = re.search(rf"^{what}:\s*(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert line
    return 1024 * int(line[1])


def describe(found: dict[str, dict[str, Any]]) -> str:
    """A row a recipe, in MB."""
    names = ("imported", "data_read", "peak_of_reading", "peak", "data", "peak_cuda")
    rows = [
        [recipe, *(f"{each[name] / 1e6:,.0f}" if name in each else "no GPU" for name in names)]
        for recipe, each in found.items()
    ]
    return table([HEADINGS[0], *(f"{heading}, MB" for heading in HEADINGS[1:])], rows)


def main() -> None:
    """Measure, write JSON and print a table."""
    parser = options("memory")
    given = parser.parse_args()
    place = choose_device(given.device)
    fresh = get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=fresh, max_tasks_per_child=1) as pool:
        measured = partial(measure, folder=given.data, device=place)
        found = dict(zip(RECIPES, pool.map(measured, RECIPES), strict=True))
    print(f"{Machine.here()}\n\n{describe(found)}")
    save(given.out, "memory", {"bytes": found})


if __name__ == "__main__":
    launch(main)
