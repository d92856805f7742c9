"""Score a registered generator again: another seed, another machine, another day."""

from prefect import flow
from prefect.runtime import flow_run

from flows import command_line
from flows.parameters import DeviceName, NumSamples, Seed, VersionName
from gan.evaluation.scores import Scores
from gan.training import choose_device
from tasks.data import download_mnist
from tasks.evaluation import evaluate_generator as score_bundle
from tasks.reporting import report_scores
from tasks.services import check_services
from tasks.settings import load_settings
from tasks.versions import evaluation_run, fetch_version


@flow(name="evaluate-generator", flow_run_name="version {version}, seed {seed}")
def evaluate_generator(
    version: VersionName = "champion",
    seed: Seed = 0,
    device: DeviceName = "auto",
    num_samples: NumSamples = 10_000,
) -> Scores:
    """Score a registered generator again and put the scores beside the champion's.

    Args:
        version: the version's number, or an alias such as champion or challenger.
        seed: decides which images are drawn; the scores at registration had 0.
        device: where to draw; auto takes CUDA, then MPS, then the CPU.
        num_samples: drawn images to judge; scores of different counts do not compare.
    """
    settings = load_settings()
    place = choose_device(device).type
    folder = settings.runs_dir / str(flow_run.get_id())

    check_services()
    dataset = download_mnist(settings.data_dir, settings.data_mirrors)
    fetched = fetch_version(version, folder)
    with evaluation_run(fetched) as run_id:
        scores = score_bundle(
            fetched.bundle, dataset, place, run_id, folder, num_samples=num_samples, seed=seed
        )
    report_scores(fetched, scores)
    return scores


if __name__ == "__main__":
    command_line.run(evaluate_generator)
