"""`python -m flows.train_gan` in a folder of its own, to be killed, and what it left."""

import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from itertools import pairwise
from pathlib import Path

import psutil
from mlflow import MlflowClient
from prefect.client.schemas.objects import StateType

from gan.bundle import bundle_digest
from gan.checkpoint import Checkpoints
from tasks.reconciliation import ENDS
from tests.deployments.local_stack import wait_for
from tests.long import in_a_hurry
from tests.prefect_home import prefect_home

NUM_EPOCHS = 1 if in_a_hurry else 2
PARAMETERS = ("--recipe", "vanilla", "--epochs", str(NUM_EPOCHS), "--batch-size", "2000")
STEPS = ["start", "train", "evaluate", "pack", "register", "promote", "publish"]
STEPS += ["point to champion", "report"]
"""The steps of the flow, in order; all but the start are called as their tasks."""
ENOUGH_S = 240
COMMAND = (sys.executable, "-m", "flows.train_gan", "--num-samples", "200")
RECONCILE = (sys.executable, "-m", "flows.reconcile_runs")
GAN = (sys.executable, "-c", "from flows.gan_command import main; main()")


class Pipeline:
    """Where runs happen: a home, an MLflow store, run folders, a prefix in the S3 store."""

    def __init__(self, home: Path, data_dir: Path, s3: str, **variables: str) -> None:
        self.home = home
        self.address = f"s3://mirrors/{home.name}"
        kept = {
            k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "MLFLOW_", "AWS_"))
        }
        self.variables = kept | {
            "HOME": str(home),
            "TMPDIR": str(home / "tmp"),
            "PYTHONPATH": str(Path(__file__).parents[2]),
            "PYTHONUNBUFFERED": "1",
            "OMP_NUM_THREADS": "1",
            "PREFECT_HOME": prefect_home(home / "prefect"),
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "DO_NOT_TRACK": "1",
            "NO_PROXY": "127.0.0.1",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "MNIST_GAN_DATA_DIR": str(data_dir),
            "MNIST_GAN_CHECKPOINT_EVERY_S": "0",
            "MNIST_GAN_PUBLISH_TO": self.address,
            "AWS_ENDPOINT_URL_S3": s3,
            "AWS_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "MLFLOW_TRACKING_URI": f"sqlite:///{home}/mlflow.db",
            **variables,
        }  # fmt: skip
        (home / "tmp").mkdir()
        self.log = home / "log"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, *options: str) -> None:
        """Type the command; with --resume if there is something to resume."""
        resume = ["--resume"] if self.checkpoints else []
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*COMMAND, *PARAMETERS, *resume, *options],
                cwd=self.home,
                env=self.variables,
                stdout=log,
                stderr=log,
                start_new_session=True,
                # A shell that started the tests in the background has it ignored.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # noqa: PLW1509
            )

    def wait(self, seconds: float = ENOUGH_S) -> int:
        assert self.process
        return self.process.wait(timeout=seconds)

    def run(self, *options: str) -> int:
        self.start(*options)
        return self.wait()

    def command(self, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Type something else here."""
        return subprocess.run(
            words,
            check=False,
            cwd=self.home,
            env=self.variables | variables,
            capture_output=True,
            text=True,
            timeout=ENOUGH_S,
        )

    def reconcile(self) -> None:
        """What the next run would do at its start, where nothing is left to run."""
        self.command(*RECONCILE).check_returncode()

    def temporary_files(self) -> list[str]:
        """What lies about outside of the run's folder, but for the cache that torch has there."""
        names = (path.name for path in (self.home / "tmp").iterdir())
        return [name for name in names if not name.startswith("torchinductor_")]

    def end(self) -> None:
        if self.process and self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    def is_done(self) -> bool:
        """Whether a run is over with nothing left to resume, though it was killed as it went."""
        store = self.home / "mlflow.db"
        return not self.checkpoints and store.exists() and "FINISHED" in self.statuses()

    @property
    def output(self) -> str:
        return self.log.read_text()

    @property
    def complaint(self) -> str:
        """The sentence that a run of the command ended with, when it had nothing else to say."""
        return find_complaint(self.output)

    @property
    def checkpoints(self) -> list[Path]:
        """Those of all runs that are not over, the newest of each first."""
        folders = self.home.glob("runs/*/checkpoints")
        return [path for folder in folders for path in Checkpoints(folder).find()]

    def wait_for_step(self, step: str) -> bool:
        """Wait until a step of the flow begins; whether it did before the run was over."""
        before = None if step == "start" else STEPS[STEPS.index(step) - 1]

        def ask() -> bool | None:
            assert self.process
            if before is None or before in self.finished_steps():
                return True
            return False if self.process.poll() is not None else None

        return wait_for(ask, seconds=ENOUGH_S, what=lambda: f"{step}; {self.output}")

    def finished_steps(self) -> dict[str, datetime]:
        """The steps of the last command that are over, and at what time of the day each was."""
        line = re.compile(r"^([\d:.]+) \| INFO +\| Task run '(.+)-\w+' - Finished", re.MULTILINE)
        ends = {
            name: datetime.strptime(end, "%H:%M:%S.%f") for end, name in line.findall(self.output)
        }
        if "download MNIST" in ends:
            ends["start"] = ends["download MNIST"]
        return {step: ends[step] for step in STEPS if step in ends}

    def wait_for_processes(self, seconds: float = 20) -> list[psutil.Process]:
        """What is left of all runs, once it had the time to go."""
        deadline = time.monotonic() + seconds
        while (left := self.find_processes()) and time.monotonic() < deadline:
            time.sleep(0.2)
        return left

    def find_processes(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.environ().get("HOME") == str(self.home):
                    found.append(process)
        return found

    @property
    def mlflow(self) -> MlflowClient:
        return MlflowClient(self.variables["MLFLOW_TRACKING_URI"])

    def statuses(self) -> list[str]:
        """The states of all MLflow runs, the newest first."""
        experiment = self.mlflow.get_experiment_by_name("mnist-gan")
        if experiment is None:
            return []
        return [run.info.status for run in self.mlflow.search_runs([experiment.experiment_id])]

    def flow_runs(self) -> dict[str, str]:
        """The states of all runs of the flow, the oldest first, in Prefect's own records."""
        with closing(sqlite3.connect(self.home / "prefect" / "prefect.db")) as records:
            rows = records.execute(
                "select flow_run.id, state_type from flow_run join flow on flow.id = flow_id "
                "where flow.name = 'train-gan' order by flow_run.created"
            )
            return dict(rows.fetchall())

    def flow_run_states(self) -> list[str]:
        """Their states alone."""
        return list(self.flow_runs().values())

    def disagreements(self) -> list[str]:
        """The MLflow runs that did not end like their flow runs."""
        states = self.flow_runs()
        experiment = self.mlflow.get_experiment_by_name("mnist-gan")
        runs = self.mlflow.search_runs([experiment.experiment_id]) if experiment else []
        ends = {run.data.tags["prefect_flow_run_id"]: run.info.status for run in runs}
        return [
            f"{states[id_]} in Prefect, {status} in MLflow"
            for id_, status in ends.items()
            if ENDS.get(StateType(states[id_])) != status
        ]


def find_complaint(output: str) -> str:
    """The sentence on what is wrong, in all that a command said."""
    assert "Traceback" not in output, output
    complaints = [line for line in output.splitlines() if re.match(r"([\w .-]+: )?error: ", line)]
    assert complaints, output
    return complaints[-1]


@dataclass(frozen=True)
class Reference:
    """What comes out if nothing goes wrong."""

    digest: str
    losses: tuple[float, ...]
    seconds: dict[str, float] = field(default_factory=dict, compare=False)
    """How long each step took."""


def make_reference(home: Path, data_dir: Path, s3: str) -> Reference:
    pipeline = Pipeline(home, data_dir, s3)
    begin = datetime.now()
    assert pipeline.run() == 0, pipeline.output
    ends = pipeline.finished_steps()
    # The log has times of the day alone, and a run may go past midnight.
    passed = [(end - begin) % timedelta(days=1) for end in ends.values()]
    times = [(b - a).total_seconds() for a, b in pairwise([timedelta(), *passed])]
    return replace(check_result(pipeline), seconds=dict(zip(STEPS, times, strict=True)))


def check_result(pipeline: Pipeline) -> Reference:
    """See that one whole result is there, once, and nothing else; gives it to compare."""
    client = pipeline.mlflow
    assert "RUNNING" not in pipeline.statuses()
    assert set(pipeline.flow_run_states()) <= {"COMPLETED", "CRASHED", "FAILED", "CANCELLED"}
    (version,) = client.search_model_versions("name = 'mnist-gan-generator'")
    run = client.get_run(version.run_id)
    assert run.info.status == "FINISHED"
    models = client.search_logged_models([run.info.experiment_id])
    assert [f"models:/{model.model_id}" for model in models] == [version.source]
    losses = client.get_metric_history(version.run_id, "d_loss")
    assert [point.step for point in losses] == [*range(1, NUM_EPOCHS + 1)], "no gap, no step twice"
    scores = client.get_metric_history(version.run_id, "frechet_distance")
    assert [point.step for point in scores] == [0]
    sheets = [file.path for file in client.list_artifacts(version.run_id, "images")]
    assert len([path for path in sheets if path.endswith(".png")]) == 1 + NUM_EPOCHS

    folder = pipeline.home / "runs" / run.data.tags["run_folder"]
    digest = bundle_digest(folder / "bundle")
    assert version.tags["bundle"] == digest
    assert version.tags["s3"].startswith(pipeline.address)
    assert sorted(path.name for path in folder.iterdir() if path.name.startswith(".")) == []
    assert pipeline.temporary_files() == []
    assert not (folder / "checkpoints").exists()
    pulled = pipeline.command(*GAN, "pull", "--from", pipeline.address)
    assert pulled.returncode == 0, pulled.stderr
    assert digest in pulled.stdout
    return Reference(digest=digest, losses=tuple(point.value for point in losses))


def kill(pipeline: Pipeline) -> None:
    """SIGKILL, as the system does when memory is short; everything it started must go too."""
    assert pipeline.process
    pipeline.process.send_signal(signal.SIGKILL)
    pipeline.process.wait()
    assert pipeline.wait_for_processes() == []
