"""End what is left of a stack after it is gone, however it went, SIGKILL included.

Every process of a stack, its flow runs and their children among them, has the stack's id in its
environment; by that they are found.
"""

import sys

import psutil

PATIENCE_S = 5


def wait_for_end(pid: int) -> None:
    """Return when a process is gone."""
    try:
        psutil.Process(pid).wait()
    except psutil.NoSuchProcess:
        return


def find_processes(stack_id: str) -> list[psutil.Process]:
    """The processes of a stack."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("STACK_ID") == stack_id:
                found.append(process)
        except psutil.Error:
            continue  # ended meanwhile, or somebody else's
    return found


def sweep(stack_id: str) -> None:
    """End the processes of a stack: asked first, then killed until there is none."""
    left = find_processes(stack_id)
    for process in left:
        process.terminate()
    psutil.wait_procs(left, timeout=PATIENCE_S)
    while left := find_processes(stack_id):
        for process in left:
            process.kill()
        psutil.wait_procs(left, timeout=PATIENCE_S)


if __name__ == "__main__":
    wait_for_end(int(sys.argv[1]))
    sweep(sys.argv[2])
