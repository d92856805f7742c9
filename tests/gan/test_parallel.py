"""One training in several processes, against the same in one, and when a process is killed."""

import json
import os
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gan import parallel
from gan.config import ConfigError, ConvConfig, MlpConfig
from gan.parallel import PeerError, check_devices, share_out
from gan.recipes import quick, vanilla
from gan.training import TrainState, train
from tests.deployments.local_stack import wait_for
from tests.gan.test_training import noise_data

SHORT = {"epochs": 3, "batch_size": 64, "precision": "float32"}
CONV = ConvConfig(width=4, fine_layers=1, dots=2)
CONFIGS = {
    "mlp": replace(vanilla(), networks=MlpConfig(dropout=0.0), **SHORT),
    "dropout": replace(vanilla(), **SHORT),
    "conv": replace(quick(), networks=CONV, learning_rate=2.5e-4, **SHORT),
    "relativistic": replace(
        quick(), networks=CONV, learning_rate=2.5e-4, loss="relativistic", **SHORT
    ),
    "six large steps": replace(quick(), networks=CONV, **SHORT),
}
NUM_IMAGES = dict.fromkeys(CONFIGS, 640) | {"six large steps": 128}
"""Thirty steps; in as many large ones the order of sums grows into another course."""
SCRIPT = """
import sys
from datetime import timedelta
from torch import distributed
from gan.config import ConfigError
from tests.gan.test_parallel import CONFIGS, follow, replace

distributed.init_process_group("gloo", timeout=timedelta(seconds=60))
follow(f"{sys.argv[1]}/{distributed.get_rank()}.json")
try:
    follow("/dev/null", {"mlp": replace(CONFIGS["mlp"], batch_size=63)})
except ConfigError as error:
    print(error)
distributed.destroy_process_group()
"""


def follow(path: str, configs: dict[str, Any] = CONFIGS) -> None:
    """Train by each config; writes down the losses of each epoch and a sum over the weights."""
    done = {}
    for name, config in configs.items():
        state = TrainState(config, torch.device("cpu"))
        for _ in train(state, noise_data(NUM_IMAGES[name])):
            pass
        weights = [value.double() for value in state.sampler.state_dict().values()]
        done[name] = {
            "losses": [[p.d_loss, p.g_loss, p.d_real, p.d_fake] for p in state.history],
            "weights": float(sum(value.sum() for value in weights)),
        }
    Path(path).write_text(json.dumps(done))


@pytest.fixture(scope="module")
def curves(
    tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config
) -> tuple[dict[str, Any], ...]:
    """What one process alone saw, and each of two together."""
    folder = tmp_path_factory.mktemp("parallel")
    script = folder / "script.py"
    script.write_text(SCRIPT)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*torchrun, "--nproc-per-node=2", str(script), str(folder)],
        check=False,
        capture_output=True,
        text=True,
        timeout=200,
        env=os.environ
        | {"PYTHONPATH": str(pytestconfig.rootpath), "OMP_NUM_THREADS": "1"}
        | {"GLOO_SOCKET_IFNAME": "lo"},
    )
    assert done.returncode == 0, done.stderr
    assert "batch_size must be a multiple of the 2 devices, not 63" in done.stdout
    follow(str(folder / "alone.json"))
    return tuple(json.loads((folder / f"{who}.json").read_text()) for who in ("alone", "0", "1"))


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_all_processes_see_the_same_and_end_with_the_same_weights(
    name: str, curves: tuple[dict[str, Any], ...]
) -> None:
    _, first, second = curves
    assert first[name] == second[name]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "tolerance"),
    # All but dropout is the same mathematics: what is left is the order of sums. With a batch norm
    # that saw half the batch the last would be 4% away.
    [
        ("mlp", 1e-4),
        ("dropout", 0.05),
        ("conv", 0.02),
        ("relativistic", 0.02),
        ("six large steps", 0.005),
    ],
)
def test_two_processes_learn_as_one_does_with_the_same_batch(
    name: str, tolerance: float, curves: tuple[dict[str, Any], ...]
) -> None:
    alone, together, _ = curves
    ours, theirs = (torch.tensor(each[name]["losses"]) for each in (together, alone))
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance / 10)
    if name != "dropout":
        assert together[name]["weights"] == pytest.approx(alone[name]["weights"], rel=tolerance)


CPU = torch.device("cpu")


@given(st.integers(1, 64), st.integers(1, 1000))
def test_a_batch_is_shared_out_only_in_equal_parts(num: int, share: int) -> None:
    check_devices(num, "cpu", num * share)
    if num > 1:
        with pytest.raises(ConfigError, match=f"a multiple of the {num} devices, not"):
            check_devices(num, "cpu", num * share + 1)


def test_devices_that_are_not_there_are_refused() -> None:
    for kind, there in (("mps", 1), ("cuda", torch.cuda.device_count())):
        sentence = f"devices must be at most {there}, as {kind} has no more here, not {there + 1}"
        with pytest.raises(ConfigError, match=sentence):
            check_devices(there + 1, kind, 64 * (there + 1))


def find_peers() -> list[psutil.Process]:
    """This process's peers that are alive; other tests may have started something else."""
    found = []
    for process in psutil.Process().children():
        with suppress(psutil.Error):
            if "gan.parallel" in process.cmdline():
                found.append(process)
    return found


