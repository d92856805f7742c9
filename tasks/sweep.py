"""A sweep: trainings with the settings that Optuna proposes, as Prefect tasks on Dask workers.

What has been proposed, scored and ended stands in a journal file in the sweep's folder, written by
every worker itself. So nothing is lost with the flow, a worker or the scheduler: what is finished
there is finished, and all else goes on from its checkpoints.
"""

from __future__ import annotations

import json
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import mlflow
import optuna
import torch
from mlflow import MlflowClient
from mlflow.entities import Metric
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID
from optuna import Study, Trial, TrialPruned
from optuna.distributions import distribution_to_json
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock
from optuna.trial import FrozenTrial, TrialState
from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.exceptions import TerminationSignal
from prefect.runtime import flow_run
from prefect.states import Cancelled

from gan.config import NUM_SEEDS, TrainConfig
from gan.data import load_mnist
from gan.errors import UserError
from gan.evaluation.judge import judge_images, load_judge
from gan.evaluation.metrics import frechet_distance
from gan.evaluation.reference import load_reference
from gan.evaluation.scores import draws_like
from gan.training import DivergenceError, TrainState
from tasks.data import DatasetRef, download_mnist
from tasks.run_folder import RunFolderError, finish, hold, own_folder
from tasks.search_space import Distributions, change, find_middle, suggest
from tasks.settings import load_settings
from tasks.tracking import tracked_run
from tasks.training import MemoryShortage, TrainedGenerator, train_generator

NUM_DRAWN = 2000
"""Drawings that a trial is scored by, on the way and at its end: enough to rank by."""
SCORE = "frechet_2k"
"""MLflow's name of that score."""
DRAW_SEED = 0
STARTUP_TRIALS = 5
"""Trials at random before proposals follow the scores, and whole ones before others are pruned."""
PATIENCE_S = 3600.0
"""How long to wait for a trial that a sweep which is gone left running. It may end there."""
KEPT = ("digest", "seconds", "images_per_s")
"""What Optuna's book keeps of a `TrainedGenerator`."""


class SweepError(UserError):
    """A sweep that cannot begin, or that did not come to its end."""


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """What all trials of a sweep have in common. It travels to the workers."""

    folder: Path
    """The sweep's own folder. Those of the trials lie beside it, on a disk that all workers see."""
    config: TrainConfig
    """What the trials depart from; its seed is that of every trial and of the proposals."""
    distributions: Distributions
    device: str
    threads: int
    """Threads that the steps of one training take."""
    mlflow_run_id: str
    """The parent of the trials' MLflow runs."""
    tracking_uri: str

    def trial_folder(self, number: int) -> Path:
        """The run folder of a trial."""
        return self.folder.with_name(f"{self.folder.name}-{number:04}")

    @property
    def stop_sign(self) -> Path:
        """A file that tells the trials under way, wherever they are, to save themselves and end."""
        return self.folder / ".stop"


@dataclass(frozen=True, kw_only=True)
class EndedTrial:
    """A trial that came to its end whole, and what it left behind."""

    number: int
    config: TrainConfig
    trained: TrainedGenerator
    mlflow_run_id: str
    folder: Path


@contextmanager
def own_sweep_folder(
    runs_dir: Path, config: TrainConfig, distributions: Distributions, *, resume: bool
) -> Iterator[Path]:
    """The folder of this flow run or, to resume, of the last sweep of the same space and recipe.

    A flow run that is retried has the folder it had.

    Raises:
        RunFolderError: nothing to resume, another process sweeps in it, or the disk refuses.
    """
    searched = {name: distribution_to_json(kind) for name, kind in distributions.items()}
    wanted = json.dumps({"config": asdict(config), "space": searched}, sort_keys=True)
    folder = runs_dir.absolute() / str(flow_run.get_id())
    if resume:
        notes = [
            note
            for note in runs_dir.absolute().glob("*/sweep.json")
            if note.read_bytes() == wanted.encode()
        ]
        if not notes:
            raise RunFolderError(
                f"no sweep of this space, recipe, epochs and seed is in {runs_dir}: "
                "nothing to resume"
            )
        folder = max(notes, key=lambda note: note.stat().st_mtime).parent
    with own_folder(folder, "working"):
        # In one move: what a full disk left half would never be resumed.
        (folder / ".sweep.json").write_text(wanted)
        (folder / ".sweep.json").rename(folder / "sweep.json")
        yield folder


