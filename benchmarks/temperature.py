"""What a sampling temperature does to the drawings of a bundle: `python -m benchmarks.temperature`.

Below 1, precision is bought with recall. Each temperature is judged on several draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import torch

from benchmarks.measuring import Machine, count, launch, options, save, table
from gan.bundle import bundle_digest, load_bundle
from gan.data import Mnist, load_mnist
from gan.evaluation.scores import Scores, draws_like, evaluate
from gan.networks import Generator
from gan.training import choose_device

METRICS = ("frechet_distance", "precision", "recall", "coverage", "digit_as_asked")
TEMPERATURES = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1)


def measure(
    generator: Generator,
    data: Mnist,
    *,
    device: torch.device,
    num_draws: int,
    num_samples: int,
    cache: Path,
) -> dict[float, list[Scores]]:
    """The scores of each temperature, one for each draw."""
    return {
        temperature: [
            evaluate(
                draws_like(generator, data.train.labels, temperature=temperature),
                data,
                num_samples=num_samples,
                seed=seed,
                device=device,
                cache=cache,
            )
            for seed in range(num_draws)
        ]
        for temperature in TEMPERATURES
    }


def describe(found: dict[float, list[Scores]]) -> str:
    """A row a temperature: means over the draws."""
    metrics = {
        temperature: [scores.metrics() for scores in draws] for temperature, draws in found.items()
    }
    # A generator that is not told digits has no share of those asked for.
    names = [name for name in METRICS if name in next(iter(metrics.values()))[0]]
    rows = [
        [f"{temperature:g}", *(f"{fmean(each[name] for each in draws):.3f}" for name in names)]
        for temperature, draws in metrics.items()
    ]
    return table(["temperature", *names], rows)


def main(words: Sequence[str] | None = None) -> None:
    """Measure, write JSON and print a table."""
    parser = options("temperature")
    parser.add_argument("--bundle", type=Path, default=Path("mnist-gan-generator"))
    parser.add_argument(
        "--num-draws", type=count, default=2, help="draws a temperature (default: 2)"
    )
    parser.add_argument("--num-samples", type=count, default=10_000, help="drawings a draw")
    given = parser.parse_args(words)
    device = choose_device(given.device)
    generator = load_bundle(given.bundle, device)
    given.out.mkdir(parents=True, exist_ok=True)
    found = measure(
        generator,
        load_mnist(given.data, device),
        device=device,
        num_draws=given.num_draws,
        num_samples=given.num_samples,
        cache=given.out,
    )
    digest = bundle_digest(given.bundle)
    scores = {f"{temperature:g}": draws for temperature, draws in found.items()}
    print(f"{Machine.here()}\nbundle sha256 {digest}\n\n{describe(found)}")
    save(given.out, "temperature", {"bundle": digest, "scores": scores})


if __name__ == "__main__":
    launch(main)