def test_one_device_needs_no_peer(tmp_path: Path) -> None:
    with share_out(TrainState(CONFIGS["conv"], CPU), 1, tmp_path, tmp_path) as check:
        assert find_peers() == []
        check()
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_peer_that_cannot_begin_is_said_with_its_reason(tmp_path: Path) -> None:
    """Here it finds no data."""
    threads = torch.get_num_threads()
    state = TrainState(CONFIGS["conv"], CPU)
    with (
        pytest.raises(PeerError, match=r"device [23] of 3 is gone: .*cannot read .*ubyte"),
        share_out(state, 3, tmp_path / "nowhere", tmp_path),
    ):
        pytest.fail("it began")
    assert find_peers() == []
    assert torch.get_num_threads() == threads


def use_as_peer(script: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a script be the peer, from when it is told its job on."""
    peer = folder / "peer"
    peer.write_text(f"#!/bin/sh\nhead -c 1 > /dev/null\n{script}")
    peer.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(peer))


@pytest.mark.parametrize(
    ("said", "kind", "sentence"),
    [
        ("torch.OutOfMemoryError: CUDA out of memory.", MemoryError, "CUDA out of memory"),
        ("CUDA out of memory.\n[W] not destroyed", MemoryError, "CUDA out of memory"),
        ("[rank1]: DefaultCPUAllocator: can't allocate memory: 9", MemoryError, "can't allocate"),
        ("MemoryError", MemoryError, "MemoryError"),
        ("[rank1]: RuntimeError: could not create a primitive", MemoryError, "a primitive"),
        ("RuntimeError: no CUDA device", PeerError, "no CUDA device; the same training, resumed,"),
        ("", PeerError, "it said nothing; the same training, resumed,"),
    ],
)
def test_peer_without_memory_is_not_said_to_go_on(
    said: str,
    kind: type[Exception],
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Here a script that says what a peer would; it ends once it is told its job."""
    use_as_peer(f"cat >&2 <<'END'\n{said}\nEND\nexit 1\n", tmp_path, monkeypatch)
    with (
        pytest.raises(kind, match=f"^the process of device 2 of 2 is gone: .*{sentence}"),
        share_out(TrainState(CONFIGS["conv"], CPU), 2, tmp_path, tmp_path),
    ):
        pytest.fail("it began")


@pytest.mark.parametrize(
    ("script", "sentence"),
    [
        ("echo ready; echo no threads >&2", "device 2 of 2 is gone: no threads; the same"),
        ("echo ready; exec sleep 60", "2 devices have not heard of each other for 1 s; the same"),
    ],
    ids=["gone", "silent"],
)
def test_peer_that_does_not_join_is_not_waited_for_without_end(
    script: str, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_as_peer(script, tmp_path, monkeypatch)
    monkeypatch.setattr(parallel, "SILENCE_S", 1.0)
    with (
        pytest.raises(PeerError, match=sentence),
        share_out(TrainState(CONFIGS["conv"], CPU), 2, tmp_path, tmp_path),
    ):
        pytest.fail("it began")
    assert not torch.distributed.is_initialized()


@pytest.mark.slow
def test_a_training_begins_after_another_whose_peer_did_not_join(
    mnist_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a flow that is retried: in the same process, with new peers."""
    monkeypatch.setattr(parallel, "SILENCE_S", 20.0)
    with monkeypatch.context() as patched:
        use_as_peer("echo ready", tmp_path, patched)
        patched.setattr(parallel, "SILENCE_S", 1.0)
        with (
            pytest.raises(PeerError),
            share_out(TrainState(CONFIGS["conv"], CPU), 2, mnist_dir, tmp_path),
        ):
            pytest.fail("it began")
    with share_out(TrainState(CONFIGS["conv"], CPU), 2, mnist_dir, tmp_path) as check:
        check()
        assert torch.distributed.get_world_size() == 2


@pytest.mark.slow
@pytest.mark.chaos
@pytest.mark.parametrize("at_work", [False, True])
def test_no_peer_outlives_the_first_process(
    at_work: bool, mnist_dir: Path, tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    """Killed while its peers start, or in the middle of the training."""
    script = """
import sys
from pathlib import Path
import torch
from gan.data import load_mnist
from gan.parallel import share_out
from gan.recipes import vanilla
from gan.training import TrainState, train

data, folder = map(Path, sys.argv[1:])
state = TrainState(vanilla(), torch.device("cpu"))
with share_out(state, 2, data, folder):
    for _ in train(state, load_mnist(data).train):
        print("at work", flush=True)
"""
    with subprocess.Popen(
        [sys.executable, "-c", script, str(mnist_dir), str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(pytestconfig.rootpath)},
        stdout=subprocess.PIPE,
    ) as first:
        assert first.stdout
        if at_work:
            assert first.stdout.readline() == b"at work\n"
        peers = wait_for(
            lambda: psutil.Process(first.pid).children() or None, seconds=60, what="a peer"
        )
        first.kill()
    assert len(peers) == 1
    _, left = psutil.wait_procs(peers, timeout=30)
    assert left == []