def open_storage(folder: Path) -> JournalStorage:
    """Where all processes of a sweep write down its trials."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    journal = folder / "trials.journal"
    return JournalStorage(JournalFileBackend(str(journal), lock_obj=_MendingLock(journal)))


class _MendingLock(JournalFileSymlinkLock):
    """Whoever is to write next first cuts off the line that a full disk or a kill left half.

    Otherwise the next line would be written behind it, and the journal could not be read any more.
    """

    def __init__(self, journal: Path) -> None:
        super().__init__(str(journal))
        self.journal = journal

    def acquire(self) -> bool:
        """Wait for the others, as Optuna does; then see that the last line is whole."""
        held = super().acquire()
        with self.journal.open("rb+") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(0, end - 1))
            if file.read() not in (b"", b"\n"):
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)
        return held


def open_study(folder: Path, seed: int = 0) -> Study:
    """The sweep's trials; `seed` decides what the next proposal makes of the scores so far."""
    return optuna.create_study(
        storage=open_storage(folder),
        study_name="sweep",
        load_if_exists=True,
        sampler=optuna.samplers.TPESampler(n_startup_trials=STARTUP_TRIALS, seed=seed % NUM_SEEDS),
        pruner=optuna.pruners.MedianPruner(n_startup_trials=STARTUP_TRIALS),
    )


@task(name="propose trials", cache_policy=NO_CACHE)
def propose_trials(sweep: Sweep, num: int) -> list[int]:
    """Have so many trials waiting or done; gives the numbers of those that are not at their end.

    The first one is the middle of the space, to compare with. What the others try is decided
    when they start, and hangs on the scores that are known by then.

    What is left of those that ended, as the process was killed a moment later, is removed.
    """
    study = open_study(sweep.folder)
    for number in range(len(study.trials), num):
        study.enqueue_trial(find_middle(sweep.distributions) if number == 0 else {})
    for trial in study.trials:
        if trial.state.is_finished():
            finish(sweep.trial_folder(trial.number))
    return [trial.number for trial in study.trials if not trial.state.is_finished()]


@task(name="trial", task_run_name="trial {number}", cache_policy=NO_CACHE)
def run_trial(sweep: Sweep, number: int) -> State[None] | None:
    """Train, track and score one trial; one that was begun goes on, one that ended is left alone.

    A trial ends whole, pruned because its early scores are worse than the median, or failed because
    no training can do with its settings. Anything else that goes wrong leaves it to be taken up,
    and so does the sweep's stop sign, at which it is saved and cancelled.
    """
    torch.set_num_threads(sweep.threads)
    mlflow.set_tracking_uri(sweep.tracking_uri)
    study = open_study(sweep.folder, sweep.config.seed + number)
    folder = sweep.trial_folder(number)
    with hold(folder, "working", PATIENCE_S):
        if study.trials[number].state.is_finished():
            finish(folder)  # its worker may have been killed before it came to that
            return None
        trial = begin_trial(sweep.folder, number, study)
        config = change(sweep.config, suggest(trial, sweep.distributions))
        try:
            score = _train(sweep, trial, config, folder)
        except (DivergenceError, MemoryShortage):
            study.tell(trial, state=TrialState.FAIL)
        except TerminationSignal:
            return Cancelled(message=f"Ended with its sweep; what was done is kept in {folder}.")
        else:
            state = TrialState.PRUNED if score is None else TrialState.COMPLETE
            os.sync()  # the power may fail, and what is complete must be on the disk
            study.tell(trial, score, state)
        finish(folder)
    get_run_logger().info("trial %d: %s", number, describe_end(study.trials[number]))
    return None


def begin_trial(folder: Path, number: int, study: Study) -> Trial:
    """The trial to work on: a waiting one, or one that was begun by a worker that died."""
    storage = open_storage(folder)
    study_id = storage.get_study_id_from_name(study.study_name)
    trial_id = storage.get_trial_id_from_study_id_trial_number(study_id, number)
    if study.trials[number].state == TrialState.WAITING:
        storage.set_trial_state_values(trial_id, TrialState.RUNNING)
    return Trial(study, trial_id)


def _train(sweep: Sweep, trial: Trial, config: TrainConfig, folder: Path) -> float | None:
    """Train as any other, and look at the early scores; gives the last one, or None if pruned."""
    settings = load_settings()
    dataset = download_mnist.fn(settings.data_dir, settings.data_mirrors)
    score = score_by(dataset, sweep.device)

    def look(state: TrainState) -> None:
        epoch, value = len(state.history), score(state)
        if not math.isfinite(value):
            raise DivergenceError(f"what is drawn in epoch {epoch} cannot be scored")
        if epoch not in _scores(trial):
            trial.report(value, epoch)
        if epoch < config.epochs and trial.should_prune():
            raise TrialPruned(f"its score in epoch {epoch}, {value:.4f}, is worse than the median")

    def heed_stop_sign() -> None:
        if sweep.stop_sign.exists():
            raise TerminationSignal(signal.SIGTERM)

    tags = {MLFLOW_PARENT_RUN_ID: sweep.mlflow_run_id, "trial": str(trial.number)}
    with tracked_run(config, dataset, sweep.device, folder, tags=tags) as run_id:
        trial.set_user_attr("mlflow_run_id", run_id)
        try:
            trained = train_generator.fn(
                config,
                dataset,
                sweep.device,
                run_id,
                folder,
                settings.checkpoint_every_s,
                look=look,
                heed=heed_stop_sign,
            )
        except TrialPruned as error:
            _note(trial, run_id, "pruned", str(error))
            return None
        except (DivergenceError, MemoryShortage) as error:
            _note(trial, run_id, "failed", str(error))
            raise
        _note(trial, run_id, "complete", "")
        for name in KEPT:
            trial.set_user_attr(name, getattr(trained, name))
    return _scores(trial)[config.epochs]


