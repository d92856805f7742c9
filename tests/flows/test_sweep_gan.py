"""Sweeps as a user starts them, on a real Dask scheduler and two workers."""

import os
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import mlflow
import pandas as pd
import psutil
import pytest
import torch
from mlflow import MlflowClient
from mlflow.entities import Run
from optuna.trial import FrozenTrial

from flows import command_line
from flows.sweep_gan import sweep_gan
from gan.bundle import save_bundle
from gan.checkpoint import Checkpoints
from gan.data import load_mnist
from gan.recipes import configure
from gan.training import TrainState, train
from tasks.search_space import change
from tasks.sweep import SCORE, open_study
from tests.deployments.local_stack import wait_for
from tests.long import takes_minutes, takes_minutes_in_float32
from tests.mlflow_store import mlflow_store
from tests.prefect_home import prefect_home

# The middle, which is tried first, ends in no numbers; what else is tried with this seed does not.
SPACE = """
learning_rate: [0.0001, 0.0002, 0.9, 0.0003, 0.0004]
beta2: [0.999, 0.0, 0.99]
batch_size: [2000]
"""
TRIALS, EPOCHS = 4, 1
SWEEP = ("-m", "flows.sweep_gan", "--space", "space.yaml", "--recipe", "vanilla", "--workers", "2")
SWEEP += ("--trials", str(TRIALS), "--epochs", str(EPOCHS), "--num-samples", "200")


class Home:
    """A folder in which sweeps are started as processes."""

    def __init__(self, folder: Path, mnist_dir: Path, root: Path) -> None:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "MLFLOW_"))}
        self.folder = folder
        self.environment = kept | {
            "HOME": str(folder),
            "PYTHONPATH": str(root),
            "MNIST_GAN_DATA_DIR": str(mnist_dir.parent),
            "MNIST_GAN_CHECKPOINT_EVERY_S": "0",
            "PREFECT_HOME": prefect_home(folder / ".prefect"),
            "DASK_DISTRIBUTED__COMM__TIMEOUTS__CONNECT": "5s",
        }
        (folder / "space.yaml").write_text(SPACE)

    @contextmanager
    def process(self, name: str, *words: str) -> Iterator[subprocess.Popen[bytes]]:
        """A Python process, killed at the end; what it says is `output` of its name."""
        with (
            (self.folder / name).open("wb") as output,
            subprocess.Popen(
                [sys.executable, *words],
                cwd=self.folder,
                env=self.environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                # A shell that started the tests in the background has it ignored.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
            ) as process,
        ):
            try:
                yield process
            finally:
                process.kill()

    def output(self, name: str) -> str:
        return (self.folder / name).read_text()

    @property
    def sweep(self) -> Path:
        """The folder of the one sweep."""
        (note,) = (self.folder / "runs").glob("*/sweep.json")
        return note.parent

    def trials(self) -> list[FrozenTrial]:
        begun = list((self.folder / "runs").glob("*/trials.journal"))
        return open_study(self.sweep).trials if begun else []

    def ended(self) -> list[int]:
        return [trial.number for trial in self.trials() if trial.state.is_finished()]

    def under_way(self) -> list[int]:
        """The trials that have a checkpoint and are not at their end."""
        return [
            trial.number
            for trial in self.trials()
            if not trial.state.is_finished() and self.checkpoints(trial.number)
        ]

    def checkpoints(self, number: int) -> list[Path]:
        folder = self.sweep.with_name(f"{self.sweep.name}-{number:04}")
        return Checkpoints(folder / "checkpoints").find()

    def tracked(self) -> dict[str, Run]:
        """The MLflow runs of the trials by number, and the parent under an empty text."""
        runs = mlflow.search_runs(experiment_names=["mnist-gan"], output_format="list")
        found = {run.data.tags.get("trial", ""): run for run in runs}
        assert len(found) == len(runs), "one run a trial"
        return found


@pytest.fixture
def home(mnist_dir: Path, tmp_path: Path, pytestconfig: pytest.Config) -> Iterator[Home]:
    with mlflow_store(tmp_path):
        yield Home(tmp_path, mnist_dir, pytestconfig.rootpath)


