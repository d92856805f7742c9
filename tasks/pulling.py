"""Getting a version's files, from the registry or an S3 store: whole, verified, or not at all."""

from __future__ import annotations

import glob
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath

import mlflow
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from gan.bundle import (
    MANIFEST,
    MAX_BYTES,
    BundleError,
    holds_bundle,
    parse_manifest,
    verify_bundle,
)
from gan.errors import UserError
from tasks.services import ServiceError, find_silent_service
from tasks.storage import POINTER, Store, check_address
from tasks.tracking import MODEL_NAME

MAX_MOVES = 10
"""How often a bundle is moved to a folder that other processes write at the same time."""
LONGEST_PULL_S = 3600
"""How long a pull may take to write a bundle that it has fetched."""


class VersionError(UserError):
    """There is no such version, or its files are not what was registered."""


class PullError(UserError):
    """A folder that cannot be written, or that holds something else."""


@dataclass(frozen=True, kw_only=True)
class Pulled:
    """A version's bundle in a folder."""

    version: int
    digest: str
    """The bundle's sha256."""
    folder: Path
    origin: str
    """Where it came from: `models:/...`, `s3://...`, or `already there`."""


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where a version's files are had, one by one and unchecked."""

    version: int
    digest: str
    """The digest that the bundle must have."""
    address: str
    read: Callable[[str], bytes]
    """A file of the bundle by its name, which is one of `MAX_BYTES`; refuses what is larger."""


def pull(version: int | str, to: Path, source: str | None = None) -> Pulled:
    """Have a version's bundle in the folder `to`, which is whole or absent at any time.

    A bundle that is there already is replaced, or left as it is if it is this one. Files that were
    fetched before, also by an interrupted pull, come from the cache, where each is checked again.

    Args:
        version: a number or an alias. An S3 store knows the alias champion alone.
        to: the folder, made if need be.
        source: `s3://bucket/prefix` that versions were published to; None for MLflow's registry.

    Raises:
        VersionError: there is no such version, or its files are not what was registered.
        StorageError: the S3 store does not answer as it should.
        PullError: `to` holds something that is not a bundle, this process is in it, or the disk
            refuses.
    """
    _refuse_to_replace(to)
    origin = in_registry(version) if source is None else in_store(version, source)
    if _holds(to, origin.digest):
        address = "already there"
    else:
        place(collect(origin, cache_folder()), to)
        address = origin.address
    return Pulled(version=origin.version, digest=origin.digest, folder=to, origin=address)


def cache_folder() -> Path:
    """Where fetched files are kept, a folder a bundle; it may be deleted at any time."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(home) if Path(home).is_absolute() else Path.home() / ".cache") / "mnist-gan"


def find_version(client: MlflowClient, version: int | str) -> ModelVersion:
    """A version in the registry by number or alias.

    Raises:
        VersionError: there is none; says which there are.
    """
    try:
        if isinstance(version, str):
            version = client.get_model_version_by_alias(MODEL_NAME, version).version
        return client.get_model_version(MODEL_NAME, str(version))
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        known = client.search_model_versions(f"name = '{MODEL_NAME}'")
        numbers = ", ".join(map(str, sorted(int(each.version) for each in known))) or "none"
        raise VersionError(
            f"{MODEL_NAME} has no version or alias {version!r}; its versions: {numbers}"
        ) from None


def in_registry(version: int | str) -> Origin:
    """A version in MLflow's registry."""
    found = find_version(MlflowClient(), version)
    address = f"models:/{MODEL_NAME}/{found.version}"
    return Origin(
        version=int(found.version),
        digest=found.tags.get("bundle", ""),
        address=address,
        read=partial(_read_registered, f"{address}/artifacts/bundle"),
    )


def _read_registered(bundle: str, name: str) -> bytes:
    try:
        listed = mlflow.artifacts.list_artifacts(artifact_uri=bundle)
        sizes = {PurePosixPath(each.path).name: each.file_size for each in listed}
        size = sizes.get(name)
        if size is None:
            raise VersionError(f"{bundle} has no {name} any more")
        if size > MAX_BYTES[name]:
            raise VersionError(f"{bundle}/{name} is larger than {MAX_BYTES[name]} bytes")
        with tempfile.TemporaryDirectory() as scratch:
            path = mlflow.artifacts.download_artifacts(f"{bundle}/{name}", dst_path=scratch)
            return Path(path).read_bytes()
    except VersionError:
        raise
    except Exception as error:  # what is raised depends on where MLflow keeps its artifacts
        if away := find_silent_service():
            raise ServiceError(away) from error
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise VersionError(f"{bundle}/{name} cannot be fetched: {reason}") from error


def open_store(destination: str) -> Store:
    """Where the generator's versions lie below `s3://bucket/prefix`."""
    return Store(f"{check_address(destination)}/{MODEL_NAME}")


def in_store(version: int | str, source: str) -> Origin:
    """A version that was published to an S3 store."""
    store = open_store(source)
    if isinstance(version, int):
        folder = _find_folder(store, version)
        manifest = store.read(f"{folder}/{MANIFEST}", MAX_BYTES[MANIFEST])
        pointer = store.point_to(version, hashlib.sha256(manifest).hexdigest())
        if pointer.folder != folder:
            raise VersionError(f"{store.address}/{folder} was altered: its manifest is another")
    elif version == "champion":
        pointed, _ = store.read_pointer()
        if pointed is None:
            raise VersionError(f"{store.address} has no {POINTER}, so no champion")
        pointer = store.point_to(pointed.version, pointed.digest)
    else:
        raise VersionError(f"an S3 store knows numbers and the alias champion, not {version!r}")
    return Origin(
        version=pointer.version,
        digest=pointer.digest,
        address=pointer.address,
        read=lambda name: store.read(f"{pointer.folder}/{name}", MAX_BYTES[name]),
    )


