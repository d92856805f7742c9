import os
from pathlib import Path

import pytest

from tasks.settings import Settings, SettingsError, load_settings


@pytest.fixture(autouse=True)
def _unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in list(os.environ):
        if variable.startswith("MNIST_GAN_"):
            monkeypatch.delenv(variable)


def test_defaults() -> None:
    settings = load_settings()
    assert settings.data_dir == Path("data/mnist")
    assert settings.runs_dir == Path("runs")
    assert settings.data_mirrors == ()


def test_the_environment_is_read_at_each_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MNIST_GAN_DATA_DIR", "/elsewhere")
    assert load_settings().data_dir == Path("/elsewhere")
    monkeypatch.setenv("MNIST_GAN_DATA_DIR", "")
    assert load_settings().data_dir == Path("data/mnist")


def test_a_tilde_is_the_users_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MNIST_GAN_DATA_DIR", "~/data")
    monkeypatch.setenv("MNIST_GAN_RUNS_DIR", "~")
    settings = load_settings()
    assert (settings.data_dir, settings.runs_dir) == (tmp_path / "data", tmp_path)


def test_mirrors_are_split_at_commas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(
        "MNIST_GAN_DATA_MIRRORS", "https://a.example/m, s3://bucket/some/prefix ,local/folder,/b"
    )
    assert load_settings().data_mirrors == (
        "https://a.example/m",
        "s3://bucket/some/prefix",
        "local/folder",
        "/b",
    )


def test_settings_can_be_given_directly() -> None:
    assert Settings(data_mirrors=("/a", "/b")).data_mirrors == ("/a", "/b")


@pytest.mark.parametrize(
    ("mirrors", "reason"),
    [
        ("ftp://a.example/m", "not an http"),
        ("https://", "not an http"),
        ("s3:///prefix", "not an http"),
        ("http://[::1/m", "address is none"),
        ("https://me:hunter2@[::1/m", "address is none"),
        ("https://me:hun/hunter2@a.example/m", "no user, password"),
        ("/a,,/b", "empty"),
        ("https://user:hunter2@a.example/m", "no user, password"),
        ("https://a.example/m?signature=hunter2", "query"),
        ("ftp://user:hunter2@a.example/m?signature=hunter2", "no user, password"),
    ],
)
def test_a_bad_mirror_is_one_sentence_that_tells_no_secret(
    monkeypatch: pytest.MonkeyPatch, mirrors: str, reason: str
) -> None:
    monkeypatch.setenv("MNIST_GAN_DATA_MIRRORS", mirrors)
    with pytest.raises(SettingsError, match=reason) as caught:
        load_settings()
    message = str(caught.value)
    assert message.startswith("MNIST_GAN_DATA_MIRRORS: ")
    assert "\n" not in message
    assert "hunter2" not in message
