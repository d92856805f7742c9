"""How fast it trains, against the textbook and against the machine: `python -m benchmarks.speed`.

Every loop trains side by side with the others in one process, in rounds. `docs/performance.md` says
what the rows mean. It needs torch, torchvision, safetensors and MNIST; the plot is left out without
matplotlib.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

from benchmarks import textbook, variants
from benchmarks.measuring import (
    Machine,
    Measured,
    count,
    interleave,
    launch,
    options,
    save,
    table,
    wait_for_device,
)
from benchmarks.products import SQUARE, flops, multiply, step_products
from gan.config import TrainConfig
from gan.data import Split, load_mnist
from gan.recipes import RECIPES, vanilla
from gan.training import TrainState, choose_device, train, uses_bfloat16

ENDLESS = 100_000
"""Epochs, of which only those are trained that the rounds have time for."""
TEXTBOOK, OURS, OURS_FLOAT32 = "the textbook's loop", "`gan.train`", "`gan.train` in float32"
GRAPHS = "`gan.train`, a step a CUDA graph"
COMPILED = f"{variants.BFLOAT16}, torch.compile"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all rows share."""

    data: Split
    """On the CPU."""
    device: torch.device
    rounds: int
    seconds: float
    compiled: bool
    """Whether to try torch.compile, too."""


def by_textbook(config: TrainConfig, setting: Setting) -> Iterator[int]:
    """Real images after each step of the textbook's loop."""
    pair = textbook.build_pair(config, setting.device)
    losses = textbook.train(pair, textbook.load(setting.data, config), config)
    return accumulate(config.batch_size for _ in losses)


def by_variant(tricks: tuple[str, ...], config: TrainConfig, setting: Setting) -> Iterator[int]:
    """Real images after each step of the textbook's loop with some tricks."""
    losses = variants.train_with(tricks, config, setting.data, setting.device)
    return accumulate(config.batch_size for _ in losses)


def by_us(config: TrainConfig, setting: Setting, *, cuda_graph: bool = False) -> Iterator[int]:
    """Real images after each report of `gan.train`, twice as many as the pipeline asks for."""
    state, data = TrainState(config, setting.device), setting.data.to(setting.device)
    for progress in train(state, data, report_every_s=0.5, cuda_graph=cuda_graph):
        yield progress.step * config.batch_size


def loops(recipe: str, setting: Setting) -> dict[str, Callable[[], Iterator[int]]]:
    """All loops that train a recipe, by name."""
    config = replace(RECIPES[recipe](), epochs=ENDLESS)
    found: dict[str, Callable[[], Iterator[int]]] = {
        TEXTBOOK: partial(by_textbook, config, setting)
    }
    if config.networks.num_classes == 0:
        for num, trick in enumerate(variants.TRICKS, start=1):
            found[f"+ {trick}"] = partial(by_variant, variants.TRICKS[:num], config, setting)
        if setting.compiled:
            tricks = (*variants.TRICKS[:-1], variants.COMPILED)
            found[COMPILED] = partial(by_variant, tricks, config, setting)
    found[OURS_FLOAT32] = partial(by_us, replace(config, precision="float32"), setting)
    if uses_bfloat16(config, setting.device):
        found[OURS] = partial(by_us, config, setting)
    if setting.device.type == "cuda":
        found[GRAPHS] = partial(by_us, config, setting, cuda_graph=True)
    return found


def measure(setting: Setting) -> dict[str, Any]:
    """Measure everything that this machine can, as it goes into the JSON file."""
    names = {
        f"{recipe}: {name}": start
        for recipe in RECIPES
        for name, start in loops(recipe, setting).items()
    }
    rates = interleave(names, rounds=setting.rounds, seconds=setting.seconds)
    config = vanilla()
    products = {"a square of 2048": SQUARE, "the products of a step": step_products(config)}
    # Without instructions for it, bfloat16 is hundreds of times slower: no ceiling.
    kinds = DTYPES if uses_bfloat16(config, setting.device) else {"float32": torch.float32}
    peaks = interleave(
        {
            f"{kind}, {what}": multiply(shapes, dtype, setting.device)
            for kind, dtype in kinds.items()
            for what, shapes in products.items()
        },
        rounds=setting.rounds,
        seconds=min(setting.seconds, 1.0),
    )
    return {
        "images_per_s": rates,
        "flops_per_s": peaks,
        "flops_a_step": flops(step_products(config)),
        "batch_size": config.batch_size,
        "whole_runs": {
            name: whole_run(setting, cuda_graph=cuda_graph)
            for name, cuda_graph in ((OURS, False), (GRAPHS, True))
            if setting.device.type == "cuda"
        },
    }


