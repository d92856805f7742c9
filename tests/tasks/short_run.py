"""A real training of a second or two, as `train_generator` leaves it on the disk."""

from dataclasses import asdict
from pathlib import Path

import pandas as pd
import torch

from gan.config import TrainConfig
from gan.data import Split
from gan.training import Progress, TrainState, train
from tasks.journal import sheet_path
from tasks.training import save_sheet


def train_shortly(config: TrainConfig, data: Split, folder: Path) -> list[Progress]:
    """Train, with a sheet an epoch in `folder` and the history; gives the finished epochs."""
    state = TrainState(config, torch.device("cpu"))
    history = []
    for progress in train(state, data):
        if progress.epoch_done:
            history.append(progress)
            save_sheet(state, sheet_path(folder, progress.epoch))
    curves = pd.DataFrame(asdict(progress) for progress in history)
    curves.to_csv(folder / "history.csv", index=False)
    return history
