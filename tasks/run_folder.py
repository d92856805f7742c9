"""A run's folder on disk: found again where a training is resumed, and one process's at a time."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout
from prefect.runtime import flow_run

from gan.checkpoint import Checkpoints, find_config, plain
from gan.config import TrainConfig
from gan.errors import UserError

MOMENT_S = 2.0
"""How long somebody who only looks whether a folder is held may hold it."""
SCRATCH = ".tmp"
"""Where in a run's folder its temporary files lie."""


class RunFolderError(UserError):
    """There is no folder to run in, or none to resume."""


@contextmanager
def own_run_folder(runs_dir: Path, config: TrainConfig, *, resume: bool) -> Iterator[Path]:
    """The folder of this flow run or, to resume, of the last interrupted training of this config.

    A flow run that is retried has the folder it had.

    Raises:
        RunFolderError: nothing to resume, another process trains in it, or the disk refuses.
    """
    folder = find_interrupted(runs_dir, config) if resume else runs_dir / str(flow_run.get_id())
    with own_folder(folder, "training"):
        yield folder


@contextmanager
def own_folder(folder: Path, work: str) -> Iterator[None]:
    """Hold a folder, and have all that is temporary lie in it: in this process and in those that it
    starts. What a killed one leaves there goes with the next start, or once its run is ended.

    Raises:
        RunFolderError: another process is there, or the disk refuses, now or while it is held.
    """
    with hold(folder, work, MOMENT_S), _full_disk_explained(folder):
        scratch = folder.absolute() / SCRATCH
        shutil.rmtree(scratch, ignore_errors=True)
        make_folder(scratch)
        before, elsewhere = os.environ.get("TMPDIR"), tempfile.tempdir
        tempfile.tempdir = os.environ["TMPDIR"] = str(scratch)
        try:
            yield
        finally:
            tempfile.tempdir = elsewhere
            del os.environ["TMPDIR"]
            if before is not None:
                os.environ["TMPDIR"] = before
            shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def _full_disk_explained(folder: Path) -> Iterator[None]:
    """Say where the disk is full: whoever writes to a file that is open is not told its name."""
    try:
        yield
    except OSError as error:
        if error.filename or error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise RunFolderError(f"cannot write to {folder}: the disk is full") from error


@contextmanager
def hold(folder: Path, work: str, patience_s: float = 0) -> Iterator[None]:
    """Make a folder and keep other processes out of it; `work` says what they would be doing.

    Raises:
        RunFolderError: one is there and went on longer than `patience_s`, or the disk refuses.
    """
    lock = lock_of(make_folder(folder))
    try:
        held = lock.acquire(timeout=patience_s, poll_interval=0.5)
    except Timeout:
        raise RunFolderError(f"another process is {work} in {folder}") from None
    except OSError as error:
        raise RunFolderError(f"cannot write to {folder}: {error.strerror}") from None
    with held:
        yield


def finish(folder: Path) -> None:
    """Remove what only a training that goes on would need, and what one that was killed left."""
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    # Further down, too: a bundle is put together beside the place where it comes to lie.
    for left in list(folder.rglob(".*")):
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def make_folder(folder: Path) -> Path:
    """Make a folder and those above it, if they are not there, and see that it can be written to.

    Raises:
        RunFolderError: the disk refuses; says which folder and why.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise RunFolderError(f"cannot write to the folder {folder}: {error.strerror}") from None
    return folder


def lock_of(folder: Path) -> FileLock:
    """The lock that a process holds as long as it trains in a folder; the system frees it when the
    process is gone."""
    return FileLock(folder / ".lock", timeout=0)


def clear_scratch(folder: Path) -> None:
    """Remove what a process that is gone had lying about in its folder."""
    if (folder / SCRATCH).exists():
        with suppress(Timeout), lock_of(folder):
            shutil.rmtree(folder / SCRATCH, ignore_errors=True)


def is_abandoned(folder: Path) -> bool:
    """Whether a training began in this folder, on this machine, and its process is gone."""
    return (folder / ".lock").exists() and not is_held(folder)


def is_held(folder: Path) -> bool:
    """Whether a process on this machine works in this folder."""
    if not (folder / ".lock").exists():
        return False
    try:
        with lock_of(folder):
            return False
    except Timeout:
        return True


def find_interrupted(runs_dir: Path, config: TrainConfig) -> Path:
    """The folder whose last checkpoint is the newest of all that belong to a config.

    Raises:
        RunFolderError: there is none.
    """
    wanted = json.loads(json.dumps(plain(config)))
    found = [
        checkpoints[0]
        for folder in runs_dir.glob("*/checkpoints")
        if find_config(folder) == wanted and (checkpoints := Checkpoints(folder).find())
    ]
    if not found:
        raise RunFolderError(
            f"no interrupted training with these parameters (seed {config.seed} among them) "
            f"is in {runs_dir}: nothing to resume"
        )
    return max(found, key=lambda path: path.stat().st_mtime).parent.parent
