"""The command `gan` as a user has it, in an empty folder.

What it does is seen in processes of its own; what it refuses, more cheaply, in this one.
"""

from __future__ import annotations

import errno
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from mlflow import MlflowClient
from PIL import Image

from flows import gan_command
from gan.bundle import PRETRAINED, load_bundle, verify_bundle
from gan.config import NUM_SEEDS
from gan.sampling import ANY_DIGIT, draw, interpolate, tile
from tests.registry import Registry

NAME = "mnist-gan-generator"
HELP_AND_LIST_MODULES = """
import sys
from flows.gan_command import main
try:
    main()
finally:
    print(*sys.modules, file=sys.stderr)
"""
BE_TERMINATED_WHILE_WRITING = """
import signal
from PIL import Image
from flows.gan_command import main
Image.Image.save = lambda *_: signal.raise_signal(signal.SIGTERM)
main()
"""
BE_UNKNOWN_TO_THE_SYSTEM = """
import os, pwd
del os.environ["HOME"]
def getpwuid(uid):
    raise KeyError(uid)
pwd.getpwuid = getpwuid
"""
Gan = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The empty folder in which the user is."""
    (tmp_path / "here").mkdir()
    return tmp_path / "here"


@pytest.fixture
def gan(folder: Path, tmp_path: Path, pytestconfig: pytest.Config) -> Gan:
    """Runs `gan` in that folder, with no server or store set but those given."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PREFECT_", "MLFLOW_", "MNIST_GAN_", "AWS_"))
    }
    environment = kept | {
        "PYTHONPATH": str(pytestconfig.rootpath),
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "PREFECT_HOME": str(tmp_path / ".prefect"),
        "COLUMNS": "200",
    }

    def run(*options: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", "from flows.gan_command import main; main()", *options],
            check=False,
            cwd=folder,
            env=environment | variables,
            capture_output=True,
            text=True,
            timeout=120,
        )

    return run


@pytest.fixture
def here(registry: Registry, folder: Path, tmp_path: Path) -> Registry:
    """The registry of two versions as `mlflow.db` in the user's folder."""
    shutil.copy(tmp_path / "mlflow.db", folder / "mlflow.db")
    return registry


