"""What the pipeline itself costs, beside training and judging: `python -m benchmarks.pipeline`.

Runs the flow twice, as `make train` does with no server running, in an empty folder; MNIST is there
already. A run takes few steps, so that the rest shows. Then it times the commands that are to
answer at once.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.measuring import Machine, Measured, count, launch, options, save, table
from gan.training import train

ROOT = Path(__file__).parents[1]
OPTIONS = ("--recipe", "vanilla", "--epochs", "3", "--num-samples", "100")
FIRST, LATER = "the first run, which makes the stores", "a later run"
JUDGING = ("evaluate", "promote")
"""The second draws and judges too, once there is a champion."""
COMMANDS = {
    "an empty Python": ("-c", "pass"),
    "gan --help": ("-c", "from flows.gan_command import main; main()", "--help"),
    "import gan": ("-c", "import gan"),
    "import flows.train_gan": ("-c", "import flows.train_gan"),
}


def run_timed(folder: Path, data: Path) -> dict[str, Any]:
    """Run the flow in `folder` on raw MNIST: seconds of its stages, and of its training."""
    # The user's own servers, folders and store are left alone.
    theirs = ("PREFECT_API", "MLFLOW_", "MNIST_GAN_")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(theirs)}
    environment = kept | {
        "PYTHONPATH": str(ROOT),
        "PREFECT_HOME": str(folder / ".prefect"),
        "MNIST_GAN_DATA_DIR": str(data.parent.resolve()),
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    notes = folder / "marks.json"
    started = time.time()
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.pipeline", "--mark", str(notes), *OPTIONS],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    ended = time.time()
    if done.returncode:
        sys.exit(f"{done.stderr}\nerror: the flow failed")
    found: dict[str, Any] = json.loads(notes.read_text())
    marks = [("", started), *found.pop("marks"), ("the end of the process", ended)]
    stages: dict[str, float] = {}
    for (_, before), (name, after) in pairwise(marks):
        stages[name] = stages.get(name, 0.0) + after - before
    return {"stages": stages, **found}


def mark(notes: Path) -> None:
    """Run the flow with the options on the command line; writes down when it did what."""
    marks: list[tuple[str, float]] = []
    found: dict[str, Any] = {"marks": marks}

    def reach(name: str) -> None:
        marks.append((name, time.time()))

    import resource  # noqa: PLC0415

    from prefect import Task  # noqa: PLC0415

    from flows import command_line, train_gan  # noqa: PLC0415
    from tasks import training  # noqa: PLC0415

    reach("imports")

    def timed_steps(*arguments: Any) -> Iterator[Any]:
        """The training, between whose steps its caller's time is counted."""
        work, within = train(*arguments), 0.0
        started = time.perf_counter()
        while True:
            resumed = time.perf_counter()
            progress = next(work, None)
            within += time.perf_counter() - resumed
            if progress is None:
                break
            yield progress
        found["steps"] = within
        found["callbacks"] = time.perf_counter() - started - within

    setattr(training, "train", timed_steps)  # noqa: B010  # it is no name of theirs to mypy
    train_gan.train_gan.on_running(lambda *_: reach("the server's start"))
    for each in vars(train_gan).values():
        if isinstance(each, Task):
            each.on_running(lambda task, *_: reach(f"before {task.name}"))
            each.on_completion(lambda task, *_: reach(task.name))
    command_line.run(train_gan.train_gan)
    reach("after report")
    found["peak_bytes"] = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    notes.write_text(json.dumps(found))


def own_cost(run: dict[str, Any]) -> float:
    """Seconds of a run beside the steps of its training and the judging."""
    judging = sum(run["stages"][name] for name in JUDGING)
    return float(sum(run["stages"].values()) - run["steps"] - judging)


def time_commands(rounds: int) -> dict[str, Measured]:
    """Seconds of each command, taken in turns."""
    found: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(rounds):
        for name, arguments in COMMANDS.items():
            started = time.perf_counter()
            subprocess.run(
                [sys.executable, *arguments], cwd=ROOT, stdout=subprocess.DEVNULL, check=True
            )
            found[name].append(time.perf_counter() - started)
    return {name: Measured(rounds=tuple(seconds)) for name, seconds in found.items()}


def describe(runs: dict[str, dict[str, Any]], commands: dict[str, Measured]) -> str:
    """Where each second goes."""
    stages = list(dict.fromkeys(name for run in runs.values() for name in run["stages"]))
    rows = [[name, *(f"{run['stages'].get(name, 0):.2f}" for run in runs.values())]
            for name in stages]  # fmt: skip
    rows += [
        ["**in all**", *(f"{sum(run['stages'].values()):.2f}" for run in runs.values())],
        ["steps of the training", *(f"{run['steps']:.2f}" for run in runs.values())],
        ["callbacks between them", *(_callbacks(run) for run in runs.values())],
        ["**beside steps and judging**", *(f"{own_cost(run):.2f}" for run in runs.values())],
        ["peak memory, MB", *(f"{run['peak_bytes'] / 1e6:,.0f}" for run in runs.values())],
    ]
    said = [[name, measured.spread(".2f")] for name, measured in commands.items()]
    return (
        table(["seconds", *runs], rows)
        + "\n\n"
        + table(["command", "seconds, median (lowest to highest)"], said)
    )


def _callbacks(run: dict[str, Any]) -> str:
    share = run["callbacks"] / (run["callbacks"] + run["steps"])
    return f"{run['callbacks']:.2f} ({share:.1%})"


def main() -> None:
    """Measure, write JSON and print tables."""
    parser = options("pipeline")
    parser.add_argument("--rounds", type=count, default=5, help="of the commands")
    parser.add_argument("--mark", type=Path, metavar="FILE", help=argparse.SUPPRESS)
    given, rest = parser.parse_known_args()
    if given.mark:
        sys.argv[1:] = rest
        mark(given.mark)
        return
    parser.parse_args()  # what is none of its options is for the flow alone
    with TemporaryDirectory() as scratch:
        runs = {name: run_timed(Path(scratch), given.data) for name in (FIRST, LATER)}
    commands = time_commands(given.rounds)
    print(f"{Machine.here()}\n\n{describe(runs, commands)}")
    save(given.out, "pipeline", {"runs": runs, "commands": commands})


if __name__ == "__main__":
    launch(main)
