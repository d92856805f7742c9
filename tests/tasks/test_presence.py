import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from prefect import tags
from prefect.settings import PREFECT_HOME, temporary_settings

from tasks.presence import clear_dead, presence, untagged


@pytest.fixture(autouse=True)
def prefect_home(tmp_path: Path) -> Iterator[Path]:
    with temporary_settings({PREFECT_HOME: tmp_path}):
        yield tmp_path


def test_what_begins_inside_is_tagged_and_nothing_is_left() -> None:
    with presence("one"), tags() as current:
        assert current == {"process-one"}
    assert list(clear_dead()) == []


def test_the_tag_is_the_flow_runs_alone_and_not_its_tasks() -> None:
    @untagged
    def body() -> set[str]:
        with tags() as current:
            return current

    with presence("one"):
        assert body() == set()


def test_one_that_raised_is_cleared_once_whatever_prefect_knows() -> None:
    with pytest.raises(ZeroDivisionError), presence("one"):
        raise ZeroDivisionError
    assert list(clear_dead()) == ["process-one"]
    assert list(clear_dead()) == []


def test_a_process_is_dead_when_it_is_killed_and_not_before(prefect_home: Path) -> None:
    script = (
        "import time; from tasks.presence import presence\n"
        "with presence('one'): print('here', flush=True); time.sleep(60)"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": ".", "PREFECT_HOME": str(prefect_home)},
    )
    with other:
        assert other.stdout
        other.stdout.readline()
        assert list(clear_dead()) == []
        other.kill()
    assert list(clear_dead()) == ["process-one"]


def test_a_process_of_another_machine_is_not_judged_here(
    prefect_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ZeroDivisionError), presence("one"):
        raise ZeroDivisionError
    monkeypatch.setattr("socket.gethostname", lambda: "elsewhere")
    assert list(clear_dead()) == []