def whole_run(setting: Setting, *, cuda_graph: bool) -> dict[str, Any]:
    """Train `vanilla` to its end on a GPU, with a report a second and one an epoch."""
    torch.cuda.reset_peak_memory_stats()
    data, reports = setting.data.to(setting.device), 0
    wait_for_device()
    started = time.perf_counter()
    state = TrainState(vanilla(), setting.device)
    for _ in train(state, data, cuda_graph=cuda_graph):
        reports += 1
    wait_for_device()
    return {
        "seconds": time.perf_counter() - started,
        "steps": state.step,
        "reports": reports,
        "peak_cuda_bytes": torch.cuda.max_memory_allocated(),
    }


def describe(content: dict[str, Any]) -> str:
    """The one table, in Markdown."""
    rates: dict[str, Measured] = content["images_per_s"]
    peaks: dict[str, Measured] = content["flops_per_s"]
    rows = []
    for name, rate in rates.items():
        recipe = name.partition(":")[0]
        factor = rate.median / rates[f"{recipe}: {TEXTBOOK}"].median
        rows.append([name, rate.spread(), f"{factor:.2f}", _share(name, rate, peaks, content)])
    name = "vanilla: all 60,000 steps on a GPU"
    for loop, whole in content["whole_runs"].items():
        rows.append([f"{name}, {loop}", f"in {whole['seconds']:.1f} s", "", ""])
    if not content["whole_runs"]:
        rows.append([name, "not measured: this machine has no CUDA device", "", ""])
    speeds = [[f"matrix products: {n}", m.scaled(1e-9).spread(), "", ""] for n, m in peaks.items()]
    headings = ["loop", "images/s, median (lowest to highest)", "times", "share of the ceiling"]
    return (
        table(headings, rows)
        + "\n\n"
        + table(["ceiling", "GFLOP/s, median (lowest to highest)", "", ""], speeds)
    )


def _share(name: str, rate: Measured, peaks: dict[str, Measured], content: dict[str, Any]) -> str:
    """How much of the machine's best a loop of ours makes use of."""
    kind = {f"vanilla: {OURS}": "bfloat16", f"vanilla: {OURS_FLOAT32}": "float32"}.get(name)
    if kind is None:
        return ""
    speed = rate.median / content["batch_size"] * content["flops_a_step"]
    return f"{speed / peaks[f'{kind}, a square of 2048'].median:.0%}"


def plot(content: dict[str, Any], path: Path) -> None:
    """Draw the loops of each recipe as bars."""
    from matplotlib.figure import Figure  # noqa: PLC0415  # not on every machine

    figure = Figure(figsize=(8, 5.5), layout="constrained")
    grouped = {
        recipe: {
            name.partition(": ")[2].replace("`", ""): measured
            for name, measured in content["images_per_s"].items()
            if name.startswith(f"{recipe}:")
        }
        for recipe in RECIPES
    }
    sizes = [len(loops) for loops in grouped.values()]
    for axes, (recipe, measured) in zip(
        figure.subplots(len(grouped), height_ratios=sizes, squeeze=False)[:, 0],
        grouped.items(),
        strict=True,
    ):
        medians = [each.median for each in measured.values()]
        ends = [
            [each.median - min(each.rounds) for each in measured.values()],
            [max(each.rounds) - each.median for each in measured.values()],
        ]
        axes.barh(list(measured), medians, xerr=ends, color="#4477aa", ecolor="#222222", capsize=2)
        axes.invert_yaxis()
        axes.set_title(f"{recipe}: real images a second", fontsize=10, loc="left")
    figure.savefig(path, dpi=80)


def main() -> None:
    """Measure; write JSON and a plot, and print the table."""
    parser = options("speed")
    parser.add_argument("--rounds", type=count, default=11)
    parser.add_argument("--seconds", type=float, default=1.0, help="a loop's share of a round")
    parser.add_argument("--compiled", action="store_true", help="try torch.compile, too")
    given = parser.parse_args()
    setting = Setting(
        data=load_mnist(given.data).train,
        device=choose_device(given.device),
        rounds=given.rounds,
        seconds=given.seconds,
        compiled=given.compiled,
    )
    content = measure(setting)
    print(f"{Machine.here()}; {given.seconds:g} s a round, rounds: {given.rounds}\n")
    print(describe(content))
    save(given.out, "speed", content)
    if find_spec("matplotlib"):
        plot(content, given.out / "performance-speed.png")


if __name__ == "__main__":
    launch(main)
