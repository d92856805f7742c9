import os
from pathlib import Path

import pytest

# Servers and several processes at once are what tests are about. Two threads of one training that
# wait for each other on a busy machine of two cores make a step ten times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def mnist_dir(pytestconfig: pytest.Config) -> Path:
    """The folder of the four real IDX files, downloaded once into the project's data folder."""
    from tasks.data import fetch_mnist
    from tasks.mnist_sources import default_sources
    from tasks.settings import load_settings

    settings = load_settings()
    folder = pytestconfig.rootpath / settings.data_dir
    return fetch_mnist(folder, default_sources(settings.data_mirrors)).folder
