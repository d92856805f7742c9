"""Steps on registered versions: fetching one, publishing it, and reporting on it."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from mlflow import MlflowClient
from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE

from gan.bundle import bundle_digest, read_bundle
from tasks.pulling import VersionError, collect, find_version, in_registry, open_store, place
from tasks.storage import StorageError
from tasks.tracking import MODEL_NAME, open_run

MAX_MOVES = 10
"""How often a moved pointer is looked at again before giving up."""


@dataclass(frozen=True, kw_only=True)
class FetchedVersion:
    """A registered version with its bundle on this machine's disk."""

    version: int
    bundle: Path
    recipe: str


@task(name="fetch version", cache_policy=NO_CACHE)
def fetch_version(version: int | str, folder: Path) -> FetchedVersion:
    """Fetch the bundle of a version, given by number or alias, to `folder/bundle`.

    Nothing comes from a cache: what is judged or promoted is what lies in the registry now.

    Raises:
        VersionError: there is none, or its files are gone or not what was registered.
    """
    origin = in_registry(version)
    place(collect(origin), folder / "bundle")
    tags = MlflowClient().get_model_version(MODEL_NAME, str(origin.version)).tags
    return FetchedVersion(
        version=origin.version, bundle=folder / "bundle", recipe=tags.get("recipe", "")
    )


@task(name="check destination", cache_policy=NO_CACHE)
def check_destination(destination: str) -> None:
    """See that a generator could be published to `s3://bucket/prefix`; writes nothing.

    Raises:
        StorageError: no such bucket, wrong keys, no store; says which, where, and the way out.
    """
    open_store(destination).check()


@task(name="publish", cache_policy=NO_CACHE)
def publish_generator(bundle: Path, version: int, destination: str) -> str:
    """Publish a registered version's bundle to an S3 store; gives its address there.

    Publishing again finishes what was interrupted. The version's tag `s3` says the address.

    Args:
        bundle: the folder of the bundle.
        version: the number under which it is registered.
        destination: `s3://bucket/prefix`; it comes to lie in a folder of its own below.

    Raises:
        VersionError: the bundle is another than was registered.
        StorageError: the store does not take it; the version stays registered all the same.
    """
    client = MlflowClient()
    if bundle_digest(bundle) != find_version(client, version).tags.get("bundle"):
        raise VersionError(f"{bundle} is not the bundle that was registered as version {version}")
    try:
        address = open_store(destination).publish(read_bundle(bundle), version)
    except StorageError as error:
        raise StorageError(
            f"{error}; version {version} stays registered, and publish-generator publishes it later"
        ) from None
    client.set_model_version_tag(MODEL_NAME, str(version), "s3", address)
    return address


@task(name="point to champion", cache_policy=NO_CACHE)
def point_to_champion(destination: str) -> str | None:
    """Have the store's `champion.json` name the registry's champion; gives its address there.

    If there is no champion, or it was not published there, the pointer stays where it is: None. Of
    two who move it at once, the later one looks at the registry again.

    Raises:
        StorageError: the store does not answer as it should.
    """
    client, store = MlflowClient(), open_store(destination)
    for _ in range(MAX_MOVES):
        # In this order: a champion that changes after it was read is seen at the next look.
        pointer, tag = store.read_pointer()
        try:
            champion = find_version(client, "champion")
        except VersionError:
            get_run_logger().warning("there is no champion: the pointer of %s stays", store.address)
            return None
        wanted = store.point_to(int(champion.version), champion.tags.get("bundle", ""))
        if pointer == wanted:
            return wanted.address
        if not store.holds(wanted):
            get_run_logger().warning(
                "champion version %s is not in %s: its pointer stays; flow publish-generator "
                "publishes it",
                champion.version,
                store.address,
            )
            return None
        store.move_pointer(wanted, tag)
    raise StorageError(f"others keep moving the champion of {store.address}; run this again")


def evaluation_run(version: FetchedVersion, folder: Path) -> AbstractContextManager[str]:
    """Keep an MLflow run open for scores of a version; gives its id. See `open_run`."""
    return open_run(
        f"version {version.version}, scored again",
        parameters={},
        tags={"recipe": version.recipe, "model_version": str(version.version)},
        folder=folder,
        way_out="score the version again when it does",
    )
