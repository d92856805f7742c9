"""The main flow: MNIST in, a judged and registered generator out."""

from uuid import UUID

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.concurrency.sync import concurrency
from prefect.runtime import flow_run
from prefect.states import Cancelled

from flows import command_line
from flows.parameters import (
    BatchSize,
    DeviceName,
    Devices,
    Epochs,
    LearningRate,
    MaxDelayHours,
    NumSamples,
    RecipeName,
    Seed,
)
from gan.parallel import check_devices
from gan.recipes import configure
from gan.training import choose_device
from tasks.data import download_mnist
from tasks.evaluation import evaluate_generator
from tasks.packing import pack_generator
from tasks.promotion import PromotionMode, promote_version
from tasks.reconciliation import end_left_runs, interrupted_by
from tasks.registry import RegisteredVersion, register_generator
from tasks.reporting import report
from tasks.run_folder import finish, own_run_folder
from tasks.schedule import GPU_LEASE_S, gpu_limits, reason_to_drop
from tasks.services import check_services
from tasks.settings import load_settings
from tasks.storage import S3Address
from tasks.tracking import describe, end_tracking, tracked_run
from tasks.training import train_generator
from tasks.versions import check_destination, point_to_champion, publish_generator


def name_run() -> str:
    """The flow run's name: what it does."""
    given = flow_run.get_parameters()
    asked = ("recipe", "epochs", "batch_size", "learning_rate")
    return describe(configure(seed=choose_seed(given["seed"]), **{k: given[k] for k in asked}))


def choose_seed(seed: int | None) -> int:
    """The seed, or a fresh one a flow run; a retried run keeps its own."""
    return UUID(flow_run.get_id()).int % 2**31 if seed is None else seed


@flow(
    name="train-gan",
    flow_run_name=name_run,
    on_cancellation=[end_tracking],
    on_crashed=[end_tracking],
)
def train_gan(
    recipe: RecipeName = "quick",
    epochs: Epochs | None = None,
    batch_size: BatchSize | None = None,
    learning_rate: LearningRate | None = None,
    seed: Seed | None = 0,
    device: DeviceName = "auto",
    devices: Devices = 1,
    num_samples: NumSamples = 10_000,
    promote: PromotionMode = "if-better",
    publish_to: S3Address | None = None,
    max_delay_hours: MaxDelayHours | None = None,
    resume: bool = False,
) -> RegisteredVersion | State[None]:
    """Train a GAN on MNIST, judge what it draws and register the generator.

    Args:
        recipe: quick (digits as asked, five minutes on two cores), best (better ones, half an hour
            to an hour) or vanilla (the GAN of 2014).
        epochs: passes over the 60,000 training images; empty for the recipe's number.
        batch_size: real images a step; empty for the recipe's number.
        learning_rate: Adam's step size; empty for the recipe's.
        seed: decides everything random; empty for a fresh one each run.
        device: where to train; auto takes CUDA, then MPS, then the CPU.
        devices: GPUs, or processes on the CPU, that share each batch in equal parts.
        num_samples: drawn images to judge; scores of different counts do not compare.
        promote: whether it becomes champion: if-better than the one there is, never or always.
        publish_to: also publish it to s3://bucket/prefix; empty for the setting, if there is one.
        max_delay_hours: drop a scheduled run that starts later than this; empty for never.
        resume: go on with the last interrupted training of the same parameters on this machine.
    """
    if reason := reason_to_drop(max_delay_hours):
        return Cancelled(message=reason)
    settings = load_settings()
    config = configure(
        recipe,
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        seed=choose_seed(seed),
    )
    place = choose_device(device).type
    check_devices(devices, place, config.batch_size)
    destination = publish_to or settings.publish_to

    with own_run_folder(settings.runs_dir, config, resume=resume) as folder:
        try:
            check_services()
            end_left_runs(folder)
            if destination:
                check_destination(destination)
            dataset = download_mnist(settings.data_dir, settings.data_mirrors)
            with (
                concurrency(gpu_limits(), occupy=1, lease_duration=GPU_LEASE_S),
                tracked_run(config, dataset, place, folder, devices=devices) as run_id,
            ):
                trained = train_generator(
                    config, dataset, place, run_id, folder, settings.checkpoint_every_s, devices
                )
                scores = evaluate_generator(
                    trained.bundle, dataset, place, run_id, folder, num_samples=num_samples
                )
                trained = pack_generator(trained, config, scores, run_id)
                version = register_generator(trained, scores, run_id)
                decision = promote_version(
                    version.version, promote, dataset, place, folder, num_samples=num_samples
                )
                if destination:
                    publish_generator(trained.bundle, version.version, destination)
                    point_to_champion(destination)
                report(config, trained, scores, version, decision, run_id, folder)
            finish(folder)
        except BaseException as error:
            return interrupted_by(error, folder)
    return version


if __name__ == "__main__":
    command_line.run(train_gan)
