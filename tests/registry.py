"""A real MLflow store with two registered generators that never learned anything."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Registry:
    """An MLflow store with versions 1, the champion, and 2, the challenger, of tiny generators."""

    folder: Path
    digests: tuple[str, str]

    def bundle(self, version: int) -> Path:
        """The folder that a version was registered from."""
        return self.folder / str(version) / "bundle"


def register_two(folder: Path) -> Registry:
    """Make an MLflow store ``mlflow.db`` in a folder, and register two tiny generators."""
    import mlflow
    import torch

    from gan.bundle import save_bundle
    from gan.config import ConvConfig
    from gan.evaluation.scores import load_floors
    from gan.networks import build_generator
    from tasks.registry import TAGS_OF_THE_RUN, register_generator
    from tasks.training import TrainedGenerator
    from tests.mlflow_store import mlflow_store

    digests = []
    with mlflow_store(folder, "versions"):
        for version in (1, 2):
            bundle = folder / str(version) / "bundle"
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(version)
                generator = build_generator(ConvConfig(width=4))
            digests.append(save_bundle(generator, bundle, {"model_card.md": b"# Tiny\n"}))
            trained = TrainedGenerator(
                bundle=bundle, digest=digests[-1], seconds=1.0, images_per_s=1.0
            )
            with mlflow.start_run(tags=dict.fromkeys(TAGS_OF_THE_RUN, "known")) as run:
                mlflow.log_param("seed", version)
            register_generator.fn(trained, load_floors(), run.info.run_id)
    return Registry(folder, (digests[0], digests[1]))
