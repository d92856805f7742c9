"""Published versions in a real S3 store, which is also refused, killed and full of surprises."""

import json
import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from botocore.exceptions import ClientError
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from gan.bundle import CONFIG, MANIFEST, MAX_BYTES, WEIGHTS, read_bundle, save_bundle
from gan.config import ConvConfig
from gan.networks import build_generator
from tasks import storage
from tasks.storage import (
    POINTER,
    S3Address,
    StorageError,
    Store,
    check_address,
    connect_s3,
)
from tests.s3_store import find_weed, free_ports, overwrite, s3_client, s3_store

READ = partial(Store.read, name=CONFIG, max_bytes=100)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a small bundle."""
    folder = tmp_path_factory.mktemp("storage") / "bundle"
    save_bundle(build_generator(ConvConfig(width=1)), folder)
    return read_bundle(folder)


def keys_below(destination: str) -> list[str]:
    bucket, _, prefix = destination.removeprefix("s3://").partition("/")
    client = s3_client(os.environ["AWS_ENDPOINT_URL_S3"])
    listed = client.list_objects_v2(Bucket=bucket, Prefix=prefix)
    return [entry["Key"].removeprefix(f"{prefix}/") for entry in listed.get("Contents", [])]


@pytest.mark.parametrize(
    "address", ["s3://bucket", "s3://my.bucket-1/a", "s3://bucket/a/b_c.d/e=f", "s3://bucket/a/"]
)
def test_address_is_taken_without_a_slash_at_its_end(address: str) -> None:
    assert TypeAdapter(S3Address).validate_python(address) == address.rstrip("/")


@pytest.mark.parametrize(
    "address",
    [
        "",
        "bucket/prefix",
        "https://bucket/prefix",
        "s3://",
        "s3:///prefix",
        "s3://b",
        "s3://Bucket",
        "s3://-bucket",
        "s3://two..dots",
        "s3://key:secret@bucket/prefix",
        "s3://bucket//prefix",
        "s3://bucket/prefix//",
        "s3://bucket/../prefix",
        "s3://bucket/.",
        "s3://bucket/a b",
        "s3://bucket/prefix?secret=1",
        "s3://bucket/prefix#part",
        "s3://bucket/prefix\n",
    ],
)
def test_what_is_no_address_is_refused_without_repeating_it(address: str) -> None:
    with pytest.raises(StorageError, match="s3://bucket/prefix") as refused:
        check_address(address)
    assert "secret" not in str(refused.value)
    with pytest.raises(ValidationError, match="s3://bucket/prefix"):
        TypeAdapter(S3Address).validate_python(address)


@given(st.text() | st.text("s3:/.ab-", min_size=3))
def test_address_that_is_taken_stays_in_its_bucket(text: str) -> None:
    try:
        address = check_address(f"s3://{text}")
    except StorageError:
        return
    bucket, *segments = address.removeprefix("s3://").split("/")
    assert 3 <= len(bucket) <= 63
    assert not {"", ".", ".."} & set(segments)


def test_published_files_are_those_of_the_bundle(destination: str, files: dict[str, bytes]) -> None:
    store = Store(destination)
    address = store.publish(files, 7)
    (name,) = store.list_versions()
    assert address == f"{destination}/{name}"
    assert name.startswith("7-")
    assert {each: store.read(f"{name}/{each}", MAX_BYTES[each]) for each in files} == files
    assert sorted(keys_below(destination)) == sorted(f"{name}/{each}" for each in files)


def test_publishing_again_changes_nothing(destination: str, files: dict[str, bytes]) -> None:
    assert Store(destination).publish(files, 7) == Store(destination).publish(files, 7)
    assert len(keys_below(destination)) == len(files)


def test_bucket_itself_is_an_address(s3_keys: None) -> None:
    Store("s3://mirrors").check()
    pointer, tag = Store("s3://mirrors").read_pointer()
    assert pointer is None
    assert tag is None


def test_file_that_differs_is_not_replaced(destination: str, files: dict[str, bytes]) -> None:
    store = Store(destination)
    address = store.publish(files, 7)
    for name in (CONFIG, MANIFEST):
        overwrite(f"{address}/{name}", b"altered")
        with pytest.raises(StorageError, match=rf"{name} holds something else already"):
            store.publish(files, 7)
        overwrite(f"{address}/{name}", files[name])
    store.publish(files, 7)


def test_a_number_stands_for_one_bundle(
    destination: str, files: dict[str, bytes], tmp_path: Path
) -> None:
    store = Store(destination)
    store.publish(files, 7)
    save_bundle(build_generator(ConvConfig(width=2)), tmp_path / "bundle")
    with pytest.raises(StorageError, match="has another version 7 already"):
        store.publish(read_bundle(tmp_path / "bundle"), 7)
    store.publish(read_bundle(tmp_path / "bundle"), 77)
    assert [name.partition("-")[0] for name in store.list_versions()] == ["7", "77"]
    assert len(store.list_versions(7)) == 1


def test_two_who_publish_at_once_both_succeed(destination: str, files: dict[str, bytes]) -> None:
    with ThreadPoolExecutor() as pool:
        published = list(pool.map(lambda _: Store(destination).publish(files, 7), range(4)))
    assert len(set(published)) == 1
    assert len(keys_below(destination)) == len(files)


@pytest.mark.parametrize("conflicts", [1, storage.MAX_WRITES])
def test_file_that_another_begins_to_write_is_written_again(
    destination: str, files: dict[str, bytes], conflicts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    put, refused = Store._put, []

    def refuse(self: Store, name: str, payload: bytes, **condition: str) -> None:
        if name.endswith(CONFIG) and len(refused) < conflicts:
            refused.append(name)
            said = {"Code": "ConditionalRequestConflict"}
            answer = {"Error": said, "ResponseMetadata": {"HTTPStatusCode": 409}}
            raise ClientError(answer, "PutObject")
        put(self, name, payload, **condition)

    monkeypatch.setattr(Store, "_put", refuse)
    monkeypatch.setattr(time, "sleep", lambda _: None)
    if conflicts == storage.MAX_WRITES:
        with pytest.raises(StorageError, match=f"others keep writing .*{CONFIG}; run this again"):
            Store(destination).publish(files, 7)
        assert Store(destination).list_versions() == []
    Store(destination).publish(files, 7)
    assert len(keys_below(destination)) == len(files)


def test_pointer_is_moved_by_who_saw_it_last(destination: str) -> None:
    store = Store(destination)
    first, second, third = (store.point_to(each, f"{each}" * 64) for each in (1, 2, 3))
    store.move_pointer(first, None)
    store.move_pointer(second, None)
    pointer, tag = store.read_pointer()
    assert pointer == first
    store.move_pointer(second, tag)
    store.move_pointer(third, tag)
    pointer, _ = store.read_pointer()
    assert pointer == second


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"[]",
        b"\xff",
        b'{"version": 1}',
        json.dumps({"version": 0, "digest": "0" * 64, "address": ""}).encode(),
        json.dumps({"version": 1, "digest": "../" * 8, "address": ""}).encode(),
        json.dumps({"version": 1, "digest": "0" * 64, "address": "x" * 5000}).encode(),
    ],
)
def test_pointer_that_is_none_is_refused(destination: str, payload: bytes) -> None:
    overwrite(f"{destination}/{POINTER}", payload)
    with pytest.raises(StorageError, match=f"{POINTER} does not point to a version; delete it"):
        Store(destination).read_pointer()


def test_object_larger_than_allowed_is_not_read(destination: str) -> None:
    overwrite(f"{destination}/{CONFIG}", bytes(100))
    assert Store(destination).read(CONFIG, 100) == bytes(100)
    with pytest.raises(StorageError, match=f"{CONFIG} is larger than 99 bytes"):
        Store(destination).read(CONFIG, 99)


def test_check_writes_nothing(destination: str) -> None:
    Store(destination).check()
    assert keys_below(destination) == []


@pytest.mark.usefixtures("s3_keys")
@pytest.mark.parametrize(
    ("variable", "value", "sentence"),
    [
        ("AWS_SECRET_ACCESS_KEY", "hush", r"refuses these keys \(SignatureDoesNotMatch\)"),
        ("AWS_ACCESS_KEY_ID", "hush", r"refuses these keys \(InvalidAccessKeyId\)"),
        ("AWS_ENDPOINT_URL_S3", "http://user:hush@127.0.0.1:1", r"no store .* http://127.0.0.1:1 "),
        ("AWS_ENDPOINT_URL_S3", "hush", "AWS_ENDPOINT_URL_S3"),
        ("AWS_PROFILE", "hush", "AWS_PROFILE"),
    ],
)
def test_what_is_set_wrongly_is_named_in_seconds_without_secrets(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, sentence: str
) -> None:
    monkeypatch.setenv(variable, value)
    started = time.monotonic()
    with pytest.raises(StorageError, match=sentence) as refused:
        Store("s3://mirrors/models").check()
    assert time.monotonic() - started < 10
    assert "s3://mirrors/models" in str(refused.value)
    assert "hush" not in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.usefixtures("s3_keys")
def test_missing_keys_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    with pytest.raises(StorageError, match="set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"):
        Store("s3://mirrors/models").check()


@pytest.mark.usefixtures("s3_keys")
def test_missing_bucket_is_named() -> None:
    with pytest.raises(StorageError, match=r"s3://missing/models: there is no such bucket"):
        Store("s3://missing/models").check()


@contextmanager
def answering(monkeypatch: pytest.MonkeyPatch, *statuses: int) -> Iterator[list[str]]:
    """A store that answers with these statuses in turn, the last for ever; what it was asked."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_response(statuses[min(len(asked), len(statuses) - 1)])
            asked.append(self.command)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_GET = do_PUT = answer  # noqa: N815

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{server.server_port}")
        yield asked
        server.shutdown()


