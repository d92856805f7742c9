"""Steps on registered versions, with a real MLflow on SQLite and a real S3 store."""

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

import pytest
from mlflow import MlflowClient
from prefect.logging import disable_run_logger

from gan.bundle import WEIGHTS, bundle_digest, save_bundle
from gan.config import ConvConfig
from gan.networks import build_generator
from tasks import versions
from tasks.pulling import VersionError, find_version, open_store
from tasks.storage import Pointer, StorageError, Store
from tasks.tracking import MODEL_NAME
from tasks.versions import (
    check_destination,
    fetch_version,
    point_to_champion,
    publish_generator,
)
from tests.registry import Registry


def crown(version: int) -> None:
    MlflowClient().set_registered_model_alias(MODEL_NAME, "champion", str(version))


@pytest.mark.parametrize(("name", "number"), [(1, 1), (2, 2), ("champion", 1), ("challenger", 2)])
def test_version_is_fetched_by_number_or_alias(
    registry: Registry, tmp_path: Path, name: int | str, number: int
) -> None:
    fetched = fetch_version.fn(name, tmp_path)
    assert fetched.version == number
    assert fetched.recipe == "known"
    assert fetched.bundle.is_relative_to(tmp_path)
    assert bundle_digest(fetched.bundle) == registry.digests[number - 1]


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize("name", [3, "rival"])
def test_unknown_version_is_named_with_those_there_are(name: int | str) -> None:
    with pytest.raises(VersionError, match=rf"{name}.*; its versions: 1, 2"):
        find_version(MlflowClient(), name)


@pytest.mark.usefixtures("registry")
def test_bundle_that_was_exchanged_is_refused(tmp_path: Path) -> None:
    MlflowClient().set_model_version_tag(MODEL_NAME, "2", "bundle", "sha256:other")
    with pytest.raises(VersionError, match="version 2 is not the bundle that was registered"):
        fetch_version.fn(2, tmp_path)
    assert not (tmp_path / "bundle").exists()


@pytest.mark.usefixtures("registry")
def test_version_whose_files_are_gone_is_refused_though_they_were_fetched_before(
    tmp_path: Path,
) -> None:
    fetch_version.fn(1, tmp_path)
    stored = stored_bundle(1)
    (stored / WEIGHTS).rename(stored / "aside")
    try:
        with pytest.raises(VersionError, match=f"has no {WEIGHTS} any more"):
            fetch_version.fn(1, tmp_path)
    finally:
        (stored / "aside").rename(stored / WEIGHTS)


def stored_bundle(version: int) -> Path:
    """Where the registry of these tests keeps a version's bundle."""
    uri = MlflowClient().get_model_version_download_uri(MODEL_NAME, str(version))
    return Path(uri) / "artifacts" / "bundle"


def test_published_version_is_tagged_with_its_address_and_may_be_published_again(
    registry: Registry, destination: str
) -> None:
    address = publish_generator.fn(registry.bundle(2), 2, destination)
    assert address == f"{destination}/{MODEL_NAME}/2-{registry.digests[1][:12]}"
    assert MlflowClient().get_model_version(MODEL_NAME, "2").tags["s3"] == address
    assert publish_generator.fn(registry.bundle(2), 2, f"{destination}/") == address


def test_another_bundle_than_was_registered_is_not_published(
    registry: Registry, destination: str, tmp_path: Path
) -> None:
    save_bundle(build_generator(ConvConfig(width=1)), tmp_path / "bundle")
    with pytest.raises(VersionError, match="not the bundle that was registered as version 1"):
        publish_generator.fn(tmp_path / "bundle", 1, destination)
    assert Store(f"{destination}/{MODEL_NAME}").list_versions() == []


@pytest.mark.usefixtures("s3_keys")
def test_version_that_cannot_be_published_stays_registered_and_is_told_so(
    registry: Registry,
) -> None:
    with pytest.raises(StorageError, match=r"no such bucket.*version 1 stays registered"):
        publish_generator.fn(registry.bundle(1), 1, "s3://missing/prefix")
    assert "s3" not in MlflowClient().get_model_version(MODEL_NAME, "1").tags


def test_pointer_follows_the_champion(registry: Registry, destination: str) -> None:
    store = Store(f"{destination}/{MODEL_NAME}")
    addresses = [publish_generator.fn(registry.bundle(each), each, destination) for each in (1, 2)]
    for version in (1, 2, 2, 1):
        crown(version)
        assert point_to_champion.fn(destination) == addresses[version - 1]
        pointer, _ = store.read_pointer()
        assert pointer == store.point_to(version, registry.digests[version - 1])


def test_pointer_never_names_a_champion_that_is_not_there_whole(
    registry: Registry, destination: str
) -> None:
    store = Store(f"{destination}/{MODEL_NAME}")
    publish_generator.fn(registry.bundle(1), 1, destination)
    point_to_champion.fn(destination)
    crown(2)
    with disable_run_logger():
        assert point_to_champion.fn(destination) is None
        MlflowClient().delete_model_version(MODEL_NAME, "2")  # and with it, the alias
        assert point_to_champion.fn(destination) is None
    pointer, _ = store.read_pointer()
    assert pointer == store.point_to(1, registry.digests[0])


@pytest.fixture
def both(registry: Registry, destination: str) -> str:
    """A destination to which both versions were published."""
    for version in (1, 2):
        publish_generator.fn(registry.bundle(version), version, destination)
    return destination


def points_to(destination: str) -> int | None:
    pointer, _ = Store(f"{destination}/{MODEL_NAME}").read_pointer()
    return pointer.version if pointer else None


def test_mover_who_is_overtaken_looks_again(both: str, monkeypatch: pytest.MonkeyPatch) -> None:
    move, moved = Store.move_pointer, []

    def let_another_in_first(self: Store, pointer: Pointer, tag: str | None) -> None:
        moved.append(pointer.version)
        if len(moved) == 1:
            crown(2)
            point_to_champion.fn(both)
        move(self, pointer, tag)

    monkeypatch.setattr(Store, "move_pointer", let_another_in_first)
    point_to_champion.fn(both)
    assert moved == [1, 2], "the first one's move came too late, and it saw that"
    assert points_to(both) == 2


def test_pointers_moved_at_once_end_at_the_champion(
    both: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    move, rng = Store.move_pointer, Random(0)
    store = open_store(both)  # making one takes longer than the race

    def move_late(self: Store, pointer: Pointer, tag: str | None) -> None:
        time.sleep(rng.uniform(0, 0.05))
        move(self, pointer, tag)

    def promote(version: int) -> None:
        time.sleep(rng.uniform(0, 0.05))
        crown(version)
        point_to_champion.fn(both)

    monkeypatch.setattr(Store, "move_pointer", move_late)
    monkeypatch.setattr(versions, "open_store", lambda destination: store)
    for _ in range(20):
        with ThreadPoolExecutor() as pool:
            list(pool.map(promote, (1, 2)))
        assert points_to(both) == int(find_version(MlflowClient(), "champion").version)


def test_destination_is_checked(destination: str) -> None:
    check_destination.fn(destination)
    with pytest.raises(StorageError, match="there is no such bucket"):
        check_destination.fn("s3://missing/prefix")
