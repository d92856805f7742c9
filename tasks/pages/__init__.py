"""Pages: self-contained HTML files that work offline, and the parts that they share.

A folder, because a page is more than Python: `page.html` and the templates that extend it,
`page.css`, `page.js`. Whatever a page shows is escaped, and its policy forbids the browser to
fetch anything or to run any script but this one.
"""

from __future__ import annotations

import base64
import hashlib
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from tasks.pages.charts import Chart

NUM_GREYS = 16
"""Greys of an embedded sheet: half the bytes, and at most 46 kB however noisy it is."""


@dataclass(frozen=True, kw_only=True)
class Film:
    """What the slider shows of one run: a sheet and its numbers at each stop."""

    name: str
    conditional: bool
    """Whether row n of a sheet holds the digit n."""
    epochs: Sequence[int]
    """The epoch of the run at each stop."""
    sheets: Sequence[Path]
    """The sheet at each stop: a picture of 302 x 302."""
    values: Mapping[str, Sequence[float]]
    """Curves by name, such as `d_loss`, with a value at each stop: NaN where none is known."""


def write_page(
    path: Path, template: str, *, films: Sequence[Film], stops: Sequence[str], **values: Any
) -> None:
    """Render a template of this folder to `path`, all or nothing.

    Args:
        path: where the page goes; its folder is there.
        template: the file's name.
        films: the runs to show, each with as many epochs as there are stops.
        stops: what the slider says at each stop.
        values: whatever else the template shows.
    """
    environment = Environment(
        loader=PackageLoader("tasks", "pages"), autoescape=True, undefined=StrictUndefined
    )
    environment.tests["web_address"] = is_web_address
    environment.filters["show"] = show
    script = _read("page.js")
    page = environment.get_template(template).render(
        values,
        films=films,
        stops=stops,
        data={"stops": stops, "films": [_describe(film) for film in films]},
        style=_read("page.css"),
        script=script,
        script_digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        chart_size=Chart.SIZE,
    )
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_text(page)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def is_web_address(text: str) -> bool:
    """Whether a text may become a link: nothing but http(s) does."""
    try:
        address = urlsplit(text)
    except ValueError:
        return False
    return address.scheme in ("http", "https") and bool(address.netloc)


def embed(sheet: Path) -> str:
    """A sheet as a data URI."""
    buffer = io.BytesIO()
    with Image.open(sheet) as picture:
        picture.convert("L").quantize(NUM_GREYS).save(buffer, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def show(value: float) -> str:
    """A curve's value as text."""
    return "-" if math.isnan(value) else f"{value:.3f}"


def _describe(film: Film) -> dict[str, Any]:
    """What the script needs of a film."""
    return {
        "name": film.name,
        "conditional": film.conditional,
        "epochs": film.epochs,
        "sheets": [embed(sheet) for sheet in film.sheets],
        "values": {name: [show(value) for value in at] for name, at in film.values.items()},
    }


def _read(name: str) -> str:
    return Path(__file__).with_name(name).read_text()
