"""The stopwatch, the table and the files that the benchmarks write."""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from itertools import count as count_up
from pathlib import Path
from types import ModuleType

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import pipeline, textbook
from benchmarks.measuring import (
    Machine,
    Measured,
    count,
    interleave,
    launch,
    options,
    save,
    table,
    wait_for_device,
)


def test_contestants_take_turns_and_the_first_round_does_not_count() -> None:
    turns: list[str] = []

    def contestant(name: str, amount: int) -> Iterator[int]:
        for times in count_up(1):
            turns.append(name)
            yield amount * times

    found = interleave(
        {name: lambda name=name: contestant(name, 10) for name in "abc"},  # type: ignore[misc]
        rounds=2,
        seconds=1e-9,
    )
    assert "".join(turns) == "abc" + "bca" + "cab"
    assert [len(measured.rounds) for measured in found.values()] == [2, 2, 2]
    assert all(rate > 0 for measured in found.values() for rate in measured.rounds)


@given(st.lists(st.floats(0, 1e6), min_size=1))
def test_the_median_lies_among_the_rounds(rounds: list[float]) -> None:
    measured = Measured(rounds=tuple(rounds))
    assert min(rounds) <= measured.median <= max(rounds)


def test_a_spread_names_median_and_ends() -> None:
    assert Measured(rounds=(1500.4, 900.0, 1200.0)).spread() == "1,200 (900 to 1,500)"
    assert Measured(rounds=(0.5,)).spread(".2f") == "0.50 (0.50 to 0.50)"


def test_a_table_has_as_many_cells_in_each_line() -> None:
    lines = table(["what", "images/s"], [["ours", "3"], ["theirs", ""]]).splitlines()
    assert len(lines) == 4
    assert {line.count("|") for line in lines} == {3}


def test_what_is_saved_says_on_which_machine_and_comes_back(tmp_path: Path) -> None:
    save(tmp_path / "new", "speed", {"rates": {"ours": Measured(rounds=(1.0, 2.5))}})
    content = json.loads((tmp_path / "new" / "speed.json").read_text())
    assert content["machine"] == asdict(Machine.here())
    assert content["rates"] == {"ours": {"rounds": [1.0, 2.5]}}


def test_the_machine_is_described_in_a_line() -> None:
    here = Machine.here()
    assert "\n" not in str(here)
    for part in (here.processor, here.torch, here.commit, f"{here.threads} threads"):
        assert part in str(here)
    assert here.commit == pytest.approx(Machine.here().commit)


@pytest.mark.parametrize("text", ["0", "-1", "many"])
def test_less_than_one_round_is_refused(text: str) -> None:
    parser = options("speed")
    parser.add_argument("--rounds", type=count)
    with pytest.raises(SystemExit) as stopped:
        parser.parse_args(["--rounds", text])
    assert stopped.value.code == 2
    assert parser.parse_args(["--rounds", "1"]).rounds == 1


@pytest.mark.parametrize("module", [pipeline, textbook], ids=lambda module: module.__name__)
def test_what_cannot_be_done_is_refused_before_anything_is_measured(
    module: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mistyped option of one that hands options on, and a folder that is no bundle's."""
    asked = ["--out", str(tmp_path)] if module is textbook else ["--turns", "3"]
    monkeypatch.setattr(sys, "argv", ["benchmark", *asked])
    monkeypatch.chdir(tmp_path)  # without any data
    with pytest.raises(SystemExit) as stopped:
        module.main()
    assert stopped.value.code == 2


def test_what_the_disk_refuses_and_ctrl_c_end_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # that of the tests stays
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match=r"^error: .*File exists.*file"):
        launch(lambda: save(tmp_path / "file", "speed", {}))

    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit, match=r"^interrupted$"):
        launch(interrupted)


def test_sigterm_ends_what_was_started_as_well(pytestconfig: pytest.Config) -> None:
    child = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    script = (
        "import subprocess, sys; from benchmarks.measuring import launch\n"
        f"launch(lambda: subprocess.run([sys.executable, '-c', {child!r}]))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=pytestconfig.rootpath,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as benchmark:
        assert benchmark.stdout
        started = int(benchmark.stdout.readline())
        benchmark.terminate()
        assert benchmark.wait(30) == 1
        assert not psutil.pid_exists(started)
        assert benchmark.stderr
        assert benchmark.stderr.read() == "ended by SIGTERM\n"


def test_every_kind_of_gpu_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[bool] = []
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda: waits.append(True))
    wait_for_device()
    assert waits == [True]
