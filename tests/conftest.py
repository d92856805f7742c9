import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from tests.registry import Registry, register_two
from tests.s3_store import free_ports, s3_store

# Servers and several processes at once are what tests are about. Two threads of one training that
# wait for each other on a busy machine of two cores make a step ten times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# On a busy machine anything may take its time.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")


@pytest.fixture(scope="session", autouse=True)
def _checkout_stays_as_it_is(pytestconfig: pytest.Config) -> Iterator[None]:
    """No test leaves anything new in the checkout, such as an MLflow store."""
    kept = {"data", ".hypothesis", ".pytest_cache"}
    kept |= {path.name for path in pytestconfig.rootpath.iterdir()}
    yield
    left = {path.name for path in pytestconfig.rootpath.iterdir()} - kept
    assert not left, "left in the checkout by a test, or by what ran beside them"


@pytest.fixture(scope="session")
def mnist_dir(pytestconfig: pytest.Config) -> Path:
    """The folder of the four real IDX files, downloaded once into the project's data folder."""
    from tasks.data import fetch_mnist
    from tasks.mnist_sources import default_sources
    from tasks.settings import load_settings

    found = load_settings()
    folder = pytestconfig.rootpath / found.data_dir
    return fetch_mnist(folder, default_sources(found.data_mirrors)).folder


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The endpoint of a real S3-compatible store with an empty bucket ``mirrors``."""
    with s3_store(tmp_path_factory.mktemp("s3"), free_ports(5)) as url:
        yield url


@pytest.fixture(scope="session")
def registered(tmp_path_factory: pytest.TempPathFactory) -> Registry:
    """Two registered versions, to be used through a copy: see ``registry``."""
    return register_two(tmp_path_factory.mktemp("registered"))


@pytest.fixture
def registry(registered: Registry, tmp_path: Path) -> Iterator[Registry]:
    """A copy of that store, set as the tracking URI; its artifacts are shared."""
    from tests.mlflow_store import mlflow_store

    shutil.copy(registered.folder / "mlflow.db", tmp_path / "mlflow.db")
    with mlflow_store(tmp_path):
        yield registered
