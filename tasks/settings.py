"""The project's own few settings, read from the environment in this one place.

S3, MLflow and Prefect are set by their own standard variables, which have no second name here.
"""

from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from gan.errors import UserError
from tasks.storage import S3Address

Folder = Annotated[Path, AfterValidator(Path.expanduser)]
"""A folder of this machine. A `~` is the user's home: no shell looks at what is in a file."""


class SettingsError(UserError):
    """A setting in the environment has a value that is not allowed."""


def _split(value: object) -> object:
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else value


def _check_mirror(mirror: str) -> str:
    try:
        url = urlsplit(mirror)
    except ValueError:
        raise ValueError("a mirror's address is none") from None
    # The addresses of mirrors are logged. The value is not repeated, as it may hold the secret.
    if "://" in mirror and ("@" in mirror or url.query or url.fragment):
        raise ValueError("a mirror's address may hold no user, password, query or fragment")
    if "://" in mirror and (url.scheme not in ("http", "https", "s3") or not url.netloc):
        raise ValueError(f"{mirror!r} is not an http(s) folder, s3://bucket/prefix or local folder")
    if not mirror:
        raise ValueError("a mirror's name is empty; separate mirrors by single commas")
    return mirror


class Settings(BaseSettings):
    """What a user may set by ``MNIST_GAN_*`` variables; an empty variable counts as unset."""

    model_config = SettingsConfigDict(env_prefix="MNIST_GAN_", env_ignore_empty=True, frozen=True)

    data_dir: Folder = Path("data/mnist")
    """Where MNIST is kept; its four files lie in the folder ``raw`` below."""

    runs_dir: Folder = Path("runs")
    """Where each run gets a folder of its own."""

    publish_to: S3Address | None = None
    """Where generators are published, such as ``s3://bucket/prefix``; by default nowhere."""

    checkpoint_every_s: Annotated[float, Field(ge=0)] = 30.0
    """Seconds between two checkpoints of a training; more where saving would take over 1%."""

    data_mirrors: Annotated[
        tuple[Annotated[str, AfterValidator(_check_mirror)], ...], NoDecode, BeforeValidator(_split)
    ] = ()
    """More places to fetch MNIST from, separated by commas: http(s) folders, s3://bucket/prefix,
    local folders. Each may hold the files gzipped (``.gz``) or raw."""


def load_settings() -> Settings:
    """Read the settings from the environment, now.

    Raises:
        SettingsError: a value is not allowed; one sentence says which and what is.
    """
    try:
        return Settings()
    except ValidationError as error:
        fault = error.errors()[0]
        variable = f"MNIST_GAN_{fault['loc'][0]}".upper()
        raise SettingsError(f"{variable}: {fault['msg'].removeprefix('Value error, ')}") from None
