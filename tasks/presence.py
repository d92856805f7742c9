"""Which commands on Prefect's temporary servers are alive: what a killed one cannot say itself.

Those servers keep their records in one place, and none is up all the time to miss a flow run.
"""

from __future__ import annotations

import functools
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock, Timeout
from prefect import tags
from prefect.context import TagsContext
from prefect.settings import PREFECT_HOME

T = TypeVar("T")


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


def untagged(body: Callable[..., T]) -> Callable[..., T]:
    """The body of a flow whose task runs do not take over the tags of the flow run.

    Prefect asks the server before each task with tags whether they are limited. The temporary one,
    on SQLite, often is busy then, and the client waits for two seconds before it asks again.
    """

    @functools.wraps(body)
    def without_tags(*args: Any, **kwargs: Any) -> T:
        with TagsContext():
            return body(*args, **kwargs)

    return without_tags


def clear_dead() -> Iterator[str]:
    """The tag of each process of this machine that is gone; what it left is removed afterwards."""
    for path in _folder().glob(f"process-*@{socket.gethostname()}"):
        with suppress(Timeout), FileLock(path, timeout=0):
            yield path.name.partition("@")[0]
            path.unlink()


def _folder() -> Path:
    return Path(PREFECT_HOME.value()) / "mnist-gan"
