"""End what a process leaves behind once it is gone, however it went, SIGKILL included.

Every process that the marked one starts, and their children, have the mark in their environment;
by that they are found. A stack has flow runs to sweep, a run with nothing else running has its
temporary Prefect server.
"""

import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil

MARK = "MNIST_GAN_SWEEP_MARK"
"""The variable that holds the mark."""
PATIENCE_S = 5
POLL_S = 0.5


def watch_over(mark: str) -> None:
    """Start the process that sweeps once this one is gone."""
    # It steps aside at once, see below, and holds nothing open that somebody may wait for.
    subprocess.run(
        [sys.executable, "-m", "tasks.sweeper", str(os.getpid()), mark],
        check=True,
        cwd=Path(__file__).parent.parent,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def wait_for_end(pid: int) -> None:
    """Return when a process is gone, or dead but not yet buried by its parent."""
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        while process.status() != psutil.STATUS_ZOMBIE:
            time.sleep(POLL_S)


def find_processes(mark: str) -> list[psutil.Process]:
    """The processes with a mark, but for this one."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark and process.pid != os.getpid():
                found.append(process)
        except psutil.Error:
            continue  # ended meanwhile, or somebody else's
    return found


def sweep(mark: str) -> None:
    """End the processes with a mark: asked first, then killed until there is none."""
    left = find_processes(mark)
    for process in left:
        with suppress(psutil.NoSuchProcess):
            process.terminate()
    psutil.wait_procs(left, timeout=PATIENCE_S)
    while left := find_processes(mark):
        for process in left:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left, timeout=PATIENCE_S)


if __name__ == "__main__":
    if os.fork():
        os._exit(0)
    wait_for_end(int(sys.argv[1]))
    sweep(sys.argv[2])
