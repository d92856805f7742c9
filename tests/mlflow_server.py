"""A real MLflow server on loopback that can go away and come back."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest


class MlflowServer:
    """An MLflow server on one port and folder, as often as it is started."""

    def __init__(self, folder: Path, store: str | None = None) -> None:
        self.folder = folder
        self.store = store or f"sqlite:///{folder}/mlflow.db"
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    @contextmanager
    def running(self) -> Iterator[None]:
        with (self.folder / "server.log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "mlflow", "server", "--workers", "1"],
                cwd=self.folder,
                env=os.environ
                | {
                    "MLFLOW_PORT": str(self.port),
                    "MLFLOW_BACKEND_STORE_URI": self.store,
                    "MLFLOW_ARTIFACTS_DESTINATION": str(self.folder / "artifacts"),
                    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
                },
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        try:
            for _ in range(300):
                try:
                    if httpx.get(f"{self.url}/health").is_success:
                        break
                except httpx.TransportError:
                    time.sleep(0.1)
            else:
                pytest.fail((self.folder / "server.log").read_text())
            yield
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
