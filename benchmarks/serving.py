"""How many requests a second a served champion answers, one after the other, by size and format.

Serves the champion of the registry that MLflow is set to, on loopback. Rounds of all the kinds of
requests alternate, so that a busy moment touches all alike; the median round counts.
"""

from __future__ import annotations

import os
import platform
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from benchmarks.measuring import launch
from tasks.tracking import MODEL_NAME, git_commit

ROUNDS = 5
REQUESTS_A_ROUND = 20
KINDS = [(num, form) for num in (1, 16, 256) for form in ("array", "png")]


@contextmanager
def served() -> Iterator[str]:
    """The address of a served champion."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    model = f"models:/{MODEL_NAME}@champion"
    options = ["-m", model, "--env-manager", "local", "--port", str(port)]
    process = subprocess.Popen(
        [sys.executable, "-m", "mlflow", "models", "serve", *options],
        # It calls uvicorn by name.
        env=os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            if process.poll() is not None:
                sys.exit(f"error: {model} cannot be served; is there a champion?")
            try:
                if httpx.get(f"{url}/ping").is_success:
                    break
            except httpx.TransportError:
                time.sleep(0.1)
        yield url
    finally:
        process.terminate()
        process.wait()


def main() -> None:
    """Measure, and print a table."""
    seconds: dict[tuple[int, str], list[float]] = {kind: [] for kind in KINDS}
    with served() as url, httpx.Client(timeout=60) as client:
        for _ in range(1 + ROUNDS):
            for num, form in KINDS:
                request = {
                    "dataframe_records": [{"digit": -1}],
                    "params": {"num": num, "seed": 1, "format": form},
                }
                started = time.perf_counter()
                for _ in range(REQUESTS_A_ROUND):
                    client.post(f"{url}/invocations", json=request).raise_for_status()
                seconds[num, form].append(time.perf_counter() - started)
    print(f"{os.cpu_count()} cores, {platform.machine()}, commit {git_commit()}")
    print("| images a request | format | requests/s | images/s |\n| --- | --- | --- | --- |")
    for (num, form), rounds in seconds.items():
        rate = REQUESTS_A_ROUND / statistics.median(rounds[1:])  # the first one warms up
        print(f"| {num} | {form} | {rate:.0f} | {rate * num:,.0f} |")


if __name__ == "__main__":
    launch(main)
