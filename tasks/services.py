"""The servers that a run needs, asked before it spends hours on what it could not keep."""

import os
import re
import socket
from collections.abc import Mapping

import httpx
from prefect import task
from prefect.cache_policies import NO_CACHE
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError

from gan.errors import UserError

TIMEOUT_S = 5.0
DATABASE_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}
"""Where the databases listen that MLflow may keep its records in."""
S3_KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")


class ServiceError(UserError):
    """A server that the run needs does not answer."""


@task(name="check services", retries=2, retry_delay_seconds=3, cache_policy=NO_CACHE)
def check_services() -> None:
    """See that every server named in the environment answers; nothing to see where none is.

    Raises:
        ServiceError: one does not; says which, where, and why.
    """
    for name, url in find_services(os.environ).items():
        check(name, url)


def find_services(environ: Mapping[str, str]) -> dict[str, str]:
    """The addresses of the servers that these variables name.

    Raises:
        ServiceError: a variable of theirs holds what none can; it is not repeated.
    """
    for name in S3_KEYS:
        if environ.get(name, "") != environ.get(name, "").strip():
            # Sent in a header, it would be refused with a message that repeats it.
            raise ServiceError(f"{name} has white space at an end, such as the end of a line")
    services = {}
    tracking = environ.get("MLFLOW_TRACKING_URI", "")
    if tracking.startswith(("http://", "https://")):
        services["MLflow"] = f"{tracking.rstrip('/')}/health"
    elif _find_database(tracking):
        services["MLflow"] = tracking
    if store := environ.get("AWS_ENDPOINT_URL_S3") or environ.get("AWS_ENDPOINT_URL"):
        services["S3"] = store
    return services


def _find_database(url: str) -> tuple[str, int] | None:
    """Where a database server listens; None where an address is not of one, or names no host."""
    try:
        parsed = make_url(url)
    except ArgumentError:
        return None
    except ValueError:  # its port is no number
        if not url.startswith(tuple(DATABASE_PORTS)):
            return None
        raise ServiceError("MLflow is set to an address that is none") from None
    port = DATABASE_PORTS.get(parsed.get_backend_name())
    return (parsed.host, parsed.port or port) if parsed.host and port else None


def find_silent_service() -> str | None:
    """What is wrong with the first of the servers that does not answer now, if one does not."""
    try:
        for name, url in find_services(os.environ).items():
            check(name, url)
    except ServiceError as error:
        return str(error)
    return None


def without_password(text: str) -> str:
    """A text without the user names and passwords that addresses in it may hold."""
    # What is known to be one first: a password may have a slash, an @ or a ? in it, or be in the
    # query.
    address = os.environ.get("MLFLOW_TRACKING_URI", "")
    if of_database := re.match(r"[\w+]+://([^:/]*:[^@]*@)", address):
        text, address = (each.replace(of_database[1], "") for each in (text, address))
    address, _, query = address.partition("?")
    if query:
        text = text.replace(f"?{query}", "")
    address = address.partition("://")[2]
    known, at, _ = address.rpartition("@")
    if at and not address.startswith("/"):
        text = text.replace(f"{known}@", "")
    return re.sub(r"//[^/@\s]*@", "//", text)


def check(name: str, url: str) -> None:
    """Ask one server; any answer but a server's own error will do, for S3 refuses strangers.

    A database is only asked whether it listens.

    Raises:
        ServiceError: no answer, or the answer is that it is not well.
    """
    if database := _find_database(url):
        try:
            socket.create_connection(database, TIMEOUT_S).close()
        except (OSError, UnicodeError) as error:
            host, port = database
            raise ServiceError(f"{name} does not answer at {host}:{port}: {error}") from None
        return
    try:
        address = httpx.URL(url).copy_with(userinfo=b"")  # a password is not for the log
        # Only whether somebody is there: whose certificates to trust is said to MLflow and boto3 in
        # variables of their own.
        response = httpx.get(address, timeout=TIMEOUT_S, verify=False)
    except (httpx.InvalidURL, UnicodeError):
        raise ServiceError(f"{name} is set to an address that is none") from None
    # The last two come of proxies that are none.
    except (httpx.TransportError, ImportError, ValueError) as error:
        raise ServiceError(f"{name} does not answer at {address}: {error}") from None
    if response.is_server_error:
        raise ServiceError(f"{name} at {address} answers with {response.status_code}")
