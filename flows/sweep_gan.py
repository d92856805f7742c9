"""Search a recipe's settings: many trainings on Dask, the best of them judged and registered."""

from pathlib import Path
from typing import Annotated

import mlflow
from prefect import flow
from prefect.client.schemas.objects import State
from prefect.concurrency.sync import concurrency
from pydantic import Field

from flows import command_line
from flows.parameters import DeviceName, Epochs, NumSamples, RecipeName, Seed
from gan.recipes import configure
from gan.training import choose_device
from tasks.dask_cluster import count_workers, make_runner, require_store, run_trials
from tasks.data import download_mnist
from tasks.evaluation import evaluate_generator
from tasks.packing import pack_generator
from tasks.promotion import PromotionMode, promote_version
from tasks.reconciliation import end_left_runs, interrupted_by
from tasks.registry import RegisteredVersion, register_generator
from tasks.run_folder import finish
from tasks.schedule import GPU_LEASE_S, gpu_limits
from tasks.search_space import Space, build_distributions, describe_space, read_space
from tasks.services import check_services
from tasks.settings import load_settings
from tasks.sweep import Sweep, find_best, own_sweep_folder, propose_trials
from tasks.sweep_report import report_sweep
from tasks.tracking import end_tracking, open_run

NUM_FINALISTS = 3
"""The best trials by their early scores, which are scored in full."""

NumTrials = Annotated[int, Field(ge=1, le=100_000)]
NumWorkers = Annotated[int, Field(ge=1, le=256)]
NumThreads = Annotated[int, Field(ge=1, le=256)]
MemoryGib = Annotated[float, Field(ge=1, le=1024)]
DaskAddress = Annotated[str, Field(pattern=r"^(tcp|tls)://[^/@\s]+:\d+$")]


@flow(
    name="sweep-gan",
    flow_run_name="{recipe}, {trials} trials, seed {seed}",
    on_cancellation=[end_tracking],
    on_crashed=[end_tracking],
)
def sweep_gan(
    space: Path | Space = Path("sweep.yaml"),
    recipe: RecipeName = "quick",
    trials: NumTrials = 16,
    epochs: Epochs = 2,
    seed: Seed = 0,
    dask_address: DaskAddress | None = None,
    workers: NumWorkers | None = None,
    threads_per_worker: NumThreads = 1,
    memory_gib: MemoryGib = 3,
    device: DeviceName = "auto",
    num_samples: NumSamples = 10_000,
    promote: PromotionMode = "if-better",
    resume: bool = False,
) -> RegisteredVersion | State[None]:
    """Search settings of a recipe by many trainings; judge, register and maybe promote the best.

    Args:
        space: a YAML or JSON file, or the mapping itself: fields of the recipe, each with a list
            of values or a range of low, high and maybe log or step.
        recipe: what the trials depart from: quick, best or vanilla.
        trials: trainings, the hopeless ones that end early among them.
        epochs: passes over the training images in each trial.
        seed: decides the trainings and, with one worker, also what is proposed.
        dask_address: a Dask scheduler such as tcp://host:8786; empty for workers of its own here.
        workers: own worker processes, one trial each; empty for one a core, or one for the
            GPU, and no more than MLflow's store takes.
        threads_per_worker: threads that one training computes with.
        memory_gib: memory that one trial may take; above it its worker is ended.
        device: where to train; auto takes CUDA, then MPS, then the CPU.
        num_samples: drawn images to judge each of the best three trials by.
        promote: whether the best becomes champion: if-better than the one there is, never, always.
        resume: go on with the last sweep of the same space, recipe, epochs and seed.
    """
    settings = load_settings()
    base = configure(recipe, epochs=epochs, seed=seed)
    distributions = build_distributions(
        read_space(space) if isinstance(space, Path) else space, base
    )
    place = choose_device(device).type
    num_workers = workers or count_workers(place, mlflow.get_tracking_uri())
    # One training at a time on this machine's GPU; workers elsewhere have slots of their own.
    slots = gpu_limits() if place != "cpu" and not dask_address else []
    if not dask_address:
        require_store(mlflow.get_tracking_uri(), num_workers)

    with own_sweep_folder(settings.runs_dir, base, distributions, resume=resume) as folder:
        name = f"sweep of {recipe}, {trials} trials, seed {seed}"
        parameters = {"recipe": recipe, "epochs": epochs, "seed": seed}
        try:
            check_services()
            end_left_runs(folder)
            dataset = download_mnist(settings.data_dir, settings.data_mirrors)
            with (
                concurrency(slots, occupy=1, lease_duration=GPU_LEASE_S),
                open_run(name, parameters, describe_space(distributions), folder) as run_id,
            ):
                sweep = Sweep(
                    folder=folder,
                    config=base,
                    distributions=distributions,
                    device=place,
                    threads=threads_per_worker,
                    mlflow_run_id=run_id,
                    tracking_uri=mlflow.get_tracking_uri(),
                )
                numbers = propose_trials(sweep, trials)
                run_trials(
                    sweep, numbers, make_runner(dask_address, place, num_workers, memory_gib)
                )
                scored = [
                    (
                        trial,
                        evaluate_generator(
                            trial.trained.bundle,
                            dataset,
                            place,
                            trial.mlflow_run_id,
                            trial.folder,
                            num_samples=num_samples,
                        ),
                    )
                    for trial in find_best(sweep, NUM_FINALISTS)
                ]
                best, scores = min(scored, key=lambda final: final[1].frechet_distance)
                trained = pack_generator(best.trained, best.config, scores, best.mlflow_run_id)
                version = register_generator(trained, scores, best.mlflow_run_id)
                decision = promote_version(
                    version.version, promote, dataset, place, folder, num_samples=num_samples
                )
                finals = {trial.number: scores for trial, scores in scored}
                report_sweep(sweep, finals, best.number, version, decision)
            finish(folder)
        except BaseException as error:
            return interrupted_by(error, folder)
    return version


if __name__ == "__main__":
    command_line.run(sweep_gan)
