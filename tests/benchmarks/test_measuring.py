"""The stopwatch, the table and the files that the benchmarks write."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from itertools import count
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.measuring import Machine, Measured, interleave, save, table


def test_contestants_take_turns_and_the_first_round_does_not_count() -> None:
    turns: list[str] = []

    def contestant(name: str, amount: int) -> Iterator[int]:
        for times in count(1):
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
