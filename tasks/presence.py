"""Which commands on Prefect's temporary servers are alive: what a killed one cannot say itself.

Those servers keep their records in one place, and none is up all the time to miss a flow run.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout
from prefect import tags
from prefect.settings import PREFECT_HOME


@contextmanager
def presence(mark: str) -> Iterator[None]:
    """Tag the flow runs that begin inside, and hold a lock of that name beside Prefect's records.

    The system frees it when the process is gone; its file stays where the code inside raised, for
    Prefect may have missed that, too.
    """
    tag = f"process-{mark}"
    path = _folder() / f"{tag}@{socket.gethostname()}"
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path), tags(tag):
        yield
        path.unlink()


def clear_dead() -> Iterator[str]:
    """The tag of each process of this machine that is gone; what it left is removed afterwards."""
    for path in _folder().glob(f"process-*@{socket.gethostname()}"):
        with suppress(Timeout), FileLock(path, timeout=0):
            yield path.name.partition("@")[0]
            path.unlink()


def _folder() -> Path:
    return Path(PREFECT_HOME.value()) / "mnist-gan"