def _find_folder(store: Store, version: int) -> str:
    match store.list_versions(version):
        case [folder]:
            return folder
        case []:
            numbers = sorted({int(each.partition("-")[0]) for each in store.list_versions()})
            known = ", ".join(map(str, numbers)) or "none"
            raise VersionError(f"{store.address} has no version {version}; its versions: {known}")
        case several:
            raise VersionError(
                f"{store.address} has more than one version {version} ({', '.join(several)}); "
                "delete those that are not yours"
            )


def collect(origin: Origin, cache: Path | None = None) -> dict[str, bytes]:
    """All files of a version, each with the digest that it must have; the manifest comes last.

    Args:
        origin: where to have them.
        cache: a folder to look for them first, and to keep them in; None to fetch them all.

    Raises:
        VersionError: a file is missing or not what was registered.
        PullError: the cache cannot be written.
    """
    kept = cache / origin.digest if cache else None
    manifest = _obtain(origin, MANIFEST, origin.digest, kept)
    try:
        digests = parse_manifest(manifest)
    except BundleError as error:
        raise VersionError(f"{origin.address} is refused: {error}") from None
    files = {name: _obtain(origin, name, digest, kept) for name, digest in digests.items()}
    return {**files, MANIFEST: manifest}


def _obtain(origin: Origin, name: str, digest: str, kept: Path | None) -> bytes:
    if kept:
        with suppress(OSError):
            payload = (kept / name).read_bytes()
            if hashlib.sha256(payload).hexdigest() == digest:
                return payload
    payload = origin.read(name)
    if hashlib.sha256(payload).hexdigest() != digest:
        raise VersionError(
            f"version {origin.version} is not the bundle that was registered: "
            f"{name} at {origin.address} is another"
        )
    if kept:
        try:
            # Not atomic, as it is checked whenever it is read.
            kept.mkdir(parents=True, exist_ok=True)
            (kept / name).write_bytes(payload)
        except OSError as error:
            raise PullError(
                f"cannot keep files in {kept.parent}: {error.strerror}; make room there, or set "
                "XDG_CACHE_HOME to another folder"
            ) from None
    return payload


def place(files: Mapping[str, bytes], folder: Path) -> None:
    """Have a bundle of these files in `folder`: it is tried first, then appears in one move.

    Raises:
        VersionError: these files are no bundle that this code can use.
        PullError: the folder holds something that is not a bundle, this process is in it, or the
            disk refuses.
    """
    _refuse_to_replace(folder)
    target = folder.resolve()
    digest = hashlib.sha256(files[MANIFEST]).hexdigest()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _clear_parts(target)
        with tempfile.TemporaryDirectory(
            dir=target.parent, prefix=f".{target.name}-", ignore_cleanup_errors=True
        ) as scratch:
            whole = Path(scratch) / "whole"
            whole.mkdir()
            for name, payload in files.items():
                (whole / name).write_bytes(payload)
            verify_bundle(whole)
            _move(whole, target, digest)
    except BundleError as error:
        raise VersionError(f"this version cannot be used here: {error}") from None
    except OSError as error:
        raise PullError(f"cannot write {folder}: {error.strerror}") from None


def _clear_parts(target: Path) -> None:
    """Remove what killed pulls left beside a folder; living ones are done within seconds."""
    long_ago = time.time() - LONGEST_PULL_S
    for part in target.parent.glob(f".{glob.escape(target.name)}-*"):
        with suppress(FileNotFoundError):  # another may remove it as well
            if part.stat().st_mtime < long_ago:
                shutil.rmtree(part, ignore_errors=True)


def _move(whole: Path, target: Path, digest: str) -> None:
    """Move a bundle to `target`, what was there aside: also where others do the same at once."""
    for attempt in range(MAX_MOVES):
        if _holds(target, digest):
            return
        if (target / MANIFEST).is_file():
            with suppress(FileNotFoundError):
                target.rename(whole.with_name(f"replaced-{attempt}"))
        with suppress(OSError) if attempt < MAX_MOVES - 1 else nullcontext():
            whole.rename(target)
            return


def _refuse_to_replace(folder: Path) -> None:
    """See that there is nothing at `folder`, or nothing in it, or a bundle and no more.

    The folder that this process is in is refused, too: its user would be left in a deleted one.
    """
    try:
        theirs = any(folder.iterdir()) and not holds_bundle(folder)
        here = folder.samefile(".")
    except FileNotFoundError:
        return
    except OSError as error:
        raise PullError(f"{folder} is no folder to pull to: {error.strerror}") from None
    if theirs:
        raise PullError(
            f"{folder} holds something that is not a bundle; move it, or pull to another folder"
        )
    if here:
        raise PullError(
            f"{folder} is the folder that you are in, and it is replaced in one move: "
            "pull to it from outside"
        )


def _holds(folder: Path, digest: str) -> bool:
    try:
        return verify_bundle(folder) == digest
    except (BundleError, OSError):  # others may move it away meanwhile
        return False