@pytest.fixture
def refusal(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Iterator[Callable[..., str]]:
    """Runs `gan` in that folder and gives the one sentence that it ends with."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")

    def run(*options: str) -> str:
        monkeypatch.setattr(sys, "argv", ["gan", *options])
        with pytest.raises(SystemExit) as stopped:
            gan_command.main()
        said = capsys.readouterr()
        assert said.out == ""
        if stopped.value.code == 2:  # argparse has said it, below how the command is used
            return said.err.splitlines()[-1]
        assert isinstance(stopped.value.code, str)
        assert "\n" not in stopped.value.code
        return stopped.value.code

    before = signal.getsignal(signal.SIGTERM)
    yield run
    signal.signal(signal.SIGTERM, before)


def succeeded(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def test_help_names_every_command(gan: Gan) -> None:
    text = succeeded(gan("--help"))
    for command in ("pull", "sample", "versions", "verify", "sign", "rollback", "compare"):
        assert f"\n    {command} " in text
        assert succeeded(gan(command, "--help")).startswith(f"usage: gan {command}")


def test_help_imports_nothing_that_takes_long(pytestconfig: pytest.Config) -> None:
    fresh = subprocess.run(
        [sys.executable, "-c", HELP_AND_LIST_MODULES, "--help"],
        cwd=pytestconfig.rootpath,
        capture_output=True,
        text=True,
        check=True,
    )
    assert fresh.stdout.startswith("usage: gan")
    loaded = {name.partition(".")[0] for name in fresh.stderr.split()}
    assert "flows" in loaded
    slow = {
        "torch",
        "numpy",
        "pandas",
        "PIL",
        "mlflow",
        "prefect",
        "pydantic",
        "rich",
        "sqlalchemy",
    }
    assert not loaded & (slow | {"gan", "tasks"})


@pytest.mark.slow
def test_champion_is_pulled_sampled_and_verified(gan: Gan, here: Registry, folder: Path) -> None:
    said = succeeded(gan("pull"))
    assert said.startswith(f"{NAME}: version 1, models:/{NAME}/1, sha256 {here.digests[0]}")
    assert verify_bundle(folder / NAME) == here.digests[0]
    assert "already there" in succeeded(gan("pull", "--version", "@champion"))

    succeeded(gan("sample", "--digit", "8", "--num", "16", "--seed", "1", "--out", "eights.png"))
    expected = tile(draw(load_bundle(here.bundle(1)), [8], num=16, seed=1), columns=4)
    np.testing.assert_array_equal(np.asarray(Image.open(folder / "eights.png")), expected)
    succeeded(gan("sample", "--bundle", NAME, "--digit", "8", "--seed", "1", "--out", "e.PNG"))
    assert (folder / "e.PNG").read_bytes() == (folder / "eights.png").read_bytes()

    succeeded(gan("sample", "--bundle", NAME, "--num", "9", "--to-seed", "4", "--out", "way.png"))
    way = interpolate(load_bundle(here.bundle(1)), ANY_DIGIT, num=9, seed=0, to_seed=4)
    np.testing.assert_array_equal(np.asarray(Image.open(folder / "way.png")), tile(way, columns=3))
    succeeded(gan("sample", "--bundle", NAME, "--digit", "3", "--temperature", "0", "--num", "2"))
    sheet = np.asarray(Image.open(folder / "digits.png"))
    np.testing.assert_array_equal(sheet[2:30, 2:30], sheet[2:30, 32:60])

    assert here.digests[0] in succeeded(gan("verify", NAME))
    left = {path.name for path in folder.iterdir()}
    assert left == {"mlflow.db", NAME, "eights.png", "e.PNG", "way.png", "digits.png"}


@pytest.mark.slow
def test_other_versions_other_folders_and_odd_numbers(
    gan: Gan, here: Registry, folder: Path
) -> None:
    assert "version 2, " in succeeded(gan("pull", "--version", "2", "--to", "deep/er"))
    assert verify_bundle(folder / "deep" / "er") == here.digests[1]
    succeeded(gan("sample", "--version", "challenger", "--num", "3"))
    sheet = np.asarray(Image.open(folder / "digits.png"))
    assert sheet.shape == (62, 62)
    images = draw(load_bundle(here.bundle(2)), [ANY_DIGIT], num=3, seed=0)
    np.testing.assert_array_equal(sheet[2:30, 32:60], images[1])
    assert not sheet[30:, 30:].any(), "the fourth place is empty"


@pytest.mark.slow
def test_versions_are_listed_with_all_that_is_known(gan: Gan, here: Registry, folder: Path) -> None:
    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    client.set_model_version_tag(NAME, "2", "s3", f"s3://bucket/{NAME}/2-0123")
    client.create_model_version(NAME, str(here.folder))  # made by hand: nothing is known of it
    client.set_model_version_tag(NAME, "2", "recipe", "[red]\x1b[31mhostile")
    heading, *rows = succeeded(gan("versions")).splitlines()
    for word in ("version", "aliases", "recipe", "Frechet", "coverage", "as asked", "when", "from"):
        assert word in heading
    text = "\n".join(rows)
    first, second = text.index("\n1 "), text.index("\n2 ")
    assert text.startswith("3 "), "the newest comes first"
    newest, oldest = text[second:first], text[first:]
    assert " challenger " in newest
    assert " champion " in oldest
    assert f"s3://bucket/{NAME}/2-0123" in newest
    assert "s3://" not in oldest
    assert "[red][31mhostile" in newest
    tags = client.get_model_version(NAME, "1").tags
    for name in ("frechet_distance", "coverage", "digit_as_asked"):
        assert tags.get(name, "") in oldest
    run = client.get_run(client.get_model_version(NAME, "1").run_id)
    assert run.info.run_name in oldest
    assert "flow run known" in oldest


@pytest.mark.slow
def test_rollback_returns_to_the_previous_champion(gan: Gan, here: Registry, folder: Path) -> None:
    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    client.set_registered_model_alias(NAME, "previous", "2")
    assert succeeded(gan("rollback")).startswith("version 2 is @champion again")
    held = client.get_registered_model(NAME).aliases
    assert (str(held["champion"]), str(held["previous"])) == ("2", "1")
    client.delete_model_version(NAME, "2")
    assert succeeded(gan("rollback")) == "version 1 is @champion again\n"


def test_a_refusal_waits_for_no_library_that_it_does_not_need(
    pytestconfig: pytest.Config,
) -> None:
    refused = subprocess.run(
        [sys.executable, "-c", HELP_AND_LIST_MODULES, "verify", "absent"],
        cwd=pytestconfig.rootpath,
        capture_output=True,
        text=True,
        check=False,
    )
    modules, sentence = refused.stderr.splitlines()
    assert sentence == "error: absent is not a whole bundle: it has no manifest.json"
    assert not {"prefect", "matplotlib", "httpx"} & set(modules.split())


@pytest.mark.slow
def test_rollback_that_the_store_does_not_learn_of_says_how_it_will(
    gan: Gan, here: Registry, folder: Path
) -> None:
    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    client.set_registered_model_alias(NAME, "previous", "2")
    with socket.create_server(("127.0.0.1", 0)) as server:
        gone = f"http://127.0.0.1:{server.getsockname()[1]}"
    store = {
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_REGION": "us-east-1",
    }
    done = gan("rollback", MNIST_GAN_PUBLISH_TO="s3://bucket", AWS_ENDPOINT_URL_S3=gone, **store)
    assert done.returncode == 1
    assert done.stdout.startswith("version 2 is @champion again")
    assert done.stderr.count("\n") == 1
    assert gone in done.stderr
    assert "`python -m flows.publish_generator` has champion.json follow" in done.stderr


@pytest.fixture
def keys(folder: Path) -> tuple[str, str]:
    """A key pair in PEM: the private one, the public one."""
    pytest.importorskip("model_signing", reason="the extra `signing` is not installed")
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    pem = serialization.Encoding.PEM
    (folder / "private.pem").write_bytes(
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    (folder / "public.pem").write_bytes(
        key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    return "private.pem", "public.pem"


@pytest.mark.slow
def test_signed_bundle_is_verified_with_the_key_and_an_altered_one_is_not(
    gan: Gan,
    refusal: Callable[..., str],
    here: Registry,
    folder: Path,
    keys: tuple[str, str],
) -> None:
    private, public = keys
    shutil.copytree(here.bundle(1), folder / "mine")
    succeeded(gan("sign", "mine", "--key", private))
    assert "signed with the key" in succeeded(gan("verify", "mine", "--key", public))
    (folder / "mine" / "model_card.md").write_text("# Other\n")
    assert "was altered" in refusal("verify", "mine", "--key", public)
    assert "was altered" in refusal("sign", "mine", "--key", private)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ((), "the following arguments are required: COMMAND"),
        (("draw",), "invalid choice: 'draw'"),
        (("pull", "--version", "0"), "'0' is neither a version's number nor an alias"),
        (("pull", "--version", "../x"), "is neither a version's number nor an alias"),
        (("pull", "--version", ""), "is neither a version's number nor an alias"),
        (("pull", "--vers", "1"), "unrecognized arguments: --vers 1"),
        (("sample", "--digit", "10"), "a whole number, 0 to 9, not '10'"),
        (("sample", "--digit", "x"), "a whole number, 0 to 9, not 'x'"),
        (("sample", "--digit", "-1"), "a whole number, 0 to 9, not '-1'"),
        (("sample", "--num", "0"), "a whole number, 1 to 10000, not '0'"),
        (("sample", "--num", "10001"), "a whole number, 1 to 10000, not '10001'"),
        (("sample", "--num", "1e3"), "a whole number, 1 to 10000, not '1e3'"),
        (("sample", "--seed", f"{NUM_SEEDS}"), f"a whole number, 0 to {NUM_SEEDS - 1}, not"),
        (("sample", "--to-seed", f"{NUM_SEEDS}"), f"a whole number, 0 to {NUM_SEEDS - 1}, not"),
        (("sample", "--seed", "²"), "a whole number, 0 to"),
        (("sample", "--temperature", "2.1"), "a number, 0 to 2, not '2.1'"),
        (("sample", "--temperature", "nan"), "a number, 0 to 2, not 'nan'"),
        (("sample", "--to-seed", "1", "--temperature", "1"), "not allowed with argument"),
        (("sample", "--out", "a.jpg"), "does not end in .png"),
        (("sample", "--out", "no/where.png"), "there is no folder no"),
        (("sample", "--out", f"{'a' * 300}/x.png"), "aaa: File name too long"),
        (("sample", "--bundle", "x", "--version", "1"), "not allowed with argument"),
        (("sign", "x"), "the following arguments are required: --key"),
        (("verify",), "the following arguments are required: DIR"),
        (("versions", "extra"), "unrecognized arguments: extra"),
    ],
)
def test_nonsense_is_refused_with_a_sentence(
    refusal: Callable[..., str], folder: Path, options: tuple[str, ...], sentence: str
) -> None:
    assert sentence in refusal(*options)
    assert not list(folder.iterdir())


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("pull", "--version", "9"), "has no version or alias 9; its versions: 1, 2"),
        (("pull", "--version", "rival"), "has no version or alias 'rival'; its versions: 1, 2"),
        (("sample", "--version", "9"), "has no version or alias 9; its versions: 1, 2"),
        (("pull", "--to", "full"), "holds something that is not a bundle"),
        (("pull", "--to", "full/file"), "full/file"),
        (("pull", "--from", "bucket/prefix"), "s3://bucket"),
        (("pull", "--from", "s3://b"), "s3://bucket"),
        (("sample", "--bundle", "full"), "is not a whole bundle"),
        (("sample", "--bundle", "absent"), "is not a whole bundle"),
        (("sample", "--to-seed", "0"), "the way needs two seeds, not 0 twice"),
        (("sample", "--out", "folder.png"), "cannot write folder.png: Is a directory"),
        (("verify", "absent"), "is not a whole bundle"),
        (("sign", "absent", "--key", "absent"), "is not a whole bundle"),
        (("rollback",), "has no former champion"),
    ],
)
@pytest.mark.usefixtures("here")
def test_what_cannot_be_done_is_said_in_one_sentence(
    refusal: Callable[..., str], folder: Path, options: tuple[str, ...], sentence: str
) -> None:
    (folder / "full").mkdir()
    (folder / "full" / "file").write_text("precious")
    (folder / "folder.png").mkdir()
    before = sorted(folder.rglob("*"))
    assert sentence in refusal(*options)
    assert sorted(folder.rglob("*")) == before, "nothing is left half done"
    assert (folder / "full" / "file").read_text() == "precious"


def test_full_disk_is_said_with_the_file_that_was_asked_for(
    refusal: Callable[..., str], monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    def fill(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", fill)
    said = refusal("sample", "--bundle", str(PRETRAINED), "--num", "1", "--out", "one.png")
    assert said == "error: cannot write one.png: No space left on device"
    assert not list(folder.iterdir())


@pytest.mark.parametrize("options", [("verify", str(PRETRAINED)), ("--help",)])
def test_output_that_cannot_be_written_is_said(
    folder: Path, pytestconfig: pytest.Config, options: tuple[str, ...]
) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-c", "from flows.gan_command import main; main()", *options],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": str(pytestconfig.rootpath), "PYTHONUNBUFFERED": ""},
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode == 1
    assert done.stderr == "error: standard output: No space left on device\n"


@pytest.mark.parametrize(
    "command", ["from flows.gan_command import main; main()", "import flows.publish_generator"]
)
def test_user_without_a_home_is_told_to_set_one(
    folder: Path, pytestconfig: pytest.Config, command: str
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", BE_UNKNOWN_TO_THE_SYSTEM + command, "pull"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(pytestconfig.rootpath)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    said = done.stderr.splitlines()[-1]
    assert said == "error: this user has no home folder, and Prefect wants one: set HOME"
    assert "Traceback" not in done.stderr


def test_name_that_the_output_cannot_spell_is_no_fault(gan: Gan, folder: Path) -> None:
    shutil.copytree(PRETRAINED, folder / "größer")
    said = succeeded(gan("verify", "größer", PYTHONIOENCODING="ascii"))
    assert said.startswith(r"gr\xf6\xdfer: whole, ")


def test_one_that_is_terminated_leaves_nothing_half_done(
    folder: Path, pytestconfig: pytest.Config
) -> None:
    options = ("sample", "--bundle", str(PRETRAINED), "--num", "1", "--out", str(folder / "a.png"))
    done = subprocess.run(
        [sys.executable, "-c", BE_TERMINATED_WHILE_WRITING, *options],
        cwd=pytestconfig.rootpath,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (128 + signal.SIGTERM, "", "")
    assert not list(folder.iterdir())


@pytest.mark.parametrize(
    "command", [("pull",), ("sample", "--version", "1"), ("versions",), ("rollback",)]
)
def test_without_a_registry_none_is_made(
    refusal: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
    command: tuple[str, ...],
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
    assert "there is no registry yet" in refusal(*command)
    assert not list(folder.iterdir())


@pytest.mark.slow
def test_before_anything_is_registered_the_generator_of_the_package_draws(
    gan: Gan, folder: Path
) -> None:
    options = ("sample", "--digit", "3", "--num", "4", "--seed", "5", "--out", "threes.png")
    expected = tile(draw(load_bundle(PRETRAINED), [3], num=4, seed=5), columns=2)
    for registry in (None, folder / "mlflow.db"):
        if registry:
            MlflowClient(f"sqlite:///{registry}").search_registered_models()
        said = succeeded(gan(*options))
        assert said.startswith("nothing is registered yet: ")
        assert np.array_equal(Image.open(folder / "threes.png"), expected)
        assert registry or [each.name for each in folder.iterdir()] == ["threes.png"]


@pytest.mark.slow
def test_empty_registry_is_no_fault_of_the_user(gan: Gan, folder: Path) -> None:
    MlflowClient(f"sqlite:///{folder}/mlflow.db").search_registered_models()
    assert succeeded(gan("versions")) == f"{NAME} has no version yet\n"
    said = gan("pull")
    assert said.returncode == 1
    assert said.stderr == f"error: {NAME} has no version or alias 'champion'; its versions: none\n"


def test_registry_that_does_not_answer_is_said_in_seconds(gan: Gan, folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://user:secret@127.0.0.1:{server.getsockname()[1]}"
    started = time.perf_counter()
    done = gan("versions", MLFLOW_TRACKING_URI=address)
    assert time.perf_counter() - started < 20
    assert done.returncode == 1
    assert done.stderr.startswith("error: MLflow does not answer at http://127.0.0.1")
    assert "secret" not in done.stderr
    assert not list(folder.iterdir())


@pytest.mark.parametrize("command", ["pull", "sample", "rollback"])
def test_every_command_asks_first_whether_the_registry_answers(
    refusal: Callable[..., str], monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    assert "MLflow does not answer at http://127.0.0.1:1" in refusal(command)


@pytest.mark.parametrize(
    "address", ["nonsense://u:secret@there", "sqlite:////dev/null", "http://[::"]
)
def test_registry_that_is_none_is_said(
    refusal: Callable[..., str], monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    said = refusal("versions")
    assert said.startswith("error: ")
    assert "secret" not in said
