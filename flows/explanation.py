"""What went wrong in a sentence, for a user who can mend it."""

# ruff: noqa: PLC0415

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType


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

    That is Ctrl-C, or a setting that Prefect refuses.
    """
    sentence = "interrupted" if isinstance(error, KeyboardInterrupt) else None
    if kind.__name__ == "ValidationError" and getattr(error, "title", "").endswith("Settings"):
        fault = error.errors()[0]  # type: ignore[attr-defined]
        where = "".join(f"{part}: " for part in fault["loc"])
        said = fault["msg"].removeprefix("Value error, ")
        sentence = f"error: Prefect refuses its settings, PREFECT_*: {where}{said}"
    if sentence:
        sys.stderr.write(f"{sentence}\n")
    else:
        sys.__excepthook__(kind, error, trace)


def explain(error: BaseException) -> str | None:
    """A sentence on what the user, or whoever runs a server, can mend; None for anything else."""
    from gan.errors import UserError

    if isinstance(error, UserError) and "://" not in str(error):
        return str(error)
    # Takes seconds to import, which a sentence without an address need not wait for.
    from mlflow import get_tracking_uri
    from mlflow.exceptions import MlflowException
    from requests import RequestException
    from sqlalchemy.exc import SQLAlchemyError

    from tasks.services import without_password

    if isinstance(error, UserError):
        return without_password(str(error))
    if isinstance(error, MlflowException | SQLAlchemyError | RequestException):
        address = get_tracking_uri().partition("?")[0]
        return without_password(f"MLflow at {address}: {error}".strip()).splitlines()[0]
    if isinstance(error, ModuleNotFoundError | ValueError):
        sentence = _explain_setting(error, get_tracking_uri())
        return sentence and without_password(sentence)
    return _explain_machine(error)


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
