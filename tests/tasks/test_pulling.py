"""Pulling from a real MLflow on SQLite and a real S3 store, with both of them misbehaving."""

import hashlib
import json
import os
import shutil
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from mlflow import MlflowClient

from gan.bundle import (
    CARD,
    CONFIG,
    MANIFEST,
    MAX_BYTES,
    ONNX,
    SIGNATURE,
    WEIGHTS,
    read_bundle,
    save_bundle,
    verify_bundle,
)
from gan.config import ConvConfig
from gan.networks import build_generator
from tasks import pulling
from tasks.pulling import (
    Origin,
    PullError,
    VersionError,
    cache_folder,
    collect,
    in_registry,
    in_store,
    open_store,
    place,
    pull,
)
from tasks.services import ServiceError
from tasks.storage import POINTER, StorageError
from tasks.tracking import MODEL_NAME
from tests.registry import Registry
from tests.s3_store import overwrite

pytestmark = pytest.mark.usefixtures("cache")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def published(registry: Registry, destination: str) -> str:
    """A destination with versions 1, the champion, and 2."""
    store = open_store(destination)
    for version, digest in enumerate(registry.digests, start=1):
        store.publish(read_bundle(registry.bundle(version)), version)
        if version == 1:
            store.move_pointer(store.point_to(version, digest), None)
    return destination


