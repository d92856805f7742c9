"""What went wrong in a sentence, for a user who can mend it."""

# ruff: noqa: PLC0415

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from traceback import walk_tb
from types import TracebackType

NOT_PREFECT = ("Failed to reach API", "Found incompatible versions")
"""How Prefect's client begins to say that what answers is no Prefect server, or another one."""


@contextmanager
def ended_by_a_sentence() -> Iterator[None]:
    """End a command with a sentence and an exit status of 1 where the user can mend what is wrong.

    Raises:
        SystemExit: with the sentence. Any other exception goes on.
    """
    try:
        yield
    except KeyboardInterrupt:
        sys.exit("interrupted")
    except Exception as error:
        sentence = explain(error)
        if sentence is None:
            raise
        sys.exit(f"error: {sentence}")


def say_where_imports_end(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """For `sys.excepthook`: what ends a command while it imports, before anything could catch it.

    That is Ctrl-C, or settings that Prefect refuses.
    """
    if isinstance(error, KeyboardInterrupt):
        sys.stderr.write("interrupted\n")
    elif sentence := _explain_prefects_settings(error):
        sys.stderr.write(f"error: {sentence}\n")
    else:
        sys.__excepthook__(kind, error, trace)


def _explain_prefects_settings(error: BaseException) -> str | None:
    """What Prefect refuses as it is imported: a value, a file that it cannot read, or a user whom
    the system does not know, such as any of a container's."""
    name = type(error).__name__
    if name == "RuntimeError" and "home directory" in str(error):
        return "this user has no home folder, and Prefect wants one: set HOME"
    if name == "ValidationError" and getattr(error, "title", "").endswith("Settings"):
        fault = error.errors()[0]  # type: ignore[attr-defined]
        where = "".join(f"{part}: " for part in fault["loc"])
        said = fault["msg"].removeprefix("Value error, ")
        return f"Prefect refuses its settings, PREFECT_*: {where}{said}"
    places = {frame.f_globals.get("__name__", "") for frame, _ in walk_tb(error.__traceback__)}
    unread = name in ("TOMLDecodeError", "SettingsError", "UnicodeDecodeError")
    if unread and any(place.startswith("prefect.settings") for place in places):
        files = "prefect.toml, pyproject.toml and .env here, and profiles.toml in its home"
        return f"a file of settings is broken: {error}; Prefect reads {files}"
    return None


def explain(error: BaseException) -> str | None:
    """A sentence on what the user, or whoever runs a server, can mend; None for anything else."""
    from gan.errors import UserError

    plain = isinstance(error, UserError) and "://" not in str(error)
    if sentence := str(error) if plain else _explain_prefects_settings(error):
        return sentence
    # Takes seconds to import, which a sentence without an address need not wait for.
    from httpx import HTTPError
    from mlflow import get_tracking_uri
    from mlflow.exceptions import MlflowException
    from requests import RequestException
    from sqlalchemy.exc import SQLAlchemyError

    from tasks.services import without_password
    from tasks.storage import S3_AWAY

    if isinstance(error, UserError):
        return without_password(str(error))
    if isinstance(error, HTTPError) or str(error).startswith(NOT_PREFECT):
        return _explain_prefects_server(error)
    # MLflow's clients read files from S3 by themselves.
    if isinstance(error, (MlflowException, SQLAlchemyError, RequestException, *S3_AWAY)):
        address = without_password(get_tracking_uri()).partition("?")[0]
        return without_password(f"MLflow at {address}: {error}".strip()).splitlines()[0]
    if isinstance(error, ModuleNotFoundError | ValueError):
        sentence = _explain_setting(error, get_tracking_uri())
        return sentence and without_password(sentence)
    return _explain_machine(error)


def _explain_prefects_server(error: BaseException) -> str:
    """What is wrong with the server of PREFECT_API_URL, which answered when it was asked first."""
    from prefect.settings import PREFECT_API_URL

    from tasks.services import without_password

    url = without_password(PREFECT_API_URL.value() or "")
    said = without_password(str(error)).strip() or type(error).__name__
    odd = url and not url.endswith("/api")
    hint = "; is that the address of its API, with /api?" if odd else ""
    return f"Prefect at {url or 'its temporary server'}: {said.splitlines()[0]}{hint}"


def _explain_setting(error: ModuleNotFoundError | ValueError, tracking_uri: str) -> str | None:
    """What MLflow cannot do with a variable of its own."""
    if isinstance(error, ValueError):
        return str(error) if "MLFLOW_" in str(error) else None
    kind, of_a_store, _ = tracking_uri.partition("://")
    return f"{error}, which MLflow wants for {kind}://: install it" if of_a_store else None


def _explain_machine(error: BaseException) -> str | None:
    """What the machine refused: a file, time or memory."""
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if not isinstance(error, MemoryError | RuntimeError):
        return None
    from tasks.training import is_memory_shortage

    if "ephemeral Prefect API server" in str(error):
        return "Prefect's temporary server did not start in time; is the machine overloaded?"
    full = "the memory of this machine or of its GPU is full; free some, or ask for less"
    return full if is_memory_shortage(error) else None
