"""Make a registered generator champion, if it is better than the one that is."""

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.runtime import flow_run

from flows import command_line
from flows.parameters import DeviceName, NumSamples, Seed, VersionName
from gan.training import choose_device
from tasks.data import download_mnist
from tasks.promotion import Decision, PromotionMode, promote_version
from tasks.reconciliation import interrupted_by
from tasks.run_folder import finish, own_folder
from tasks.services import check_services
from tasks.settings import load_settings
from tasks.versions import point_to_champion


@flow(name="promote-generator", flow_run_name="version {version}")
def promote_generator(
    version: VersionName = "challenger",
    promote: PromotionMode = "if-better",
    seed: Seed = 0,
    device: DeviceName = "auto",
    num_samples: NumSamples = 10_000,
) -> Decision | State[None]:
    """Judge a version and the champion alike; the better one is champion afterwards.

    Args:
        version: the version's number, or an alias.
        promote: if-better compares it with the champion; always does not ask; never only says so.
        seed: decides which images both of them draw.
        device: where to draw; auto takes CUDA, then MPS, then the CPU.
        num_samples: drawn images to judge; the fewer, the less can be told apart.
    """
    settings = load_settings()
    place = choose_device(device).type
    folder = settings.runs_dir / str(flow_run.get_id())

    with own_folder(folder, "promoting"):
        try:
            check_services()
            dataset = download_mnist(settings.data_dir, settings.data_mirrors)
            decision = promote_version(
                version, promote, dataset, place, folder, num_samples=num_samples, seed=seed
            )
            if settings.publish_to:  # also where an earlier start moved the champion alone
                point_to_champion(settings.publish_to)
            finish(folder)
        except BaseException as error:
            return interrupted_by(error, folder)
    return decision


if __name__ == "__main__":
    command_line.run(promote_generator)
