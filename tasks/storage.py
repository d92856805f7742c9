"""Published versions in an S3 store: folders that never change, and a pointer to the champion.

<version>-<digest>/   the files of a bundle; its manifest comes last, so half a version has none
champion.json         which of them is champion; the one object that is ever replaced

Keys, region and endpoint are boto3's own standard variables, `AWS_*`.
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any
from urllib.parse import urlsplit

import boto3
from boto3.exceptions import Boto3Error
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    CredentialRetrievalError,
    NoCredentialsError,
    PartialCredentialsError,
)
from pydantic import AfterValidator, Field, TypeAdapter, ValidationError

from gan.bundle import MANIFEST
from gan.errors import UserError

POINTER = "champion.json"
S3_AWAY = (BotoCoreError, ClientError, Boto3Error)
"""What boto3 raises where a store does not do as asked."""

MAX_WRITES = 5
"""How often a file is written that another is writing at the same time."""

_MAX_POINTER_BYTES = 4096
_BUCKET = r"(?!.*\.\.)[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]"
_SEGMENT = r"(?!\.\.?(?:/|$))[A-Za-z0-9!_.*'()=+-]+"
_ADDRESS = re.compile(rf"s3://({_BUCKET})((?:/{_SEGMENT})*)")


class StorageError(UserError):
    """An S3 store that cannot be had, or that holds what it should not."""


def check_address(address: str) -> str:
    """An address as `s3://bucket/prefix`, without a slash at its end.

    Raises:
        StorageError: it is none. It is not repeated, as it may hold a secret.
    """
    address = address.removesuffix("/")
    if not _ADDRESS.fullmatch(address):
        raise StorageError(
            "the address of a store is s3://bucket or s3://bucket/prefix: the bucket 3 to 63 lower "
            "case letters, digits, dots and dashes; the prefix without '..', empty parts and query"
        )
    return address


S3Address = Annotated[str, AfterValidator(check_address)]
"""The type of a parameter or setting that says where to publish."""


@dataclass(frozen=True, kw_only=True)
class Pointer:
    """What `champion.json` says."""

    version: Annotated[int, Field(ge=1)]
    digest: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    """The bundle's."""
    address: str
    """For people; programs make it from the other two, so that a copied store points to itself."""

    @property
    def folder(self) -> str:
        """The version's folder in the store: its number and the start of its digest."""
        return f"{self.version}-{self.digest[:12]}"


_POINTER = TypeAdapter(Pointer)


def connect_s3(*, timeout_s: float = 10, attempts: int = 3) -> Any:
    """A client of the S3 store that the environment names, which gives up in `timeout_s * attempts`
    at the latest if the store is silent."""
    elsewhere = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    config = Config(
        connect_timeout=min(timeout_s, 5),
        read_timeout=timeout_s,
        retries={"mode": "standard", "total_max_attempts": attempts},
        # Only AWS has a host name for each bucket.
        s3={"addressing_style": "path" if elsewhere else "auto"},
    )
    return boto3.Session().client("s3", config=config)  # the default session is not thread-safe


