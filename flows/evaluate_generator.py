"""Look closely at a registered generator: how its scores spread, who can tell, where it fails."""

from typing import Annotated

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.runtime import flow_run
from pydantic import Field

from flows import command_line
from flows.parameters import DeviceName, NumSamples, Seed, VersionName
from gan.training import choose_device
from tasks.data import download_mnist
from tasks.evaluation import Findings, examine_generator
from tasks.reconciliation import interrupted_by
from tasks.reporting import report_findings
from tasks.run_folder import finish, own_folder
from tasks.services import check_services
from tasks.settings import load_settings
from tasks.tracking import end_tracking
from tasks.versions import evaluation_run, fetch_version

NumDraws = Annotated[int, Field(ge=1, le=20)]


@flow(
    name="evaluate-generator",
    flow_run_name="version {version}, seed {seed}",
    on_cancellation=[end_tracking],
    on_crashed=[end_tracking],
)
def evaluate_generator(
    version: VersionName = "champion",
    seed: Seed = 0,
    device: DeviceName = "auto",
    num_samples: NumSamples = 10_000,
    num_draws: NumDraws = 3,
) -> Findings | State[None]:
    """Score a registered generator anew, several times, and set fresh classifiers on it.

    Takes some minutes on a CPU: two adversaries are trained to tell its drawings from real digits,
    and a student is trained on drawings alone.

    Args:
        version: the version's number, or an alias such as champion or challenger.
        seed: decides which images are drawn, with those after it; at registration it was 0.
        device: where to draw; auto takes CUDA, then MPS, then the CPU.
        num_samples: drawn images to judge in each draw; scores of different counts do not compare.
        num_draws: how often to draw and score.
    """
    settings = load_settings()
    place = choose_device(device).type
    folder = settings.runs_dir / str(flow_run.get_id())

    with own_folder(folder, "scoring"):
        try:
            check_services()
            dataset = download_mnist(settings.data_dir, settings.data_mirrors)
            fetched = fetch_version(version, folder)
            with evaluation_run(fetched, folder) as run_id:
                findings = examine_generator(
                    fetched.bundle,
                    dataset,
                    place,
                    run_id,
                    folder,
                    num_samples=num_samples,
                    num_draws=num_draws,
                    seed=seed,
                )
                report_findings(fetched, findings)
            finish(folder)
        except BaseException as error:
            return interrupted_by(error, folder)
    return findings


if __name__ == "__main__":
    command_line.run(evaluate_generator)
