"""Publish a registered generator to an S3 store: also one whose publishing failed before."""

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.runtime import flow_run

from flows import command_line
from flows.parameters import VersionName
from tasks.reconciliation import interrupted_by
from tasks.run_folder import finish, own_folder
from tasks.services import check_services
from tasks.settings import load_settings
from tasks.storage import S3Address, StorageError
from tasks.versions import check_destination, fetch_version, point_to_champion
from tasks.versions import publish_generator as publish


@flow(name="publish-generator", flow_run_name="version {version}")
def publish_generator(
    version: VersionName = "champion", publish_to: S3Address | None = None
) -> str | State[None]:
    """Publish a registered generator to an S3 store; a champion becomes the store's champion.

    Args:
        version: the version's number, or an alias.
        publish_to: s3://bucket/prefix; empty for the setting MNIST_GAN_PUBLISH_TO.
    """
    settings = load_settings()
    destination = publish_to or settings.publish_to
    if destination is None:
        raise StorageError("nowhere to publish: give publish_to, or set MNIST_GAN_PUBLISH_TO")
    folder = settings.runs_dir / str(flow_run.get_id())

    with own_folder(folder, "publishing"):
        try:
            check_services()
            check_destination(destination)
            fetched = fetch_version(version, folder)
            address = publish(fetched.bundle, fetched.version, destination)
            point_to_champion(destination)
            finish(folder)
        except BaseException as error:
            return interrupted_by(error, folder)
    return address


if __name__ == "__main__":
    command_line.run(publish_generator)
