import json
import logging
import multiprocessing
import os
import random
import resource
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gan.checkpoint import CheckpointError, Checkpoints, find_config
from gan.config import ConvConfig, TrainConfig
from gan.recipes import quick, vanilla
from gan.training import TrainState, train
from tests.gan.test_training import noise_data, trained, weights

CPU = torch.device("cpu")
VANILLA = replace(vanilla(), epochs=2, batch_size=4)
QUICK = replace(
    quick(),
    networks=ConvConfig(latent_dim=4, width=2, fine_layers=1, dots=2),
    epochs=3,
    batch_size=4,
    penalty_interval=2,
    ema_halflife_images=10,
)
CONFIGS = [VANILLA, QUICK, replace(QUICK, loss="relativistic", r2_gamma=0.1)]
STEPS_PER_EPOCH = 3


def losses(state: TrainState) -> list[tuple[float, ...]]:
    return [(p.epoch, p.step, p.d_loss, p.g_loss, p.d_real, p.d_fake) for p in state.history]


def everything(state: TrainState) -> list[object]:
    """All that decides how the training goes on, to the last bit."""
    moments = [
        each[name].numpy().tobytes()
        for optimizer in (state.g_optimizer, state.d_optimizer)
        for _, each in sorted(optimizer.state_dict()["state"].items())
        for name in sorted(each)
    ]
    rng, order = state.rng.get_state().tolist(), state.order.tolist()
    return [weights(state), moments, rng, order, state.totals.tolist(), state.step, losses(state)]


def run(config: TrainConfig, checkpoints: Checkpoints, num_steps: int) -> TrainState:
    """Go on from the newest checkpoint for some steps, and save."""
    state = checkpoints.load(config, CPU) or TrainState(config, CPU)
    for taken, _ in enumerate(train(state, noise_data(), report_every_s=0), start=1):
        if taken == num_steps:
            break
    checkpoints.save(state)
    return state