@pytest.fixture
def address(published: str, registry: Registry) -> str:
    """The address of version 1 in the store."""
    return f"{published}/{MODEL_NAME}/1-{registry.digests[0][:12]}"


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of all files that are fetched from the registry."""
    fetched: list[str] = []
    read = pulling._read_registered

    def count(bundle: str, name: str) -> bytes:
        payload = read(bundle, name)
        fetched.append(name)
        return payload

    monkeypatch.setattr(pulling, "_read_registered", count)
    return fetched


@pytest.mark.parametrize("version", [1, "champion"])
def test_version_is_the_same_from_registry_and_store(
    version: int | str, registry: Registry, published: str, tmp_path: Path
) -> None:
    ours = pull(version, tmp_path / "registry")
    shutil.rmtree(cache_folder())
    theirs = pull(version, tmp_path / "deep" / "store", published)
    assert contents(ours.folder) == contents(theirs.folder) == contents(registry.bundle(1))
    assert ours.origin == f"models:/{MODEL_NAME}/1"
    assert theirs.origin.startswith(f"{published}/{MODEL_NAME}/1-")
    assert (ours.version, ours.digest) == (theirs.version, theirs.digest)
    assert verify_bundle(ours.folder) == ours.digest == registry.digests[0]


def test_what_a_killed_pull_left_goes_with_a_later_one(registry: Registry, tmp_path: Path) -> None:
    killed, living, others = (tmp_path / name for name in (".[1]-killed", ".[1]-living", ".1-x"))
    for part in (killed, living, others):
        (part / "whole").mkdir(parents=True)
    for part in (killed, others):
        os.utime(part, (0, 0))
    pull(1, tmp_path / "[1]")
    assert {path.name for path in tmp_path.iterdir()} >= {"[1]", living.name, others.name}
    assert not killed.exists()


def test_bundle_that_is_there_already_is_left_as_it_is(registry: Registry, tmp_path: Path) -> None:
    pull(1, tmp_path / "to")
    before = (tmp_path / "to").stat().st_ino
    assert pull("champion", tmp_path / "to").origin == "already there"
    assert (tmp_path / "to").stat().st_ino == before


def test_another_bundle_is_replaced_and_an_empty_folder_filled(
    registry: Registry, tmp_path: Path
) -> None:
    (tmp_path / "to").mkdir()
    for version in (1, 2, 1):
        pull(version, tmp_path / "to")
        assert contents(tmp_path / "to") == contents(registry.bundle(version))
    (tmp_path / "to" / ONNX).write_bytes(b"left of another version: `gan verify` refuses it")
    pull(1, tmp_path / "to")
    assert contents(tmp_path / "to") == contents(registry.bundle(1))
    (tmp_path / "to" / WEIGHTS).write_bytes(b"damaged")
    (tmp_path / "to" / SIGNATURE).write_bytes(b"of what was there")
    pull(1, tmp_path / "to")
    assert contents(tmp_path / "to") == contents(registry.bundle(1))


def test_link_to_a_folder_stays_a_link(registry: Registry, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "to").symlink_to("real")
    pull(1, tmp_path / "to")
    assert (tmp_path / "to").is_symlink()
    assert contents(tmp_path / "real") == contents(registry.bundle(1))


@pytest.mark.parametrize(
    "made", ["notes.txt", "folder/notes.txt", MANIFEST, f"{WEIGHTS}+{MANIFEST}+notes.txt"]
)
def test_what_is_not_a_bundle_is_never_deleted(
    registry: Registry, tmp_path: Path, made: str
) -> None:
    for name in made.split("+"):
        (tmp_path / "to" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "to" / name).write_text("mine")
    with pytest.raises(PullError, match="to holds something that is not a bundle; move it"):
        pull(1, tmp_path / "to")
    assert all((tmp_path / "to" / name).read_text() == "mine" for name in made.split("+"))


def test_folder_that_the_user_is_in_is_not_replaced(
    registry: Registry, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pull(2, tmp_path / "full")
    for name in ("empty", "full"):
        (tmp_path / name).mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path / name)
        before = contents(tmp_path / name)
        for to in (Path(), tmp_path / name):
            with pytest.raises(PullError, match=r"the folder that you are in, .* from outside"):
                pull(1, to)
        assert contents(Path()) == before
        pull(1, Path("below"))
        assert contents(Path("below")) == contents(registry.bundle(1))


def test_file_in_the_way_is_left(registry: Registry, tmp_path: Path) -> None:
    (tmp_path / "to").write_text("mine")
    for to in (tmp_path / "to", tmp_path / "to" / "deeper"):
        with pytest.raises(PullError, match="Not a directory"):
            pull(1, to)
    assert (tmp_path / "to").read_text() == "mine"


def test_interrupted_pull_goes_on_where_it_ended(
    registry: Registry, counted: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    read = pulling._read_registered

    def interrupt(bundle: str, name: str) -> bytes:
        if name == WEIGHTS:
            raise KeyboardInterrupt
        return read(bundle, name)

    with monkeypatch.context() as patch:
        patch.setattr(pulling, "_read_registered", interrupt)
        with pytest.raises(KeyboardInterrupt):
            pull(1, tmp_path / "to")
    assert not (tmp_path / "to").exists()
    assert sorted(counted) == sorted([MANIFEST, CONFIG]), "in the manifest's order, weights last"
    pull(1, tmp_path / "to")
    assert len(counted) == len(set(counted)) == 4, "nothing was fetched twice"


def test_store_goes_on_with_what_the_registry_gave(
    published: str, registry: Registry, address: str, tmp_path: Path
) -> None:
    pull(1, tmp_path / "registry")
    overwrite(f"{address}/{WEIGHTS}", b"gone bad")
    pull(1, tmp_path / "store", published)
    assert contents(tmp_path / "store") == contents(registry.bundle(1))


@pytest.mark.parametrize("damage", [b"", b"damaged"])
def test_damaged_cache_is_noticed_and_fetched_anew(
    registry: Registry, cache: Path, counted: list[str], tmp_path: Path, damage: bytes
) -> None:
    pull(1, tmp_path / "first")
    for name in (WEIGHTS, MANIFEST):
        (cache / registry.digests[0] / name).write_bytes(damage)
    counted.clear()
    pull(1, tmp_path / "second")
    assert sorted(counted) == sorted([WEIGHTS, MANIFEST])
    assert contents(tmp_path / "second") == contents(registry.bundle(1))
    counted.clear()
    pull(1, tmp_path / "third")
    assert counted == []


def test_cache_that_cannot_be_kept_is_said(registry: Registry, cache: Path, tmp_path: Path) -> None:
    cache.parent.write_text("not a folder")
    with pytest.raises(PullError, match="XDG_CACHE_HOME"):
        pull(1, tmp_path / "to")


def test_pulls_at_once_to_one_folder_all_succeed(registry: Registry, tmp_path: Path) -> None:
    bundles = [collect(in_registry(version)) for version in (1, 2)]
    for _ in range(10):
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda files: place(files, tmp_path / "to"), bundles * 2))
        assert contents(tmp_path / "to") in bundles
    assert not list(tmp_path.glob(".to-*")), "no scratch folder is left"


def test_bundle_with_another_digest_than_registered_is_refused(
    registry: Registry, tmp_path: Path
) -> None:
    MlflowClient().set_model_version_tag(MODEL_NAME, "1", "bundle", registry.digests[1])
    with pytest.raises(VersionError, match="version 1 is not the bundle that was registered"):
        pull(1, tmp_path / "to")
    assert not (tmp_path / "to").exists()


@pytest.mark.parametrize("version", [3, "rival"])
def test_unknown_version_is_refused_with_those_there_are(
    version: int | str, registry: Registry, tmp_path: Path
) -> None:
    with pytest.raises(VersionError, match=rf"{version}.*; its versions: 1, 2"):
        pull(version, tmp_path / "to")


def test_store_says_what_it_has(published: str, tmp_path: Path) -> None:
    with pytest.raises(VersionError, match="has no version 3; its versions: 1, 2"):
        pull(3, tmp_path / "to", published)
    with pytest.raises(VersionError, match="alias champion, not 'challenger'"):
        pull("challenger", tmp_path / "to", published)
    with pytest.raises(VersionError, match=f"has no {POINTER}, so no champion"):
        pull("champion", tmp_path / "to", f"{published}/elsewhere")
    with pytest.raises(StorageError, match="the address of a store is"):
        pull(1, tmp_path / "to", "s3://mirrors/../other")


def test_upload_that_is_not_finished_is_no_version(
    destination: str, registry: Registry, tmp_path: Path
) -> None:
    folder = f"{destination}/{MODEL_NAME}/1-{registry.digests[0][:12]}"
    for name, payload in read_bundle(registry.bundle(1)).items():
        if name != MANIFEST:
            overwrite(f"{folder}/{name}", payload)
    with pytest.raises(VersionError, match="has no version 1; its versions: none"):
        pull(1, tmp_path / "to", destination)


def test_number_that_two_registries_published_is_refused(published: str, tmp_path: Path) -> None:
    overwrite(f"{published}/{MODEL_NAME}/1-{'0' * 12}/{MANIFEST}", b"{}")
    with pytest.raises(VersionError, match="has more than one version 1"):
        pull(1, tmp_path / "to", published)


def with_other_bundle(folder: Path) -> dict[str, bytes]:
    save_bundle(build_generator(ConvConfig(width=4)), folder)
    return read_bundle(folder)


@pytest.mark.parametrize(
    ("name", "tamper"),
    [
        (WEIGHTS, lambda payload: payload[:-1]),
        (WEIGHTS, lambda payload: payload + b"\0"),
        (WEIGHTS, lambda payload: bytes([*payload[:-1], payload[-1] ^ 1])),
        (WEIGHTS, lambda payload: b""),
        (CONFIG, lambda payload: payload.replace(b"conv", b"mlp_")),
        (CARD, lambda payload: payload + b"<script>"),
        (CARD, lambda payload: bytes(MAX_BYTES[CARD] + 1)),
        (MANIFEST, lambda payload: payload + b" "),
        (MANIFEST, lambda payload: payload[:-10]),
        (MANIFEST, lambda payload: payload.replace(CARD.encode(), b"../../card.md")),
        (MANIFEST, lambda payload: bytes(MAX_BYTES[MANIFEST] + 1)),
    ],
)
def test_tampered_object_is_refused(
    name: str,
    tamper: Callable[[bytes], bytes],
    published: str,
    registry: Registry,
    address: str,
    tmp_path: Path,
) -> None:
    overwrite(f"{address}/{name}", tamper((registry.bundle(1) / name).read_bytes()))
    for version in (1, "champion"):
        with pytest.raises((VersionError, StorageError), match=r"is another|larger than"):
            pull(version, tmp_path / "to", published)
    assert not (tmp_path / "to").exists()


def test_swapped_objects_are_refused(
    published: str, registry: Registry, address: str, tmp_path: Path
) -> None:
    overwrite(f"{address}/{WEIGHTS}", (registry.bundle(2) / WEIGHTS).read_bytes())
    with pytest.raises(VersionError, match=f"{WEIGHTS} at .* is another"):
        pull(1, tmp_path / "to", published)
    for name, payload in read_bundle(registry.bundle(2)).items():
        overwrite(f"{address}/{name}", payload)
    with pytest.raises(VersionError, match="was altered: its manifest is another"):
        pull(1, tmp_path / "to", published)
    shutil.rmtree(cache_folder())
    with pytest.raises(VersionError, match=f"{MANIFEST} at .* is another"):
        pull("champion", tmp_path / "to", published)


@pytest.mark.parametrize(
    "names", [{"../../evil": 0}, {"/etc/evil": 0}, {"evil.pkl": 0}, {MANIFEST: 0}, {"": 0}]
)
def test_hostile_manifest_of_a_consistent_version_is_refused(
    destination: str, registry: Registry, tmp_path: Path, names: dict[str, int]
) -> None:
    evil = hashlib.sha256(b"evil").hexdigest()
    manifest = json.loads((registry.bundle(1) / MANIFEST).read_bytes())
    manifest["files"] |= dict.fromkeys(names, evil)
    payload = (json.dumps(manifest, indent=2, sort_keys=True) + "\n").encode()
    digest = hashlib.sha256(payload).hexdigest()
    folder = f"{destination}/{MODEL_NAME}/9-{digest[:12]}"
    for name, content in {**read_bundle(registry.bundle(1)), MANIFEST: payload}.items():
        overwrite(f"{folder}/{name}", content)
    with pytest.raises(VersionError, match=f"is refused: {MANIFEST} names"):
        pull(9, tmp_path / "to", destination)
    assert [path.name for path in tmp_path.rglob("*evil*")] == []


def test_champion_of_a_copied_store_comes_from_the_copy(
    published: str, registry: Registry, address: str, tmp_path: Path
) -> None:
    copy = f"{published}-copy"
    for name, payload in read_bundle(registry.bundle(1)).items():
        overwrite(address.replace(published, copy) + f"/{name}", payload)
    pointer, _ = open_store(published).read_pointer()
    assert pointer
    overwrite(
        f"{copy}/{MODEL_NAME}/{POINTER}",
        json.dumps({"version": 1, "digest": pointer.digest, "address": address}).encode(),
    )
    assert pull("champion", tmp_path / "to", copy).origin.startswith(copy)


def test_bundle_that_cannot_draw_never_appears(registry: Registry, tmp_path: Path) -> None:
    files = collect(in_registry(1))
    config = files[CONFIG].replace(b'"schema_version": 4', b'"schema_version": 5')
    manifest = json.loads(files[MANIFEST])
    manifest["files"][CONFIG] = hashlib.sha256(config).hexdigest()
    payload = (json.dumps(manifest, indent=2, sort_keys=True) + "\n").encode()
    with pytest.raises(VersionError, match=r"cannot be used here: .* schema 5"):
        place({**files, CONFIG: config, MANIFEST: payload}, tmp_path / "to")
    assert list(tmp_path.glob("*to*")) == []


def test_file_of_the_registry_larger_than_allowed_is_not_fetched(
    registry: Registry, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(MAX_BYTES, CARD, 1)
    monkeypatch.delattr("mlflow.artifacts.download_artifacts")
    with pytest.raises(VersionError, match=f"{CARD} is larger than 1 bytes"):
        in_registry(1).read(CARD)


@pytest.mark.usefixtures("registry")
def test_registry_that_is_away_is_not_said_to_have_lost_the_version(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    origin = in_registry(1)
    with socket.create_server(("127.0.0.1", 0)) as server:
        nobody = f"http://127.0.0.1:{server.getsockname()[1]}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", nobody)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(ServiceError, match=f"MLflow does not answer at {nobody}/health"):
        origin.read(MANIFEST)


def test_nothing_is_kept_of_what_is_refused(
    registry: Registry, published: str, cache: Path, tmp_path: Path
) -> None:
    origin = replace(in_store(1, published), read=lambda name: b"swapped")
    assert isinstance(origin, Origin)
    with pytest.raises(VersionError, match="is another"):
        collect(origin, cache)
    assert not cache.exists()
