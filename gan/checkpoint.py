"""Checkpoints: everything that a training needs to go on as if it had never been interrupted.

One safetensors file a checkpoint, no pickle: weights of the three networks, both optimizers, the
random state, the order of the data and the sums of the epoch under way; config, step and history
as JSON in its header. Its name holds its own sha256, so that a torn or altered one is noticed.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from gan.config import TrainConfig
from gan.errors import UserError
from gan.training import Progress, TrainState

SCHEMA_VERSION = "1"
NUM_KEPT = 2
"""The newest, and the one before in case that is torn."""
MAX_SHARE = 0.01
"""The share of the time that saving may take, whatever interval is asked for."""
NETWORKS = ("generator", "discriminator", "average")
OPTIMIZERS = ("g_optimizer", "d_optimizer")
_NAME = re.compile(r"step-(\d{12})-([0-9a-f]{64})\.safetensors")

logger = logging.getLogger(__name__)


class CheckpointError(UserError):
    """A checkpoint that cannot be written, or that belongs to another training."""


class Checkpoints:
    """The checkpoints of one training, in a folder of their own."""

    def __init__(self, folder: Path, *, every_s: float = 30.0) -> None:
        """`every_s` is the least time between two that `save_if_due` saves; 0: each time."""
        self.folder = folder
        self.every_s = every_s
        self._due = time.monotonic() + every_s

    def save_if_due(
        self, state: TrainState, check: Callable[[TrainState], None] | None = None
    ) -> None:
        """Save if the interval has passed; seldomer where checking and saving are slow.

        What `check` raises keeps a state from being saved.
        """
        started = time.monotonic()
        if started < self._due:
            return
        if check:
            check(state)
        self.save(state)
        now = time.monotonic()
        pause = self.every_s and max(self.every_s, (now - started) / MAX_SHARE)
        self._due = now + pause

    def save(self, state: TrainState) -> Path:
        """Write a checkpoint, whole or not at all; the one before is kept, older ones go.

        Raises:
            CheckpointError: the disk refuses; what was saved before is untouched.
        """
        payload = save(_tensors_of(state), _header_of(state))
        path = self.folder / f"step-{state.step:012}-{_sha256(payload)}.safetensors"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self.folder, prefix=".", delete=False) as file:
                try:
                    file.write(payload)
                    file.flush()
                    os.fsync(file.fileno())
                    Path(file.name).rename(path)
                except BaseException:
                    Path(file.name).unlink(missing_ok=True)
                    raise
            # What lies ahead is torn: it would push out those that are whole.
            found = self.find()
            past = [each for each in found if each.name <= path.name]
            for other in set(found) - set(past[:NUM_KEPT]):
                other.unlink(missing_ok=True)
            # Left by a process that was killed while it wrote.
            for torn in self.folder.glob(".*"):
                torn.unlink(missing_ok=True)
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            reason = "the disk is full" if full else error.strerror
            raise CheckpointError(f"cannot write a checkpoint to {self.folder}: {reason}") from None
        return path

    def find(self) -> list[Path]:
        """The checkpoints there are, the newest first."""
        return sorted(p for p in self.folder.glob("step-*") if _NAME.fullmatch(p.name))[::-1]

    def newest(self) -> tuple[Path, bytes] | None:
        """The newest checkpoint that is whole, and what is in it; None if there is none.

        A torn or altered one is passed over with a warning.
        """
        for path in self.find():
            try:
                payload = path.read_bytes()
            except FileNotFoundError:  # its training goes on, and has newer ones
                continue
            if _sha256(payload) == path.stem[-64:]:
                return path, payload
            logger.warning("%s is torn or altered; going back to the one before it", path)
        return None

    def load(self, config: TrainConfig, device: torch.device) -> TrainState | None:
        """The newest checkpoint that is whole, as a state to go on from; None if there is none.

        Raises:
            CheckpointError: it is of another config, kind of device or schema.
        """
        found = self.newest()
        return found and _restore(*found, config, device)


def find_config(folder: Path) -> dict[str, Any] | None:
    """The config, as plain values, of the newest whole checkpoint in a folder; None without one."""
    found = Checkpoints(folder).newest()
    return found and json.loads(_read_header(found[1])["config"])


def plain(config: TrainConfig) -> dict[str, Any]:
    """A config as plain values, as they are compared and kept in JSON."""
    return {"architecture": type(config.networks).__name__, **asdict(config)}


def _tensors_of(state: TrainState) -> dict[str, Tensor]:
    tensors = {"rng": state.rng.get_state(), "order": state.order, "totals": state.totals}
    for name in NETWORKS:
        for key, values in getattr(state, name).state_dict().items():
            tensors[f"{name}.{key}"] = values
    for name in OPTIMIZERS:
        for index, moments in getattr(state, name).state_dict()["state"].items():
            for key, values in moments.items():
                tensors[f"{name}.{index}.{key}"] = values
    # Copies: networks that share storage, or views, are refused by safetensors.
    return {
        key: values.detach().cpu().clone(memory_format=torch.contiguous_format)
        for key, values in tensors.items()
    }


def _header_of(state: TrainState) -> dict[str, str]:
    return {
        "schema": SCHEMA_VERSION,
        "config": json.dumps(plain(state.config)),
        "device": state.device.type,
        "step": str(state.step),
        "history": json.dumps([asdict(progress) for progress in state.history]),
    }


def _read_header(payload: bytes) -> dict[str, str]:
    # That of safetensors: its length, then JSON. A file of a training that goes on may be gone.
    length = int.from_bytes(payload[:8], "little")
    return dict(json.loads(payload[8 : 8 + length])["__metadata__"])


def _restore(path: Path, payload: bytes, config: TrainConfig, device: torch.device) -> TrainState:
    header = _read_header(payload)
    if header["schema"] != SCHEMA_VERSION:
        raise CheckpointError(
            f"{path} has schema {header['schema']}; this code reads {SCHEMA_VERSION}"
        )
    theirs, ours = json.loads(header["config"]), json.loads(json.dumps(plain(config)))
    theirs["device"], ours["device"] = header["device"], device.type
    if theirs != ours:
        names = [name for name in ours | theirs if theirs.get(name) != ours.get(name)]
        differences = ", ".join(f"{n} {theirs.get(n)} instead of {ours.get(n)}" for n in names)
        raise CheckpointError(f"{path.parent} belongs to another training: {differences}")

    state = TrainState(config, device)
    tensors = load(payload)
    state.step = int(header["step"])
    state.history = [Progress(**report) for report in json.loads(header["history"])]
    state.rng.set_state(tensors["rng"])
    state.order = tensors["order"].to(device)
    state.totals = tensors["totals"].to(device)
    for name in NETWORKS:
        getattr(state, name).load_state_dict(_below(name, tensors))
    for name in OPTIMIZERS:
        optimizer = getattr(state, name)
        weights = optimizer.param_groups[0]["params"]
        moments: dict[int, dict[str, Tensor]] = {}
        for key, values in _below(name, tensors).items():
            index, _, moment = key.partition(".")
            # Fused Adam counts on moments that lie in memory like their weights.
            moments.setdefault(int(index), {})[moment] = (
                values if moment == "step" else torch.empty_like(weights[int(index)]).copy_(values)
            )
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": moments, "param_groups": groups})
    return state


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        key.removeprefix(f"{prefix}."): values
        for key, values in tensors.items()
        if key.startswith(f"{prefix}.")
    }


def _sha256(payload: bytes) -> str:
    return hashlib.sha256(payload).hexdigest()
