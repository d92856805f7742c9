"""Folders for PREFECT_HOME in which a server starts at once."""

import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory


@cache
def _read_empty_database() -> bytes:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    upgrade = (sys.executable, "-m", "prefect", "server", "database", "upgrade", "--yes")
    with TemporaryDirectory() as folder:
        environment = kept | {"PREFECT_HOME": folder}
        subprocess.run(upgrade, env=environment, check=True, stdout=subprocess.DEVNULL)
        return (Path(folder) / "prefect.db").read_bytes()


def prefect_home(folder: Path) -> str:
    """Make a folder for PREFECT_HOME that has the tables of a new one, and nothing in them.

    Prefect makes them at a server's first start, which takes longer than many a flow.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "prefect.db").write_bytes(_read_empty_database())
    return str(folder)
