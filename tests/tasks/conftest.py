import gzip
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from uuid import uuid4

import pytest

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


@pytest.fixture
def s3_keys(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment of a user of that store."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", s3)
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")


@pytest.fixture
def destination(s3_keys: None) -> str:
    """An address below which nothing has been published yet."""
    return f"s3://mirrors/{uuid4().hex}"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where pulled files are kept: empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "mnist-gan"


@contextmanager
def together(processes: Sequence[BaseProcess]) -> Iterator[None]:
    """Run processes beside the block; with its end they must have come to theirs."""
    for process in processes:
        process.start()
    try:
        yield
        for process in processes:
            process.join(60)
            assert process.exitcode == 0
    finally:
        for process in processes:
            process.kill()
