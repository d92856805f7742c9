"""One training in two processes, started by torchrun, against the same in one."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gan.config import ConvConfig, MlpConfig
from gan.recipes import quick, vanilla
from gan.training import TrainState, train
from tests.gan.test_training import noise_data

SHORT = {"epochs": 3, "batch_size": 64, "precision": "float32"}
CONFIGS = {
    "mlp": replace(vanilla(), networks=MlpConfig(dropout=0.0), **SHORT),
    "dropout": replace(vanilla(), **SHORT),
    "conv": replace(quick(), networks=ConvConfig(width=4), **SHORT),
    "relativistic": replace(quick(), networks=ConvConfig(width=4), loss="relativistic", **SHORT),
}
NUM_IMAGES = 640
SCRIPT = """
import sys
from datetime import timedelta
from torch import distributed
from gan.config import ConfigError
from tests.gan.test_parallel import CONFIGS, follow, replace

distributed.init_process_group("gloo", timeout=timedelta(seconds=60))
follow(f"{sys.argv[1]}/{distributed.get_rank()}.json")
try:
    follow("/dev/null", {"odd": replace(CONFIGS["mlp"], batch_size=63)})
except ConfigError as error:
    print(error)
distributed.destroy_process_group()
"""


def follow(path: str, configs: dict[str, Any] = CONFIGS) -> None:
    """Train by each config; writes down the losses of each epoch and a sum over the weights."""
    done = {}
    for name, config in configs.items():
        state = TrainState(config, torch.device("cpu"))
        for _ in train(state, noise_data(NUM_IMAGES)):
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
    assert "batch_size must be a multiple of the 2 processes, not 63" in done.stdout
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
    # The first is the same mathematics: what is left is the order of sums.
    [("mlp", 1e-4), ("dropout", 0.05), ("conv", 0.05), ("relativistic", 0.05)],
)
def test_two_processes_learn_as_one_does_with_the_same_batch(
    name: str, tolerance: float, curves: tuple[dict[str, Any], ...]
) -> None:
    alone, together, _ = curves
    ours, theirs = (torch.tensor(each[name]["losses"]) for each in (together, alone))
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance / 10)
