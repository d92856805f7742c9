"""One training on several devices: this process takes the first, and starts a peer for each other.

The peers go through the same `train` from the same state, and after every step all hold the same
weights. So this process alone reports, draws and writes, and a peer ends with it, whatever ends it.
"""

from __future__ import annotations

import math
import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed

from gan.checkpoint import Checkpoints
from gan.config import ConfigError, TrainConfig
from gan.data import load_mnist
from gan.errors import OUT_OF_MEMORY, UserError
from gan.exchange import require_even_shares
from gan.training import DivergenceError, TrainState, train

READY = b"ready\n"
GRACE_S = 1.0
"""How long a process may take to be gone once its connection is."""
SILENCE_S = 600.0
"""How long one may be silent, as with NCCL; gloo would wait for half an hour."""
TIMEOUT = re.compile(r"timed out|timeout", re.IGNORECASE)
WAY_OUT = "the same training, resumed, goes on from its last checkpoint"


class PeerError(UserError):
    """A process that took its share of a training is gone."""


def check_devices(num: int, kind: str, batch_size: int) -> None:
    """See that a training can be shared out. On the CPU a device is a process.

    Raises:
        ConfigError: there are not so many devices of this kind, or the batch has no equal shares.
    """
    there = {"cuda": torch.cuda.device_count(), "mps": 1}.get(kind, num)
    if num > there:
        raise ConfigError(f"devices must be at most {there}, as {kind} has no more here, not {num}")
    require_even_shares(batch_size, num)


@contextmanager
def share_out(
    state: TrainState, num: int, data_dir: Path, folder: Path
) -> Iterator[Callable[[], None]]:
    """Have `num` devices take the steps of `train`, as long as the block lasts.

    Gives a function that raises if a peer is gone. Ask it before a state is kept: on a GPU, an
    exchange that broke off leaves one that looks whole.

    Args:
        state: that in `folder`'s checkpoints, or a new one; it lies on the first device.
        num: devices to share each batch; with 1 nothing happens.
        data_dir: where MNIST's raw files lie.
        folder: of the training. What ends a peer by itself stands there in `.peer-1.log` and so on.

    Raises:
        MemoryError: a peer is gone because its share does not fit.
        PeerError: a peer is gone otherwise, or silent. What is in the checkpoints is whole.
    """
    if num == 1:
        yield lambda: None
        return
    kind, data_dir, folder = state.device.type, data_dir.absolute(), folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ".meeting").unlink(missing_ok=True)
    # The peers are on this machine, and shall listen to nothing beyond it.
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        os.environ.setdefault(variable, socket.if_indextoname(1))

    with ExitStack() as stack:
        threads = max(1, torch.get_num_threads() // num)
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(threads)
        peers = []
        for rank in range(1, num):
            job = (state.config, kind, data_dir, folder, rank, num, threads)
            peers.append(stack.enter_context(_start(job, folder / f".peer-{rank}.log")))
            stack.callback(peers[-1].kill)

        def check() -> None:
            for rank, peer in enumerate(peers, 1):
                if peer.poll() is not None:
                    raise _explain(peer.returncode, rank, num, folder)

        for peer in peers:
            assert peer.stdout
            if peer.stdout.readline() != READY:
                peer.wait()
                check()
        try:
            _join(kind, 0, num, folder)
            stack.callback(_leave, kind)
            if kind == "cuda":
                for peer in peers:
                    threading.Thread(target=_abort_without, args=[peer], daemon=True).start()
            yield check
        except Exception as error:
            time.sleep(GRACE_S)
            check()
            if isinstance(error, RuntimeError) and TIMEOUT.search(str(error)):
                raise PeerError(
                    f"the processes of {num} devices have not heard of each other for "
                    f"{SILENCE_S:.0f} s; {WAY_OUT}"
                ) from error
            raise


def _start(job: tuple[object, ...], log: Path) -> subprocess.Popen[bytes]:
    with log.open("wb") as stderr:
        peer = subprocess.Popen(
            [sys.executable, "-m", "gan.parallel"],
            cwd=Path(__file__).parents[1],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            # Ctrl-C is for this process, which keeps a checkpoint before all end.
            start_new_session=True,
        )
    assert peer.stdin
    pickle.dump(job, peer.stdin)
    peer.stdin.flush()
    return peer


def _explain(code: int, rank: int, num: int, folder: Path) -> MemoryError | PeerError:
    said = (folder / f".peer-{rank}.log").read_text(errors="replace").split("\n")
    gone = f"the process of device {rank + 1} of {num} is gone"
    # Not only the last line: a library may warn of something else on the way out.
    for line in reversed(said):
        if OUT_OF_MEMORY.search(line):
            return MemoryError(f"{gone}: {line}")
    last = next((line for line in reversed(said) if line.strip()), "it said nothing")
    reason = f"ended by {signal.Signals(-code).name}" if code < 0 else last
    return PeerError(f"{gone}: {reason}; {WAY_OUT}")


def _join(kind: str, rank: int, num: int, folder: Path) -> None:
    # Processes of one machine meet in a file: nothing listens for others to come.
    store = distributed.FileStore(str(folder / ".meeting"), num)  # type: ignore[attr-defined]
    backend = "nccl" if kind == "cuda" else "gloo"
    # A group that did not come about keeps its number, which is part of all that is written in the
    # file; in a new peer the count begins at 0, and neither would find the other.
    distributed.distributed_c10d._world.group_count = 0
    distributed.init_process_group(
        backend, store=store, rank=rank, world_size=num, timeout=timedelta(seconds=SILENCE_S)
    )


def _leave(kind: str) -> None:
    if kind == "cuda" and distributed.group.WORLD:
        # Ended in order, NCCL would wait for the peers.
        distributed.group.WORLD.abort()
    distributed.destroy_process_group()


def _abort_without(peer: subprocess.Popen[bytes]) -> None:
    """Break off what waits for a peer that is gone, as gloo does and NCCL does not."""
    peer.wait()
    if distributed.group.WORLD:
        distributed.group.WORLD.abort()


def follow(
    config: TrainConfig,
    kind: str,
    data_dir: Path,
    folder: Path,
    rank: int,
    num: int,
    threads: int,
) -> None:
    """Be a peer: take this rank's share of the training in `folder`, and nothing else."""
    torch.set_num_threads(threads)
    if kind == "cuda":
        torch.cuda.set_device(rank)
    device = torch.device(kind)
    data = load_mnist(data_dir, device).train
    state = Checkpoints(folder / "checkpoints").load(config, device) or TrainState(config, device)
    os.write(sys.stdout.fileno(), READY)
    _join(kind, rank, num, folder)
    # What the losses mean is for the first process to say.
    with suppress(DivergenceError):
        for _ in train(state, data, report_every_s=math.inf):
            pass


def main() -> None:
    """Do what the first process writes to the standard input, until that is closed."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    job = pickle.load(sys.stdin.buffer)

    def end_with_first() -> None:
        os.read(sys.stdin.fileno(), 1)
        os._exit(0)

    ending = threading.Thread(target=end_with_first, daemon=True)
    ending.start()
    follow(*job)
    ending.join()


if __name__ == "__main__":
    main()
