"""MLflow's side of a training: its epochs arrive there in order and once, whatever happens."""

from __future__ import annotations

import os
import re
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from logging import Logger, LoggerAdapter
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import Metric
from PIL import Image
from prefect import get_run_logger

from gan.training import Progress
from tasks.services import ServiceError, check, find_services, without_password
from tasks.tracking import AWAY, PATIENCE_S

CURVES = ("d_loss", "g_loss", "d_real", "d_fake", "images_per_s")
PICTURE = re.compile(r"images/samples\D+step\D+(\d+)\D.*\.png")


def sheet_path(folder: Path, epoch: int) -> Path:
    """Where the sheet of an epoch lies in a run's folder."""
    return folder / "samples" / f"epoch-{epoch:04}.png"


class Journal:
    """Sends finished epochs from a thread of its own, so that no server holds up a training.

    While MLflow is away they wait here, at most one entry an epoch; what a process that dies takes
    with it is in the checkpoint's history, and offered again. What MLflow has already is not sent.
    """

    def __init__(self, mlflow_run_id: str, folder: Path) -> None:
        self.mlflow_run_id = mlflow_run_id
        self.folder = folder
        self.client = MlflowClient()
        self.logger: Logger | LoggerAdapter[Logger] = get_run_logger()
        self.waiting: deque[Progress] = deque()
        self._arrived: dict[str, int] | None = None
        self._away = self._closed = False
        self._reason = ""
        self._sender = ThreadPoolExecutor(1, thread_name_prefix="journal")
        self._sending: Future[None] | None = None

    def offer(self, progress: Progress) -> None:
        """Send an epoch's numbers, and its sheet if it has one, as soon as may be."""
        self.waiting.append(progress)
        # One look at a time: a server that is slow to refuse would have the end wait for them all.
        if self._sending is None or self._sending.done():
            self._sending = self._sender.submit(self._send)

    def deliver(self, patience_s: float = PATIENCE_S) -> None:
        """Wait until everything has arrived.

        Raises:
            ServiceError: the server stayed away for so long.
        """
        deadline = time.monotonic() + patience_s
        while True:
            self._sender.submit(self._send).result()
            if not self.waiting:
                return
            if time.monotonic() > deadline:
                tracking = os.environ.get("MLFLOW_TRACKING_URI", "the local store")
                address = without_password(tracking)
                raise ServiceError(
                    f"MLflow at {address} stayed away for {patience_s:g} s: {self._reason}"
                )
            time.sleep(1)

    def close(self) -> None:
        """Stop sending; what has not arrived stays in the checkpoint's history.

        What is under way is waited for: whoever goes on with this training asks what has arrived.
        """
        self._closed = True
        self._sender.shutdown(cancel_futures=True)

    def _send(self) -> None:
        if not self.waiting:
            return
        try:
            if server := find_services(os.environ).get("MLflow"):
                check("MLflow", server)
            if self._arrived is None:
                self._arrived = self._ask()
            # MLflow's pages open at step 0: there they find the generator before it learned.
            self._send_sheet(0, self._arrived)
            while self.waiting and not self._closed:
                self._send_epoch(self.waiting[0], self._arrived)
                self.waiting.popleft()
        except AWAY as error:
            # Whether the last request arrived is not known: ask before anything is sent again.
            self._arrived = None
            self._reason = without_password(str(error)).partition("\n")[0]
            if not self._away:
                self.logger.warning("MLflow is away, the training goes on: %s", self._reason)
            self._away = True
            return
        if self._away:
            self.logger.info("MLflow is back and has everything again")
        self._away = False

    def _ask(self) -> dict[str, int]:
        """The last epoch that MLflow has of each curve, and of the sheets."""
        arrived = {
            name: max(
                (p.step for p in self.client.get_metric_history(self.mlflow_run_id, name)),
                default=0,
            )
            for name in CURVES
        }
        files = self.client.list_artifacts(self.mlflow_run_id, "images")
        found = (PICTURE.fullmatch(file.path) for file in files)
        return arrived | {"sheet": max((int(match[1]) for match in found if match), default=-1)}

    def _send_epoch(self, progress: Progress, arrived: dict[str, int]) -> None:
        epoch = progress.epoch
        self._send_sheet(epoch, arrived)
        now = int(time.time() * 1000)
        metrics = [
            Metric(name, getattr(progress, name), now, epoch)
            for name in CURVES
            if epoch > arrived[name]
        ]
        if metrics:
            self.client.log_batch(self.mlflow_run_id, metrics=metrics)

    def _send_sheet(self, epoch: int, arrived: dict[str, int]) -> None:
        sheet = sheet_path(self.folder, epoch)
        if epoch > arrived["sheet"] and sheet.exists():
            with Image.open(sheet) as image:
                self.client.log_image(self.mlflow_run_id, image, key="samples", step=epoch)
            arrived["sheet"] = epoch


@contextmanager
def open_journal(mlflow_run_id: str, folder: Path, history: list[Progress]) -> Iterator[Journal]:
    """A journal that first offers what a training that goes on has in its history."""
    journal = Journal(mlflow_run_id, folder)
    try:
        for progress in history:
            journal.offer(progress)
        yield journal
    finally:
        journal.close()
