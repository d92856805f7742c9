"""Make a registered generator champion, if it is better than the one that is."""

from prefect import flow
from prefect.runtime import flow_run

from flows import command_line
from flows.parameters import DeviceName, NumSamples, Seed, VersionName
from gan.training import choose_device
from tasks.data import download_mnist
from tasks.evaluation import evaluate_generator
from tasks.promotion import Decision, decide, record_decision
from tasks.services import check_services
from tasks.settings import load_settings
from tasks.versions import evaluation_run, fetch_version, report_scores


@flow(name="promote-generator", flow_run_name="version {version}")
def promote_generator(
    version: VersionName = "challenger",
    seed: Seed = 0,
    device: DeviceName = "auto",
    num_samples: NumSamples = 10_000,
) -> Decision:
    """Score a version and the champion alike; the better one is champion afterwards.

    Args:
        version: the version's number, or an alias.
        seed: decides which images both of them draw.
        device: where to draw; auto takes CUDA, then MPS, then the CPU.
        num_samples: drawn images to judge; a decision on fewer is less sure.
    """
    settings = load_settings()
    place = choose_device(device).type
    folder = settings.runs_dir / str(flow_run.get_id())

    check_services()
    dataset = download_mnist(settings.data_dir, settings.data_mirrors)
    challenger = fetch_version(version, folder / "challenger")
    champion = fetch_version("champion", folder / "champion")
    if challenger.version == champion.version:
        return Decision(promote=False, reason=f"version {champion.version} is champion already")

    scores = []
    for fetched in (challenger, champion):
        with evaluation_run(fetched) as run_id:
            scores.append(
                evaluate_generator(
                    fetched.bundle,
                    dataset,
                    place,
                    run_id,
                    fetched.bundle.parent,
                    num_samples=num_samples,
                    seed=seed,
                )
            )
        report_scores(fetched, scores[-1])
    decision = decide(*scores)
    record_decision(challenger.version, champion.version, decision)
    return decision


if __name__ == "__main__":
    command_line.run(promote_generator)