@pytest.mark.slow
@pytest.mark.chaos
@takes_minutes
def test_no_trial_is_lost_or_done_twice_whoever_dies(home: Home, mnist_dir: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        address = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    serve = ("-m", "dask", "scheduler", "--host", address, "--no-dashboard")
    work = ("-m", "dask", "worker", address, "--nthreads", "1", "--no-nanny", "--no-dashboard")

    def two() -> list[int] | None:
        return home.under_way() if len(home.under_way()) == 2 else None

    with (
        home.process("scheduler", *serve),
        home.process("one", *work) as one,
        home.process("other", *work),
    ):
        with home.process("sweep", *SWEEP, "--dask-address", address) as sweep:
            wait_for(two, seconds=120, what="two trials at once")
            one.kill()
            ended = wait_for(lambda: home.ended()[1:] or None, seconds=120, what="a whole trial")
            before = home.tracked()
            wait_for(lambda: home.under_way() or None, seconds=60, what="the next trial")
            sweep.kill()
        with home.process("again", *SWEEP, "--dask-address", address, "--resume") as sweep:
            assert sweep.wait(240) == 0, home.output("again")

    trials, tracked = home.trials(), home.tracked()
    assert [trial.state.name for trial in trials] == ["FAIL"] + ["COMPLETE"] * 3
    assert trials[0].user_attrs["reason"].startswith("the losses are no numbers any more")
    assert tracked["0"].info.status == "FAILED"
    assert tracked["0"].data.tags["trial_reason"] == trials[0].user_attrs["reason"]
    parent = tracked.pop("")
    assert tracked.keys() == {"0", "1", "2", "3"}
    for number in ended:
        assert tracked[str(number)].info.end_time == before[str(number)].info.end_time
    client = MlflowClient()
    for trial in trials[1:]:
        run = tracked[str(trial.number)]
        assert run.info.status == "FINISHED"
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        for name in ("d_loss", SCORE):
            points = client.get_metric_history(run.info.run_id, name)
            assert sorted(point.step for point in points) == [*range(1, EPOCHS + 1)]
    assert parent.info.status == "FINISHED"
    artifacts = {file.path for file in client.list_artifacts(parent.info.run_id)}
    assert artifacts >= {"trials.csv", "sweep.md", "best.png"}
    assert len(pd.read_csv(home.sweep / "trials.csv")) == TRIALS
    (version,) = client.search_model_versions("name = 'mnist-gan-generator'")
    assert version.run_id == tracked[parent.data.tags["best_trial"]].info.run_id

    # To the last bit as if nobody had died.
    state = TrainState(
        change(configure("vanilla", epochs=EPOCHS, seed=0), trials[1].params), torch.device("cpu")
    )
    for _ in train(state, load_mnist(mnist_dir).train):
        pass
    assert save_bundle(state.sampler, home.folder / "bundle") == trials[1].user_attrs["digest"]


@pytest.mark.slow
@takes_minutes_in_float32
def test_interrupted_sweep_saves_its_trials_and_goes_on_with_them(home: Home) -> None:
    home.environment["MNIST_GAN_CHECKPOINT_EVERY_S"] = "3600"
    (home.folder / "space.yaml").write_text("learning_rate: [0.0001, 0.0002]")
    long = (*SWEEP, "--workers", "1", "--trials", "1", "--epochs", "100")
    steps = []
    for name, number in (("ctrl-c", signal.SIGINT), ("sigterm", signal.SIGTERM)):
        with home.process(name, *long, *(["--resume"] if steps else [])) as sweep:
            wait_for(
                lambda name=name: "images/s" in home.output(name) or None,
                seconds=120,
                what="a report of the trial",
            )
            if number == signal.SIGINT:  # a terminal sends it to the workers, too
                for child in psutil.Process(sweep.pid).children(recursive=True):
                    if any("spawn_main" in word for word in child.cmdline()):
                        child.send_signal(number)
            sweep.send_signal(number)
            sweep.wait(60)
        assert "Traceback" not in home.output(name)
        newest, *_ = home.checkpoints(0)
        steps.append(int(newest.name.split("-")[1]))
        (trial,) = home.trials()
        assert trial.state.name == "RUNNING"
        tracked = home.tracked()
        assert [tracked[key].info.status for key in ("", "0")] == ["KILLED"] * 2
    assert f"going on after step {steps[0]}, from a checkpoint" in home.output("sigterm")
    assert steps[1] > steps[0] > 0


def test_make_hands_over_what_its_help_names(pytestconfig: pytest.Config) -> None:
    def options(*given: str) -> list[str]:
        command, bare = ["make", "--dry-run", "sweep", *given], {"PATH": os.environ["PATH"]}
        said = subprocess.check_output(command, cwd=pytestconfig.rootpath, env=bare, text=True)
        return shlex.split(said.partition("flows.sweep_gan")[2].replace("\\\n", ""))

    always = ["--space", "sweep.yaml", "--trials"]
    assert options() == [*always, "8", "--epochs", "2"]
    named = ("TRIALS=1", "EPOCHS=1", "RECIPE=1", "SEED=1", "WORKERS=1", "RESUME=1")
    given = ["1", "--epochs", "1", "--recipe", "1", "--seed", "1", "--workers", "1"]
    assert options(*named) == [*always, *given, "--resume", "1"]


def refusal(monkeypatch: pytest.MonkeyPatch, folder: Path, *options: str) -> str:
    """What the command says when it is refused."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["sweep_gan", *options])
    with pytest.raises(SystemExit) as stopped:
        command_line.run(sweep_gan)
    assert isinstance(stopped.value.code, str), "an exit status of 1, with a sentence"
    return stopped.value.code


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--trials", "0"), "trials: Input should be greater than or equal to 1"),
        (("--recipe", "nope"), "recipe: Input should be 'quick', 'best' or 'vanilla'"),
        (("--workers", "-1"), "workers: Input should be greater than or equal to 1"),
        (("--memory-gib", "nan"), "memory_gib: Input should be"),
        (("--dask-address", "host"), "dask_address: String should match pattern"),
        (("--dask-address", "tcp://me:secret@host:1"), "dask_address: String should match"),
        (("--device", "tpu"), "device: Input should be 'auto', 'cuda', 'mps' or 'cpu'"),
    ],
)
def test_nonsense_is_refused_with_a_sentence(
    options: tuple[str, ...], sentence: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    said = refusal(monkeypatch, tmp_path, *options)
    assert said.startswith(f"error: {sentence}")
    assert "\n" not in said
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_what_no_sweep_can_do_is_said_in_a_sentence(home: Home) -> None:
    """All in one process, whose temporary Prefect server they share."""
    (home.folder / "odd.yaml").write_text("learning_rate: {low: 1, high: 2}")
    script = """
import os, sys
from flows import command_line
from flows.sweep_gan import sweep_gan
for options in (["--space", "none.yaml"], ["--space", "odd.yaml"],
                ["--space", "space.yaml", "--workers", "9"], ["--space", "space.yaml", "--resume"],
                ["--space", "space.yaml", "--dask-address", "tcp://127.0.0.1:1"]):
    sys.argv = ["sweep", "--recipe", "vanilla", *options]
    try:
        command_line.run(sweep_gan)
    except SystemExit as stopped:
        print("said", stopped.code)
"""
    with home.process("refused", "-c", script) as process:
        assert process.wait(120) == 0
    said = [line for line in home.output("refused").splitlines() if line.startswith("said ")]
    assert said == [
        "said error: cannot read the search space none.yaml: No such file or directory",
        "said error: the search space has learning_rate must be above 0 and at most 1, not 2",
        "said error: MLflow's store is a file of SQLite, which takes 8 writers at once, not 9; set "
        "MLFLOW_TRACKING_URI to a server on PostgreSQL, or take fewer workers",
        "said error: no sweep of this space, recipe, epochs and seed is in runs: nothing to resume",
        said[-1],
    ]
    assert said[-1].startswith(
        "said error: Dask's scheduler at tcp://127.0.0.1:1 does not answer: "
    )
