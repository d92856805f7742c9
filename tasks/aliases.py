"""Moving the aliases `champion` and `previous`: one process at a time, to whole versions alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from filelock import FileLock
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from prefect.concurrency.sync import concurrency
from prefect.settings import PREFECT_API_URL

from gan.errors import UserError
from tasks.pulling import VersionError
from tasks.services import check
from tasks.settings import load_settings
from tasks.tracking import MODEL_NAME
from tasks.versions import fetch_version

PROMOTION = "promotion"
"""Name of the global concurrency limit whose one slot is held while aliases move."""
PATIENCE_S = 120.0
"""How long to wait for another process that moves them, which takes seconds."""
LEASE_S = 60.0
"""After this time the slot of a killed process is free; Prefect allows no less."""


class AliasError(UserError):
    """Aliases that cannot be moved."""


@dataclass(frozen=True, kw_only=True)
class Rollback:
    """Which version is champion again, and which one no longer is."""

    champion: int
    previous: int | None


def move_champion(version: int, champion: int | None) -> bool:
    """Make a version champion and the former one previous, unless another than `champion` is.

    Gives whether it did.

    Raises:
        VersionError: the version's files are gone or altered.
        AliasError: others held the aliases for too long.
        ServiceError: the Prefect server, if one is set, does not answer.
    """
    with _one_at_a_time():
        return _hand_over(MlflowClient(), version, champion)


def roll_back() -> Rollback:
    """Make the previous champion champion again; the present one becomes previous.

    Raises:
        AliasError: there is none, or others held the aliases for too long.
        VersionError: its files are gone or altered.
        ServiceError: the Prefect server, if one is set, does not answer.
    """
    client = MlflowClient()
    _find_previous(client)  # before a lock is made where there is nothing to lock
    with _one_at_a_time():
        version, champion = _find_previous(client)
        if not _hand_over(client, version, champion):
            raise AliasError("the champion changed meanwhile; look at it, and roll back again")
    said = {version: ("promoted", f"it is returned to, after version {champion}")}
    if champion is not None:
        said[champion] = ("rolled back", f"version {version} is returned to")
    for number, (promotion, reason) in said.items():
        client.set_model_version_tag(MODEL_NAME, str(number), "promotion", promotion)
        client.set_model_version_tag(MODEL_NAME, str(number), "promotion_reason", reason)
    return Rollback(champion=version, previous=champion)


def _find_previous(client: MlflowClient) -> tuple[int, int | None]:
    """The version to return to, and the champion, if there is one."""
    holders = find_holders(client)
    previous, champion = holders.get("previous"), holders.get("champion")
    if previous is None or previous == champion:
        raise AliasError(f"{MODEL_NAME} has no former champion to return to")
    return previous, champion


def _hand_over(client: MlflowClient, version: int, champion: int | None) -> bool:
    """Move the aliases from `champion`, unless another is by now.

    Both are fetched from the registry before: no alias comes to a version that is not whole.
    """
    with TemporaryDirectory() as scratch:
        fetch_version.fn(version, Path(scratch))
    keeps_name = champion is not None and _is_whole(champion)
    # MLflow moves an alias without conditions, so nothing else may come between here and there.
    holders = find_holders(client)
    if holders.get("champion") != champion:
        return False
    # A process that dies between two aliases leaves two names for one good version. Which one moves
    # first hangs on who has no other name: the champion that gives way, or the one returned to.
    returns = holders.get("previous") == version
    if returns:
        client.set_registered_model_alias(MODEL_NAME, "champion", str(version))
    if keeps_name:
        client.set_registered_model_alias(MODEL_NAME, "previous", str(champion))
    elif returns:
        client.delete_registered_model_alias(MODEL_NAME, "previous")
    if not returns:
        client.set_registered_model_alias(MODEL_NAME, "champion", str(version))
    drop_challenger(client, version)
    return True


def drop_challenger(client: MlflowClient, version: int) -> None:
    """Take the alias `challenger` from a version that is champion."""
    if find_holders(client).get("challenger") == version:
        client.delete_registered_model_alias(MODEL_NAME, "challenger")


def _is_whole(version: int) -> bool:
    try:
        with TemporaryDirectory() as scratch:
            fetch_version.fn(version, Path(scratch))
    except VersionError:
        return False
    return True


def find_holders(client: MlflowClient) -> dict[str, int]:
    """Which version has which alias; nothing where nothing is registered."""
    try:
        aliases = client.get_registered_model(MODEL_NAME).aliases
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return {}
    return {alias: int(version) for alias, version in aliases.items()}


@contextmanager
def _one_at_a_time() -> Iterator[None]:
    """Keep others from moving aliases: on this machine, and wherever the same Prefect server is."""
    runs_dir = load_settings().runs_dir
    runs_dir.mkdir(parents=True, exist_ok=True)
    server = PREFECT_API_URL.value()
    if server:
        check("Prefect", f"{server}/health")
    with ExitStack() as held:
        try:
            held.enter_context(FileLock(runs_dir / ".promotion.lock", timeout=PATIENCE_S))
            held.enter_context(
                concurrency(
                    [PROMOTION] if server else [],
                    timeout_seconds=PATIENCE_S,
                    lease_duration=LEASE_S,
                )
            )
        except TimeoutError:
            raise AliasError(
                f"others have been moving aliases for more than {PATIENCE_S:.0f} s; try again later"
            ) from None
        yield