def score_by(dataset: DatasetRef, device: str) -> Callable[[TrainState], float]:
    """Gives a function that scores a training as it stands, in a second or two; lower is better."""
    data, judge = load_mnist(dataset.folder, device), load_judge(device)
    real = load_reference(judge, data, cache=dataset.folder.parent).test_features

    def score(state: TrainState) -> float:
        drawn, _ = draws_like(state.sampler, data.train.labels)(NUM_DRAWN, DRAW_SEED)
        return frechet_distance(judge_images(judge, drawn).features, real)

    return score


def _scores(trial: Trial) -> dict[int, float]:
    """The scores by epoch, those from before a worker's death among them."""
    return trial.study.trials[trial.number].intermediate_values


def _note(trial: Trial, mlflow_run_id: str, end: str, reason: str) -> None:
    """Say in both books how a trial ended, and leave its scores in MLflow."""
    client, now = MlflowClient(), int(time.time() * 1000)
    trial.set_user_attr("reason", reason)
    client.set_tag(mlflow_run_id, "trial_end", end)
    client.set_tag(mlflow_run_id, "trial_reason", reason)
    scores = [Metric(SCORE, value, now, epoch) for epoch, value in sorted(_scores(trial).items())]
    if SCORE not in client.get_run(mlflow_run_id).data.metrics:
        client.log_batch(mlflow_run_id, metrics=scores)


def record_death(sweep: Sweep, number: int, reason: str) -> None:
    """Write down that a trial failed which could not do so itself."""
    study = open_study(sweep.folder)
    trial = begin_trial(sweep.folder, number, study)  # no worker may have come to that
    trial.set_user_attr("reason", reason)
    if run_id := trial.user_attrs.get("mlflow_run_id"):
        _note(trial, run_id, "failed", reason)
        MlflowClient().set_terminated(run_id, "FAILED")
    study.tell(number, state=TrialState.FAIL)
    finish(sweep.trial_folder(number))
    get_run_logger().warning("trial %d: %s", number, reason)


def end_open_trials(sweep: Sweep) -> None:
    """End the MLflow runs of the trials that were under way when the sweep was interrupted."""
    for trial in open_study(sweep.folder).trials:
        if trial.state == TrialState.RUNNING and "mlflow_run_id" in trial.user_attrs:
            MlflowClient().set_terminated(trial.user_attrs["mlflow_run_id"], "KILLED")


def rank(study: Study) -> list[FrozenTrial]:
    """The trials that came to their end whole, the best first.

    Raises:
        SweepError: there is none; says why the first one failed.
    """
    whole = study.get_trials(states=[TrialState.COMPLETE])
    if not whole:
        reasons = [reason for trial in study.trials if (reason := trial.user_attrs.get("reason"))]
        raise SweepError(
            f"none of {len(study.trials)} trials came to its end; the first reason: "
            f"{reasons[0] if reasons else 'unknown'}"
        )
    return sorted(whole, key=lambda trial: (trial.values[0], trial.number))


def find_best(sweep: Sweep, num: int) -> list[EndedTrial]:
    """The best trials by their last scores on the way, at most so many.

    Raises:
        SweepError: no trial came to its end; says why the first one failed.
    """
    return [
        EndedTrial(
            number=trial.number,
            config=change(sweep.config, trial.params),
            trained=TrainedGenerator(
                bundle=sweep.trial_folder(trial.number) / "bundle",
                **{name: trial.user_attrs[name] for name in KEPT},
            ),
            mlflow_run_id=trial.user_attrs["mlflow_run_id"],
            folder=sweep.trial_folder(trial.number),
        )
        for trial in rank(open_study(sweep.folder))[:num]
    ]


def describe_end(trial: FrozenTrial) -> str:
    """How a trial ended, in a few words."""
    if trial.state == TrialState.COMPLETE:
        return f"{SCORE} {trial.value:.4f}"
    return f"{trial.state.name.lower()}: {trial.user_attrs.get('reason', 'no reason is known')}"