class Store:
    """The versions of one model below an address `s3://bucket/prefix`.

    Every method raises `StorageError`, one sentence, where the store does not do as asked.
    """

    def __init__(self, address: str) -> None:
        self.address = check_address(address)
        bucket, _, prefix = self.address.removeprefix("s3://").partition("/")
        self._bucket, self._prefix = bucket, f"{prefix}/" if prefix else ""
        try:
            self._client = connect_s3()
        except (BotoCoreError, ValueError) as error:
            raise StorageError(
                f"cannot reach {self.address} with what AWS_* says: {type(error).__name__}; check "
                "AWS_ENDPOINT_URL_S3, AWS_REGION and AWS_PROFILE"
            ) from None

    def check(self) -> None:
        """See that the bucket is there and that it may be read and written; changes nothing."""
        with self._explained():
            self._client.list_objects_v2(Bucket=self._bucket, Prefix=self._prefix, MaxKeys=1)
            with _unless_conflict():
                # A write that cannot happen: keys are checked before conditions.
                self._put(".check", b"", IfMatch='"no object has this tag"')
                raise StorageError(
                    f"{self.address}: the store ignores the conditions of writes, so that what is "
                    "published could be overwritten; use another store"
                )

    def publish(self, files: Mapping[str, bytes], version: int) -> str:
        """Write a bundle's files as a version; gives its address.

        What is there already counts as written, so that an interrupted upload can be finished.
        """
        pointer = self.point_to(version, hashlib.sha256(files[MANIFEST]).hexdigest())
        others = set(self.list_versions(version)) - {pointer.folder}
        if others:
            raise StorageError(
                f"{self.address} has another version {version} already, {min(others)}; publish to "
                "another prefix"
            )
        for name in sorted(files, key=lambda name: name == MANIFEST):
            self._put_new(f"{pointer.folder}/{name}", files[name])
        return pointer.address

    def list_versions(self, version: int | None = None) -> list[str]:
        """The folders, named `<version>-<digest>`, of the versions that are whole."""
        start = self._prefix if version is None else f"{self._prefix}{version}-"
        with self._explained():
            pages = self._client.get_paginator("list_objects_v2").paginate(
                Bucket=self._bucket, Prefix=start
            )
            keys = [entry["Key"] for page in pages for entry in page.get("Contents", ())]
        whole = re.compile(rf"([1-9][0-9]*-[0-9a-f]{{12}})/{re.escape(MANIFEST)}")
        found = (whole.fullmatch(key.removeprefix(self._prefix)) for key in keys)
        return [match[1] for match in found if match]

    def read(self, name: str, max_bytes: int) -> bytes:
        """One object, by its name below the store's address."""
        with self._explained():
            answer = self._get(name)
            if answer is None:
                raise StorageError(f"{self.address} has no {name}")
            if answer["ContentLength"] > max_bytes:
                raise StorageError(f"{self.address}/{name} is larger than {max_bytes} bytes")
            body: bytes = answer["Body"].read()
        return body

    def point_to(self, version: int, digest: str) -> Pointer:
        """What `champion.json` says if this version is champion."""
        address = f"{self.address}/{version}-{digest[:12]}"
        return Pointer(version=version, digest=digest, address=address)

    def holds(self, pointer: Pointer) -> bool:
        """Whether this version is here, and whole."""
        return pointer.folder in self.list_versions(pointer.version)

    def read_pointer(self) -> tuple[Pointer | None, str | None]:
        """What `champion.json` says, and the tag to move it with; nothing if there is none."""
        with self._explained():
            answer = self._get(POINTER)
            if answer is None:
                return None, None
            body, tag = answer["Body"].read(_MAX_POINTER_BYTES), answer["ETag"]
        try:
            return _POINTER.validate_json(body), tag
        except ValidationError:
            raise StorageError(
                f"{self.address}/{POINTER} does not point to a version; delete it and publish the "
                "champion again"
            ) from None

    def move_pointer(self, pointer: Pointer, tag: str | None) -> None:
        """Replace the `champion.json` that has this tag, or that is not there, unless another was
        quicker: read it again to see."""
        condition = {"IfMatch": tag} if tag else {"IfNoneMatch": "*"}
        payload = _POINTER.dump_json(pointer, indent=2) + b"\n"
        with self._explained(), _unless_conflict():
            self._put(POINTER, payload, **condition)

    def _put_new(self, name: str, payload: bytes) -> None:
        with self._explained():
            for _ in range(MAX_WRITES):
                with _unless_conflict():
                    self._put(name, payload, IfNoneMatch="*")
                    return
                if there := self._get(name):
                    if there["Body"].read(len(payload) + 1) == payload:
                        return
                    raise StorageError(
                        f"{self.address}/{name} holds something else already, and what is "
                        "published is never replaced; delete it, or publish to another prefix"
                    )
                time.sleep(1)  # another is still writing it, or gave up
        raise StorageError(f"others keep writing {self.address}/{name}; run this again")

    def _put(self, name: str, payload: bytes, **condition: str) -> None:
        self._client.put_object(
            Bucket=self._bucket,
            Key=f"{self._prefix}{name}",
            Body=payload,
            ChecksumSHA256=base64.b64encode(hashlib.sha256(payload).digest()).decode(),
            **condition,
        )

    def _get(self, name: str) -> Any | None:
        """The answer with an object's size, tag and body; None if it is not there."""
        try:
            return self._client.get_object(Bucket=self._bucket, Key=f"{self._prefix}{name}")
        except self._client.exceptions.NoSuchKey:
            return None

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Whatever boto3 raises, in one sentence that holds no key."""
        try:
            yield
        except StorageError:
            raise
        except ClientError as error:
            raise StorageError(f"{self.address}: {_explain(error)}") from None
        except (NoCredentialsError, PartialCredentialsError, CredentialRetrievalError):
            raise StorageError(
                f"{self.address}: no keys to the store are set; set AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY"
            ) from None
        # The last two are of an answer that lacks a header of S3, or has nonsense there.
        except (BotoCoreError, KeyError, ValueError) as error:
            endpoint = urlsplit(self._client.meta.endpoint_url)
            host = f"{endpoint.scheme}://{endpoint.netloc.rpartition('@')[2]}"
            raise StorageError(
                f"{self.address}: no store answers as it should at {host} "
                f"({type(error).__name__}); start it, or correct AWS_ENDPOINT_URL_S3"
            ) from None


@contextmanager
def _unless_conflict() -> Iterator[None]:
    """Go on after a write whose condition did not hold, or that met another one."""
    try:
        yield
    except ClientError as error:
        status = error.response["ResponseMetadata"]["HTTPStatusCode"]
        if status not in (409, 412) and error.response["Error"]["Code"] != "NoSuchKey":
            raise


def _explain(error: ClientError) -> str:
    code = error.response["Error"]["Code"]
    status = error.response["ResponseMetadata"]["HTTPStatusCode"]
    if code == "NoSuchBucket":
        return "there is no such bucket; create it, or correct the address"
    if status in (401, 403):
        return (
            f"the store refuses these keys ({code}); correct AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, or what they may do"
        )
    if status >= 500:
        return f"the store is unwell or full ({status} {code}); mend it and run this again"
    return f"the store answers {status} {code}; check AWS_ENDPOINT_URL_S3 and AWS_REGION"