@pytest.mark.usefixtures("s3_keys")
def test_passing_trouble_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    with answering(monkeypatch, 503, 500, 200) as asked:
        Store("s3://mirrors/models").move_pointer(
            Store("s3://mirrors/models").point_to(1, "0" * 64), None
        )
    assert asked == ["PUT"] * 3


@pytest.mark.usefixtures("s3_keys")
@pytest.mark.parametrize("status", [500, 507])
def test_lasting_trouble_such_as_a_full_disk_is_named(
    monkeypatch: pytest.MonkeyPatch, files: dict[str, bytes], status: int
) -> None:
    with (
        answering(monkeypatch, 200, status),
        pytest.raises(StorageError, match=rf"unwell or full \({status}"),
    ):
        Store("s3://mirrors/models").publish(files, 1)


@pytest.mark.usefixtures("s3_keys")
def test_store_that_ignores_conditions_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        answering(monkeypatch, 200),
        pytest.raises(StorageError, match="ignores the conditions of writes"),
    ):
        Store("s3://mirrors/models").check()


@pytest.mark.usefixtures("s3_keys")
def test_store_that_stays_silent_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "connect_s3", partial(connect_s3, timeout_s=0.2))
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{server.getsockname()[1]}")
        with pytest.raises(StorageError, match=r"no store answers as it should .*Timeout"):
            Store("s3://mirrors/models").check()