@pytest.mark.parametrize("config", CONFIGS, ids=["vanilla", "quick", "relativistic"])
@settings(max_examples=6)
@given(pieces=st.lists(st.integers(1, 4), min_size=1, max_size=8))
def test_training_in_pieces_is_training_in_one(
    config: TrainConfig, pieces: list[int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    checkpoints = Checkpoints(tmp_path_factory.mktemp("checkpoints"))
    for num_steps in pieces:
        run(config, checkpoints, num_steps)
    assert everything(run(config, checkpoints, 1000)) == everything(trained(config))


def test_a_finished_training_takes_no_step_more(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    finished = run(QUICK, checkpoints, 1000)
    again = checkpoints.load(QUICK, CPU)
    assert again is not None
    assert list(train(again, noise_data())) == []
    assert everything(again) == everything(finished)


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert Checkpoints(tmp_path / "nowhere").load(QUICK, CPU) is None
    assert find_config(tmp_path / "nowhere") is None


def test_the_newest_two_are_kept_and_no_scratch_file(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    (tmp_path / ".torn").write_bytes(b"half")
    for _ in range(4):
        run(QUICK, checkpoints, 1)
    assert [path.name[:17] for path in checkpoints.find()] == [
        "step-000000000004",
        "step-000000000003",
    ]
    assert len(list(tmp_path.iterdir())) == 2


@settings(
    max_examples=12,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(place=st.floats(0, 1, exclude_max=True), cut=st.booleans())
def test_a_torn_or_altered_newest_one_falls_back_to_the_one_before(
    place: float, cut: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = Checkpoints(tmp_path)
    for old in checkpoints.find():
        old.unlink()
    run(QUICK, checkpoints, 2)
    run(QUICK, checkpoints, 2)
    newest = checkpoints.find()[0]
    payload = bytearray(newest.read_bytes())
    at = int(place * len(payload))
    if cut:
        del payload[at:]
    else:
        payload[at] ^= 1
    newest.write_bytes(payload)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        state = checkpoints.load(QUICK, CPU)
    assert state is not None
    assert state.step == 2
    assert "torn or altered" in caplog.text
    assert everything(run(QUICK, checkpoints, 1000)) == everything(trained(QUICK))


@pytest.mark.parametrize("num_torn", [1, 2])
def test_torn_ones_that_lie_ahead_push_out_none_that_is_whole(
    num_torn: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = Checkpoints(tmp_path)
    for _ in range(2):
        run(QUICK, checkpoints, 3)
    for ahead in checkpoints.find()[:num_torn]:
        ahead.write_bytes(b"torn")
    begun = 0 if num_torn == 2 else 3
    for step in (begun + 1, begun + 2):
        run(QUICK, checkpoints, 1)
        caplog.clear()
        state = checkpoints.load(QUICK, CPU)
        assert state is not None
        assert state.step == step
        assert "torn" not in caplog.text
    assert [find.name[:17] for find in checkpoints.find()] == [
        f"step-{step:012}" for step in (begun + 2, begun + 1)
    ]


def test_where_all_are_torn_it_starts_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = Checkpoints(tmp_path)
    run(QUICK, checkpoints, 2)
    run(QUICK, checkpoints, 2)
    for path in checkpoints.find():
        path.write_bytes(b"")
    with caplog.at_level(logging.WARNING):
        assert checkpoints.load(QUICK, CPU) is None
    assert caplog.text.count("torn or altered") == 2


def test_one_of_another_config_is_refused_with_what_differs(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    run(QUICK, checkpoints, 1)
    with pytest.raises(CheckpointError, match=r"epochs 3 instead of 4, seed 0 instead of 5$"):
        checkpoints.load(replace(QUICK, epochs=4, seed=5), CPU)
    with pytest.raises(CheckpointError, match="architecture ConvConfig instead of MlpConfig"):
        checkpoints.load(VANILLA, CPU)
    with pytest.raises(CheckpointError, match="device cpu instead of meta"):
        checkpoints.load(QUICK, torch.device("meta"))


def test_one_of_other_data_is_refused(tmp_path: Path) -> None:
    run(QUICK, Checkpoints(tmp_path), 1)
    state = Checkpoints(tmp_path).load(QUICK, CPU)
    assert state is not None
    with pytest.raises(ValueError, match="began with 14 images and cannot go on with 15"):
        next(train(state, noise_data(15)))


def test_one_of_an_unknown_schema_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(QUICK, Checkpoints(tmp_path), 1)
    monkeypatch.setattr("gan.checkpoint.SCHEMA_VERSION", "2")
    with pytest.raises(CheckpointError, match="has schema 1; this code reads 2"):
        Checkpoints(tmp_path).load(QUICK, CPU)


def test_the_config_can_be_read_without_the_weights(tmp_path: Path) -> None:
    run(QUICK, Checkpoints(tmp_path), 1)
    found = find_config(tmp_path)
    assert found is not None
    assert found["recipe"] == "quick"
    assert found["networks"]["width"] == 2
    assert json.dumps(found)


def test_saves_only_when_due(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("gan.checkpoint.time.monotonic", lambda: now)
    checkpoints, state = Checkpoints(tmp_path, every_s=30), TrainState(QUICK, CPU)
    for now, there in ((100, 0), (129, 0), (130, 1), (159, 1), (160, 2)):
        state.step = int(now)
        checkpoints.save_if_due(state)
        assert len(checkpoints.find()) == there


def test_slow_saving_makes_it_seldomer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 30.0, 32.0, 229.0, 232.5, 233.0])
    monkeypatch.setattr("gan.checkpoint.time.monotonic", lambda: next(clock))
    checkpoints, state = Checkpoints(tmp_path, every_s=30), TrainState(QUICK, CPU)
    checkpoints.save_if_due(state)  # takes two seconds: the next in two hundred
    state.step = 1
    checkpoints.save_if_due(state)
    assert len(checkpoints.find()) == 1
    checkpoints.save_if_due(state)
    assert len(checkpoints.find()) == 2


def test_a_full_disk_leaves_the_checkpoints_there_were(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    run(QUICK, checkpoints, 1)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    script = (
        "import resource, sys, signal; from pathlib import Path;"
        "from tests.gan.test_checkpoint import *;"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000));"
        "run(QUICK, Checkpoints(Path(sys.argv[1])), 1)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        check=False,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": "."},
    )
    assert (
        f"CheckpointError: cannot write a checkpoint to {tmp_path}: File too large" in done.stderr
    )
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match=r"cannot write a checkpoint to .*file"):
        Checkpoints(tmp_path / "file").save(TrainState(QUICK, CPU))


@pytest.mark.skipif(os.getuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(CheckpointError, match="Permission denied"):
        Checkpoints(tmp_path / "below").save(TrainState(QUICK, CPU))


def test_memory_is_not_held_after_saving(tmp_path: Path) -> None:
    checkpoints, state = Checkpoints(tmp_path), TrainState(vanilla(), CPU)
    checkpoints.save(state)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for step in range(1, 10):
        state.step = step
        checkpoints.save(state)
    grown_mb = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown_mb < 60


LONG = replace(QUICK, epochs=60 if os.environ.get("CHAOS_RUNS") else 12)


def train_to_the_end(folder: Path) -> None:
    """Go on from the newest checkpoint, saving after every step."""
    checkpoints = Checkpoints(folder, every_s=0)
    state = checkpoints.load(LONG, CPU) or TrainState(LONG, CPU)
    for _ in train(state, noise_data(), report_every_s=0):
        checkpoints.save_if_due(state)


@pytest.mark.chaos
def test_killed_at_any_step_and_write_it_ends_with_the_same_bytes(tmp_path: Path) -> None:
    """SIGKILL while a checkpoint is written, most of the time: every step writes one."""
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["tests.gan.test_checkpoint"])
    seed = int(os.environ.get("CHAOS_SEED") or random.SystemRandom().randrange(10**6))
    rng, killed, torn = random.Random(seed), 0, 0
    print(f"seed {seed}")
    while True:
        process = processes.Process(target=train_to_the_end, args=(tmp_path,))
        newest = Checkpoints(tmp_path).find()[:1]
        process.start()
        while process.is_alive() and Checkpoints(tmp_path).find()[:1] == newest:
            time.sleep(0.001)
        process.join(rng.uniform(0, 0.1))
        if process.exitcode == 0:
            break
        process.kill()
        process.join()
        killed += 1
        torn += len(list(tmp_path.glob(".*")))
    print(f"killed {killed} times, {torn} of them in the middle of a write")
    finished = Checkpoints(tmp_path).load(LONG, CPU)
    assert finished is not None
    assert killed >= 5
    assert everything(finished) == everything(trained(LONG))
