"""The training timeline: one page, `report.html`, on which to see a run learn."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from gan.config import TrainConfig
from gan.evaluation.scores import Scores, explain, score_rows
from tasks.pages import Film, write_page
from tasks.pages.charts import LOSS_NOTE, PROBABILITY_NOTE, Chart, Series, curves_at
from tasks.pictures import epoch_of, find_sheets
from tasks.tracking import describe, flat_parameters


def save_timeline(
    config: TrainConfig,
    scores: Scores,
    champion: Mapping[str, str],
    links: Mapping[str, str],
    folder: Path,
) -> Path:
    """Write `report.html` from what the training left in `folder`; returns its path.

    The page fetches nothing and is below 3 MB. It replaces one that is there already.

    Args:
        config: what was trained.
        scores: what the evaluation found.
        champion: the champion's scores by name, as text; empty where none compare.
        links: addresses by name. Those over http(s) become links, others are shown as text.
        folder: the run's folder, with `history.csv` and `samples/epoch-NNNN.png`.

    Raises:
        FileNotFoundError: there is no history, so there was no training.
    """
    curves = pd.read_csv(folder / "history.csv").set_index("epoch")
    curves = curves[["d_loss", "g_loss", "d_real", "d_fake"]]
    sheets = find_sheets(folder)
    epochs = [epoch_of(sheet) for sheet in sheets]
    title = describe(config)
    film = Film(
        name=title,
        conditional=config.networks.num_classes > 0,
        epochs=epochs,
        sheets=sheets,
        values=curves_at(curves, epochs),
    )
    rows = [(*row, explain(row[0]).better) for row in score_rows(scores)]
    page = folder / "report.html"
    write_page(
        page,
        "timeline.html",
        films=[film],
        stops=[f"epoch {epoch}" for epoch in epochs],
        title=title,
        charts=draw_charts(curves),
        rows=rows,
        floors=any(real for _, _, real, *_ in rows),
        champion=champion,
        judge=scores.judge,
        num_samples=scores.num_samples,
        parameters=flat_parameters(config),
        links=links,
    )
    return page


def draw_charts(curves: pd.DataFrame) -> list[Chart]:
    """The losses, and the discriminator's probabilities."""

    def lines(**labels: str) -> list[Series]:
        return [
            Series(label=label, film=0, curve=curve, colour=colour, values=curves[curve])
            for colour, (curve, label) in enumerate(labels.items())
        ]

    return [
        Chart(
            title="Losses",
            note=LOSS_NOTE,
            series=lines(d_loss="discriminator", g_loss="generator"),
        ),
        Chart(
            title="Probability of being real",
            note=PROBABILITY_NOTE,
            series=lines(d_real="D(x), real", d_fake="D(G(z)), drawn"),
            top=1.0,
        ),
    ]