def test_silent_store_takes_well_under_a_minute(s3_keys: None) -> None:
    config = connect_s3().meta.config
    attempts = config.retries["total_max_attempts"]
    assert attempts > 1
    assert attempts * max(config.connect_timeout, config.read_timeout) <= 40


@pytest.mark.usefixtures("s3_keys")
def test_key_that_may_only_read_or_is_revoked_is_refused(
    monkeypatch: pytest.MonkeyPatch, files: dict[str, bytes], tmp_path: Path
) -> None:
    ports = free_ports(5)
    with s3_store(tmp_path, ports) as url:

        def configure(options: str) -> None:
            subprocess.run(
                [find_weed(), "shell", f"-master=127.0.0.1:{ports[1]}"],
                input=f"s3.configure -user=guest {options} -apply\n",
                text=True,
                check=True,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                timeout=60,
            )

        def refusal() -> str:
            """What is said to the guest as soon as the store knows of the change."""
            deadline = time.monotonic() + 30
            while time.monotonic() < deadline:
                try:
                    Store("s3://mirrors/models").check()
                except StorageError as error:
                    return str(error)
                time.sleep(0.2)
            raise AssertionError("never refused")

        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", url)
        configure("-access_key=guest -secret_key=hush -buckets=mirrors -actions=Read,List,Write")
        Store("s3://mirrors/models").publish(files, 1)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "guest")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush")
        Store("s3://mirrors/models").publish(files, 2)
        configure("-buckets=mirrors -actions=Write -delete")
        assert "refuses these keys (AccessDenied)" in refusal()
        assert len(Store("s3://mirrors/models").list_versions()) == 2
        configure("-delete")
        assert "refuses these keys (InvalidAccessKeyId)" in refusal()


@pytest.mark.usefixtures("s3_keys")
@pytest.mark.parametrize(
    ("headers", "read"),
    [
        (b'Content-Length: 9\r\nETag: "0"', READ),  # it is cut short
        (b'ETag: "0"', READ),
        (b'Content-Length: three\r\nETag: "0"', READ),
        (b"Content-Length: 3", Store.read_pointer),
    ],
)
def test_answer_that_is_cut_short_or_lacks_a_header_is_refused(
    headers: bytes, read: Callable[[Store], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(b"HTTP/1.1 200 OK\r\n" + headers + b"\r\n\r\n123")

        Thread(target=answer).start()
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", url)
        with pytest.raises(StorageError, match=f"^s3.*no store answers as it should at {url} .*$"):
            read(Store("s3://mirrors/models"))


def publish_when_well(store: Store, files: dict[str, bytes]) -> None:
    """Publish, again and again: SeaweedFS may refuse writes for seconds after a restart."""
    deadline = time.monotonic() + 60
    while True:
        try:
            store.publish(files, 7)
            return
        except StorageError as error:
            if "unwell" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(1)


@pytest.mark.chaos
@pytest.mark.usefixtures("s3_keys")
@pytest.mark.parametrize("last", [CONFIG, WEIGHTS])
def test_store_killed_in_mid_upload_holds_nothing_that_looks_whole(
    monkeypatch: pytest.MonkeyPatch, files: dict[str, bytes], tmp_path: Path, last: str
) -> None:
    ports = free_ports(5)
    put = Store._put

    with ExitStack() as running:

        def put_and_kill(self: Store, name: str, payload: bytes, **condition: str) -> None:
            put(self, name, payload, **condition)
            if name.endswith(last):
                running.close()

        url = running.enter_context(s3_store(tmp_path, ports))
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", url)
        with monkeypatch.context() as patch:
            patch.setattr(Store, "_put", put_and_kill)
            with pytest.raises(StorageError, match=f"no store answers as it should at {url}"):
                Store("s3://mirrors/models").publish(files, 7)

    with s3_store(tmp_path, ports):
        store = Store("s3://mirrors/models")
        assert store.list_versions() == []
        publish_when_well(store, files)
        (name,) = store.list_versions()
        assert {each: store.read(f"{name}/{each}", MAX_BYTES[each]) for each in files} == files
