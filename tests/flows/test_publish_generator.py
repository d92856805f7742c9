"""Publishing as a user does it: a command, a registry on SQLite, a real S3 store."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient

from flows import command_line
from flows.publish_generator import publish_generator
from gan.bundle import read_bundle
from tasks.pulling import open_store, pull
from tasks.tracking import MODEL_NAME
from tests.prefect_home import prefect_home
from tests.registry import Registry, register_two
from tests.s3_store import free_ports, s3_store

Publish = Callable[..., subprocess.CompletedProcess[str]]


@pytest.mark.parametrize(
    ("option", "value", "sentence"),
    [
        ("--publish-to", "bucket/prefix", "publish_to: the address of a store is s3://bucket"),
        ("--version", f"{10**9}", f"version.constrained-int: Input should be less than {10**9}"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_starts(
    option: str, value: str, sentence: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["publish_generator", option, value])
    with pytest.raises(SystemExit) as stopped:
        command_line.run(publish_generator)
    said = str(stopped.value.code)
    assert said.startswith(f"error: {sentence}")
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def registered(tmp_path_factory: pytest.TempPathFactory) -> Registry:
    return register_two(tmp_path_factory.mktemp("registered"))


@pytest.fixture(scope="module")
def publish(
    registered: Registry, tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config
) -> Iterator[Publish]:
    """Runs `python -m flows.publish_generator`, or another, beside a registry and an S3 store."""
    home = tmp_path_factory.mktemp("home")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "MLFLOW_"))}
    with s3_store(tmp_path_factory.mktemp("s3"), free_ports(5)) as url:
        environment = kept | {
            "HOME": str(home),
            "PYTHONPATH": str(pytestconfig.rootpath),
            "PREFECT_HOME": prefect_home(home / ".prefect"),
            "MLFLOW_TRACKING_URI": f"sqlite:///{registered.folder}/mlflow.db",
            "AWS_ENDPOINT_URL_S3": url,
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_REGION": "us-east-1",
            "NO_PROXY": "127.0.0.1",
        }

        def run(
            *options: str, flow: str = "publish_generator", **variables: str
        ) -> subprocess.CompletedProcess[str]:
            return subprocess.run(
                [sys.executable, "-m", f"flows.{flow}", *options],
                check=False,
                cwd=home,
                env=environment | variables,
                capture_output=True,
                text=True,
                timeout=120,
            )

        with pytest.MonkeyPatch.context() as patch:
            for name in ("AWS_ENDPOINT_URL_S3", "AWS_REGION", "NO_PROXY"):
                patch.setenv(name, environment[name])
            for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
                patch.setenv(name, environment[name])
            yield run


@pytest.mark.slow
def test_published_versions_can_be_pulled_and_the_champion_is_pointed_at(
    publish: Publish, registered: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    store = open_store("s3://mirrors/models")
    done = publish("--version", "2", "--publish-to", "s3://mirrors/models")
    assert done.returncode == 0, done.stderr
    assert "its pointer stays" in done.stderr, "version 1 is champion, and is not there yet"
    assert store.read_pointer() == (None, None)

    # By its alias, to the place of the setting.
    done = publish(MNIST_GAN_PUBLISH_TO="s3://mirrors/models")
    assert done.returncode == 0, done.stderr
    pointer, _ = store.read_pointer()
    assert pointer == store.point_to(1, registered.digests[0])
    client = MlflowClient(f"sqlite:///{registered.folder}/mlflow.db")
    assert client.get_model_version(MODEL_NAME, "1").tags["s3"] == pointer.address
    for version, name in ((1, "champion"), (2, 2)):
        pulled = pull(name, tmp_path / str(version), "s3://mirrors/models")
        assert read_bundle(pulled.folder) == read_bundle(registered.bundle(version))


@pytest.mark.slow
def test_promotion_that_the_store_did_not_learn_of_is_finished(
    publish: Publish, registered: Registry, mnist_dir: Path
) -> None:
    address = "s3://mirrors/behind"
    store, client = open_store(address), MlflowClient(f"sqlite:///{registered.folder}/mlflow.db")
    for version in ("1", "2"):
        assert publish("--version", version, "--publish-to", address).returncode == 0
    client.set_registered_model_alias(MODEL_NAME, "champion", "2")
    try:
        done = publish(
            *("--version", "2"),
            flow="promote_generator",
            MNIST_GAN_PUBLISH_TO=address,
            MNIST_GAN_DATA_DIR=str(mnist_dir.parent),
        )
    finally:
        client.set_registered_model_alias(MODEL_NAME, "champion", "1")
    assert done.returncode == 0, done.stderr
    assert store.read_pointer()[0] == store.point_to(2, registered.digests[1])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ((), "error: nowhere to publish: give publish_to, or set MNIST_GAN_PUBLISH_TO"),
        (
            ("--publish-to", "s3://mirrors/models"),
            f"error: s3://mirrors/models/{MODEL_NAME}: the store refuses these keys "
            "(SignatureDoesNotMatch); correct AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or what "
            "they may do",
        ),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(
    publish: Publish, options: tuple[str, ...], sentence: str
) -> None:
    done = publish(*options, AWS_SECRET_ACCESS_KEY="hush")
    assert done.returncode == 1
    assert sentence in done.stderr.splitlines()
    assert "Traceback" not in done.stderr
    assert "hush" not in done.stderr
