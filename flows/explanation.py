"""What went wrong in a sentence, for a user who can mend it."""

# ruff: noqa: PLC0415

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


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


def explain(error: BaseException) -> str | None:
    """A sentence on what the user, or whoever runs a server, can mend; None for anything else."""
    from mlflow import get_tracking_uri
    from mlflow.exceptions import MlflowException
    from requests import RequestException
    from sqlalchemy.exc import SQLAlchemyError

    from gan.errors import UserError

    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, MlflowException | SQLAlchemyError | RequestException):
        from tasks.services import without_password

        address = get_tracking_uri().partition("?")[0]
        return without_password(f"MLflow at {address}: {error}".strip()).splitlines()[0]
    if isinstance(error, RuntimeError) and "ephemeral Prefect API server" in str(error):
        return "Prefect's temporary server did not start in time; is the machine overloaded?"
    if isinstance(error, MemoryError | RuntimeError):
        from tasks.training import is_memory_shortage

        full = "the memory of this machine or of its GPU is full; free some, or ask for less"
        return full if is_memory_shortage(error) else None
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return None
