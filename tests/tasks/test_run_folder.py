import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from prefect.runtime import flow_run

from gan.checkpoint import Checkpoints
from gan.config import ConvConfig, TrainConfig
from gan.recipes import quick
from gan.training import TrainState
from tasks.run_folder import (
    SCRATCH,
    RunFolderError,
    clear_scratch,
    finish,
    is_abandoned,
    lock_of,
    own_folder,
    own_run_folder,
)

CONFIG = replace(quick(), networks=ConvConfig(latent_dim=4, width=2))


@pytest.fixture(autouse=True)
def _flow_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flow_run, "get_id", lambda: "of-this-flow-run")


def interrupted(runs_dir: Path, name: str, config: TrainConfig, modified: int) -> Path:
    folder = runs_dir / name
    path = Checkpoints(folder / "checkpoints").save(TrainState(config, torch.device("cpu")))
    os.utime(path, (modified, modified))
    return folder


def test_a_new_run_has_the_folder_of_its_flow_run(tmp_path: Path) -> None:
    with own_run_folder(tmp_path / "runs", CONFIG, resume=False) as folder:
        assert folder == tmp_path / "runs" / "of-this-flow-run"
        assert folder.is_dir()


def test_resume_finds_the_newest_of_the_same_config(tmp_path: Path) -> None:
    interrupted(tmp_path, "older", CONFIG, modified=1000)
    wanted = interrupted(tmp_path, "newer", CONFIG, modified=2000)
    interrupted(tmp_path, "other", replace(CONFIG, seed=1), modified=3000)
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    with own_run_folder(tmp_path, CONFIG, resume=True) as folder:
        assert folder == wanted


def test_resume_passes_over_a_torn_checkpoint_of_any_training(tmp_path: Path) -> None:
    wanted = interrupted(tmp_path, "wanted", CONFIG, modified=2000)
    config = replace(CONFIG, seed=1)
    (one,) = Checkpoints(
        interrupted(tmp_path, "other", config, modified=3000) / "checkpoints"
    ).find()
    for length in (1000, 40, 4, 0):
        one.write_bytes(one.read_bytes()[:length])
        with own_run_folder(tmp_path, CONFIG, resume=True) as folder:
            assert folder == wanted
        with pytest.raises(RunFolderError), own_run_folder(tmp_path, config, resume=True):
            pass


def test_resume_finds_a_training_by_its_last_whole_checkpoint(tmp_path: Path) -> None:
    checkpoints = Checkpoints(interrupted(tmp_path, "wanted", CONFIG, 2000) / "checkpoints")
    state = checkpoints.load(CONFIG, torch.device("cpu"))
    assert state is not None
    state.step = 1
    newest = checkpoints.save(state)
    newest.write_bytes(newest.read_bytes()[:100])
    with own_run_folder(tmp_path, CONFIG, resume=True) as folder:
        assert folder == tmp_path / "wanted"


def test_resume_finds_nothing_else(tmp_path: Path) -> None:
    interrupted(tmp_path, "other", replace(CONFIG, seed=1), modified=3000)
    with (
        pytest.raises(RunFolderError, match=r"\(seed 0 among them\) is in .*: nothing to resume"),
        own_run_folder(tmp_path, CONFIG, resume=True),
    ):
        pass


def test_a_finished_run_is_not_resumed(tmp_path: Path) -> None:
    interrupted(tmp_path, "of-this-flow-run", CONFIG, modified=1000)
    with own_run_folder(tmp_path, CONFIG, resume=False) as folder:
        finish(folder)
    assert list(folder.iterdir()) == []
    with pytest.raises(RunFolderError), own_run_folder(tmp_path, CONFIG, resume=True):
        pass


def test_a_finished_run_keeps_its_bundles_and_nothing_half_fetched(tmp_path: Path) -> None:
    for name in ("challenger/bundle", "challenger/.bundle-0123/whole", "trials/3/.bundle-0123"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").touch()
    (tmp_path / "trials" / "3" / ".lock").touch()
    finish(tmp_path)
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")}
    kept = {"challenger", "challenger/bundle", "challenger/bundle/config.json"}
    assert left == kept | {"trials", "trials/3"}


def test_an_exception_keeps_what_resuming_needs(tmp_path: Path) -> None:
    interrupted(tmp_path, "of-this-flow-run", CONFIG, modified=1000)
    with pytest.raises(ZeroDivisionError), own_run_folder(tmp_path, CONFIG, resume=False) as folder:
        raise ZeroDivisionError
    assert Checkpoints(folder / "checkpoints").find()


def test_a_folder_has_one_process_and_is_abandoned_when_that_is_killed(tmp_path: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path; from tasks.run_folder import lock_of\n"
        "with lock_of(Path(sys.argv[1])): print('mine', flush=True); time.sleep(60)"
    )
    folder = tmp_path / "of-this-flow-run"
    folder.mkdir()
    assert not is_abandoned(folder)
    other = subprocess.Popen(
        [sys.executable, "-c", script, str(folder)],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": "."},
    )
    with other:
        assert other.stdout
        other.stdout.readline()
        assert not is_abandoned(folder)
        with (
            pytest.raises(RunFolderError, match=r"another process is training in .*flow-run"),
            own_run_folder(tmp_path, CONFIG, resume=False),
        ):
            pass
        other.kill()
    assert is_abandoned(folder)


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("in the way")
    with (
        pytest.raises(RunFolderError, match=r"cannot write to the folder .*of-this-flow-run: "),
        own_run_folder(tmp_path / "runs", CONFIG, resume=False),
    ):
        pass


def test_a_full_disk_is_named_wherever_it_is_noticed(tmp_path: Path) -> None:
    with (
        pytest.raises(RunFolderError, match=r"cannot write to .*/run: the disk is full"),
        own_folder(tmp_path / "run", "working"),
        Path("/dev/full").open("w") as file,
    ):
        file.write("x" * 100_000)


def test_what_is_temporary_lies_in_the_folder_and_goes_with_the_run(tmp_path: Path) -> None:
    before = tempfile.gettempdir()
    script = "import tempfile; print(tempfile.gettempdir())"
    with own_folder(tmp_path / "run", "working"):
        assert tempfile.gettempdir() == str(tmp_path / "run" / SCRATCH)
        child = subprocess.run(
            [sys.executable, "-c", script], check=True, capture_output=True, text=True
        )
        assert child.stdout.strip() == tempfile.gettempdir()
        tempfile.mkdtemp()
    assert tempfile.gettempdir() == before
    assert os.environ.get("TMPDIR", before) == before
    assert not (tmp_path / "run" / SCRATCH).exists()


def test_what_a_killed_process_left_goes_unless_another_is_there(tmp_path: Path) -> None:
    left = tmp_path / "run" / SCRATCH / "left"
    left.mkdir(parents=True)
    with lock_of(tmp_path / "run"):
        clear_scratch(tmp_path / "run")
        assert left.exists()
    clear_scratch(tmp_path / "run")
    assert not left.parent.exists()
    clear_scratch(tmp_path / "none")
    left.mkdir(parents=True)
    with own_folder(tmp_path / "run", "working"):
        assert list(left.parent.iterdir()) == []
