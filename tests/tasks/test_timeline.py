"""The timeline page: as a file, in a headless Chromium and in MLflow's own viewer."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from mlflow import MlflowClient
from PIL import Image
from playwright.sync_api import Browser, ConsoleMessage, FrameLocator, Page, expect, sync_playwright

from gan.config import ConvConfig
from gan.data import Split, load_mnist
from gan.evaluation.scores import load_floors
from gan.recipes import quick, vanilla
from tasks.pages import NUM_GREYS, is_web_address
from tasks.pages.charts import MAX_POINTS, Chart, Series
from tasks.timeline import save_timeline
from tasks.tracking import describe
from tests.browser import CHROMIUM, PATIENCE_MS, SWITCHES
from tests.tasks.short_run import train_shortly

EPOCHS = 4
TINY = replace(quick(), networks=ConvConfig(width=4), epochs=EPOCHS, batch_size=250)
LINKS = {
    "MLflow run": "http://127.0.0.1:5000/#/experiments/1/runs/abc",
    "files": "s3://gan-models/mlflow/1/abc/artifacts",
}
HOSTILE = "<img src=x onerror=alert(1)></script><script>alert(2)</script>{{ 7*7 }}\"'&amp;"


@pytest.fixture(scope="session")
def few(mnist_dir: Path) -> Split:
    data = load_mnist(mnist_dir, "cpu").train
    return Split(images=data.images[:1000], labels=data.labels[:1000])


@pytest.fixture(scope="session")
def folder(few: Split, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a real short training of a conditional pair leaves."""
    folder = tmp_path_factory.mktemp("run")
    train_shortly(TINY, few, folder)
    return folder


@pytest.fixture(scope="session")
def report(folder: Path) -> Path:
    return save_timeline(TINY, load_floors(), {"frechet_distance": "0.4321"}, LINKS, folder)


class Skeleton(HTMLParser):
    """The elements of a page with the names of their attributes, its texts and its addresses."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, tuple[str, ...]]] = []
        self.texts: list[str] = []
        self.addresses: list[tuple[str, str]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, tuple(name for name, _ in attrs)))
        self.addresses += [(tag, value or "") for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_page_stands_alone(report: Path) -> None:
    page = report.read_text()
    addresses = Skeleton(page).addresses
    assert ("a", LINKS["MLflow run"]) in addresses
    assert all(tag == "a" or to.startswith("data:image/png;") for tag, to in addresses)
    assert "@import" not in page
    assert "url(" not in page
    assert list(report.parent.glob(".*.part")) == []


def test_page_has_scores_floors_champion_config_and_links(report: Path) -> None:
    texts = Skeleton(report.read_text()).texts
    for words in ("frechet_distance", "0.4321", f"{load_floors().frechet_distance:.4f}"):
        assert words in texts
    for words in ("ema_halflife_images", "22000", LINKS["files"], "mnist-judge-1"):
        assert any(words in text for text in texts), words


def test_column_without_numbers_is_left_out(folder: Path, tmp_path: Path) -> None:
    few_images = replace(load_floors(), num_samples=500)
    page = save_timeline(TINY, few_images, {}, {}, borrowed(folder, tmp_path)).read_text()
    heads = Skeleton(page).texts
    assert "drawn" in heads
    assert "real" not in heads
    assert "champion" not in heads
    assert "There is no floor for so many images." in page
    assert "No champion was scored alike." in page


def test_unconditional_run_has_no_digit_to_pick(few: Split, tmp_path: Path) -> None:
    config = replace(vanilla(), epochs=1, batch_size=500)
    train_shortly(config, few, tmp_path)
    scores = replace(load_floors(), digit_as_asked=None)
    page = save_timeline(config, scores, {}, {}, tmp_path).read_text()
    assert 'name="digit"' not in page
    assert "digit_as_asked" not in page


def borrowed(folder: Path, place: Path) -> Path:
    """Another run folder with the same pictures and history."""
    for name in ("samples", "history.csv"):
        if not (place / name).exists():
            (place / name).symlink_to(folder / name)
    return place


def test_page_of_the_noisiest_pictures_is_below_three_megabytes(tmp_path: Path) -> None:
    epochs = range(1, 40)  # the most sheets that a training leaves: 39 epochs, each with one
    rng = np.random.default_rng(0)
    (tmp_path / "samples").mkdir()
    for epoch in epochs:
        noise = rng.integers(0, 256, (302, 302), np.uint8)
        Image.fromarray(noise).save(tmp_path / "samples" / f"epoch-{epoch:04}.png")
    names = ("d_loss", "g_loss", "d_real", "d_fake")
    long = pd.DataFrame({name: rng.random(100_000) for name in names})
    long.assign(epoch=range(1, 100_001)).to_csv(tmp_path / "history.csv", index=False)
    page = save_timeline(TINY, load_floors(), {}, LINKS, tmp_path)
    assert page.stat().st_size < 3e6


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(st.characters(codec="utf-8")) | st.just(HOSTILE))
def test_no_text_becomes_markup(text: str, folder: Path, tmp_path: Path) -> None:
    def pages(text: str) -> Skeleton:
        config = replace(TINY, recipe=text)
        scores = replace(load_floors(), judge=text)
        champion = {"frechet_distance": text}
        page = save_timeline(config, scores, champion, {text: text}, borrowed(folder, tmp_path))
        return Skeleton(page.read_text())

    shown = pages(text)
    assert shown.elements == pages("harmless").elements
    data = next(json.loads(each) for each in shown.texts if each.startswith('{"films"'))
    assert data["films"][0]["name"] == describe(replace(TINY, recipe=text))


@pytest.mark.parametrize(
    "address",
    ["javascript:alert(1)", "data:text/html,x", "s3://bucket/key", "//host/x", "http:x", "", "a b"],
)
def test_nothing_but_a_web_address_becomes_a_link(address: str) -> None:
    assert not is_web_address(address)
    assert is_web_address("https://host/path")


def chart_of(*values: float) -> Chart:
    series = pd.Series(values, index=range(1, len(values) + 1))
    line = Series(label="line", film=0, curve="d_loss", colour=0, values=series)
    return Chart(title="Losses", note="", series=[line])


@st.composite
def charts(draw: st.DrawFn) -> Chart:
    lines = []
    for _ in range(draw(st.integers(1, 6))):
        values = draw(st.lists(st.floats(0, 1e6), min_size=1, max_size=50))
        epochs = draw(st.sets(st.integers(1, 10**5), min_size=len(values), max_size=len(values)))
        series = pd.Series(values, index=sorted(epochs))
        lines.append(Series(label="line", film=0, curve="d_loss", colour=0, values=series))
    return Chart(title="Losses", note="", series=lines)


@settings(max_examples=50)
@given(chart=charts())
@example(chart=chart_of(5e-324))
@example(chart=chart_of(0.0))
def test_lines_ticks_and_cursors_lie_in_the_box(chart: Chart) -> None:
    width, height = chart.SIZE
    for line in chart.series:
        points = chart.points(line)
        assert [x for x, _ in points] == sorted(x for x, _ in points)
        assert all(chart.LEFT <= x <= width - chart.RIGHT for x, _ in points)
        assert all(chart.TOP <= y <= height - chart.BOTTOM for _, y in points)
    assert chart.x(0) == chart.x(1) == chart.LEFT
    assert chart.x(chart.last_epoch) in (chart.LEFT, width - chart.RIGHT)
    assert all(chart.LEFT <= chart.x(tick) <= width - chart.RIGHT for tick in chart.x_ticks)
    assert all(chart.TOP <= chart.y(tick) <= height - chart.BOTTOM for tick in chart.y_ticks)


def test_long_line_is_thinned_and_keeps_its_end() -> None:
    values = pd.Series(range(100_000), index=range(1, 100_001), dtype=float)
    line = Series(label="", film=0, curve="d_loss", colour=0, values=values)
    chart = Chart(title="", note="", series=[line])
    points = chart.points(line)
    assert len(points) <= MAX_POINTS + 1
    assert points[-1] == (chart.x(100_000), chart.y(99_999))


# In the browser.

in_browser = pytest.mark.browser
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="Chromium is missing: make system-packages"
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    expect.set_options(timeout=PATIENCE_MS)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=SWITCHES)
        yield browser
        browser.close()


class Watched:
    """A page with all that it asked for and complained of."""

    def __init__(self, browser: Browser, **options: Any) -> None:
        self.page = browser.new_page(**options)
        self.page.set_default_timeout(PATIENCE_MS)
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("console", self._hear)
        self.page.on("dialog", lambda dialog: self.complaints.append(dialog.message))

    def _hear(self, message: ConsoleMessage) -> None:
        if message.type == "error":
            self.complaints.append(message.text)


@pytest.fixture
def watched(browser: Browser) -> Iterator[Watched]:
    watched = Watched(browser, viewport={"width": 1100, "height": 900})
    yield watched
    watched.page.close()


def see(page: Page | FrameLocator) -> tuple[np.ndarray, str]:
    """The pixels of the sheet that is shown, and where the first chart's cursor stands."""
    flat = page.locator("canvas").first.evaluate(
        """canvas => [canvas.width,
            ...canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data]"""
    )
    pixels = np.array(flat[1:]).reshape(-1, flat[0], 4)[..., 0]
    return pixels, page.locator(".cursor").first.get_attribute("x1") or ""


def use(page: Page | FrameLocator, folder: Path) -> None:
    """Use all that the page of `folder` has, and see that it does what it should."""
    slider, name = page.get_by_role("slider"), page.locator("#stop-name")
    expect(name).to_have_text(f"epoch {EPOCHS}")
    last = see(page)

    slider.press("Home")
    expect(name).to_have_text("epoch 1")
    expect(slider).to_have_attribute("aria-valuetext", "epoch 1")
    expect(page.get_by_role("img", name="a hundred drawn digits after epoch 1")).to_be_visible()
    first = see(page)
    assert first[1] != last[1]
    assert (first[0] != last[0]).any()
    for epoch, seen in ((1, first), (EPOCHS, last)):
        sheet = np.asarray(Image.open(folder / "samples" / f"epoch-{epoch:04}.png")).astype(int)
        assert np.abs(seen[0] - sheet).max() <= 256 // NUM_GREYS * 2
    slider.press("ArrowRight")
    expect(name).to_have_text("epoch 2")

    box = slider.bounding_box()
    assert box is not None
    slider.click(position={"x": box["width"] - 2, "y": box["height"] / 2})
    expect(name).to_have_text(f"epoch {EPOCHS}")

    page.get_by_role("radio", name="7").check(force=True)
    expect(page.get_by_role("img", name=f"the digit 7 after epoch {EPOCHS}")).to_be_visible()
    seven, _ = see(page)
    assert seven.shape == (62, 152)
    for place in range(10):
        row, column = divmod(place, 5)
        tile = seven[row * 30 + 2 : row * 30 + 30, column * 30 + 2 : column * 30 + 30]
        there = last[0][7 * 30 + 2 : 7 * 30 + 30, place * 30 + 2 : place * 30 + 30]
        np.testing.assert_array_equal(tile, there)
    page.get_by_role("radio", name="7").press("ArrowRight")
    expect(page.get_by_role("radio", name="8")).to_be_checked()

    page.get_by_role("button", name="Play").press("Space")
    expect(page.get_by_role("button", name="Pause")).to_be_visible()
    expect(name).to_have_text("epoch 1")
    expect(name).to_have_text(f"epoch {EPOCHS}")
    expect(page.get_by_role("button", name="Play")).to_be_visible()

    chart = page.locator(".chart svg").first
    chart.click(position={"x": 45, "y": 30})
    expect(name).to_have_text("epoch 1")
    assert see(page)[1] == first[1]


@in_browser
@needs_chromium
def test_slider_keys_digits_play_and_charts_move_the_page(
    watched: Watched, report: Path, folder: Path
) -> None:
    watched.page.goto(report.as_uri())
    use(watched.page, folder)
    assert watched.complaints == []
    fetched = [url for url in watched.requests if not url.startswith("data:")]
    assert fetched == [report.as_uri()]


@in_browser
@needs_chromium
def test_hostile_names_stay_text(watched: Watched, folder: Path, tmp_path: Path) -> None:
    config = replace(TINY, recipe=HOSTILE)
    links = {HOSTILE: "javascript:alert(3)"}
    page = save_timeline(config, load_floors(), {}, links, borrowed(folder, tmp_path))
    watched.page.goto(page.as_uri())
    expect(watched.page.get_by_role("heading", level=1)).to_have_text(describe(config))
    expect(watched.page.get_by_role("slider")).to_be_visible()
    assert watched.page.locator("main a").count() == 0
    assert watched.complaints == []
    assert [url for url in watched.requests if not url.startswith("data:")] == [page.as_uri()]


@in_browser
@needs_chromium
def test_injected_script_would_not_run(watched: Watched, report: Path, tmp_path: Path) -> None:
    broken = report.read_text().replace("<main>", "<main><script>document.title = 'run'</script>")
    (tmp_path / "broken.html").write_text(broken)
    watched.page.goto((tmp_path / "broken.html").as_uri())
    assert watched.page.title() != "run"
    assert any("Content Security Policy" in complaint for complaint in watched.complaints)


@in_browser
@needs_chromium
@pytest.mark.parametrize("width", [320, 375, 768])
def test_narrow_screen_needs_no_sideways_scroll(browser: Browser, report: Path, width: int) -> None:
    watched = Watched(browser, viewport={"width": width, "height": 800}, has_touch=True)
    watched.page.goto(report.as_uri())
    assert watched.page.evaluate("document.documentElement.scrollWidth") <= width
    watched.page.get_by_role("button", name="Play").tap()
    expect(watched.page.get_by_role("button", name="Pause")).to_be_visible()
    watched.page.close()


@in_browser
@needs_chromium
def test_page_is_dark_where_the_reader_wants_it(browser: Browser, report: Path) -> None:
    def lightness(scheme: Literal["light", "dark"], what: str) -> int:
        watched = Watched(browser, color_scheme=scheme)
        watched.page.goto(report.as_uri())
        colour = watched.page.evaluate(f"getComputedStyle(document.body).{what}")
        watched.page.close()
        return sum(map(int, colour.strip("rgb()").split(",")))

    assert lightness("light", "color") + 400 < lightness("light", "backgroundColor")
    assert lightness("dark", "backgroundColor") + 400 < lightness("dark", "color")


@pytest.fixture(scope="module")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a real MLflow server with an empty store."""
    home = tmp_path_factory.mktemp("server")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--workers", "1"]
    command += ["--port", str(port), "--backend-store-uri", f"sqlite:///{home}/mlflow.db"]
    quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    with subprocess.Popen(
        command,
        cwd=home,
        env=os.environ | quiet,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as process:
        try:
            wait_until_healthy(f"http://127.0.0.1:{port}/health")
            yield f"http://127.0.0.1:{port}"
        finally:
            os.killpg(process.pid, 15)


def wait_until_healthy(url: str) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            urllib.request.urlopen(url, timeout=2).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.3)


@pytest.mark.slow
@in_browser
@needs_chromium
def test_page_works_in_the_artifact_viewer_of_mlflow(
    watched: Watched, mlflow_server: str, report: Path, folder: Path
) -> None:
    client = MlflowClient(mlflow_server)
    run = client.create_run(client.create_experiment("pages"), run_name="short")
    client.log_artifact(run.info.run_id, str(report))
    at = f"experiments/{run.info.experiment_id}/runs/{run.info.run_id}/artifacts/report.html"
    watched.page.goto(f"{mlflow_server}/#/{at}")
    use(watched.page.frame_locator("iframe.mlflow-html-iframe"), folder)
    assert all(
        url.startswith((mlflow_server, "data:", f"blob:{mlflow_server}"))
        for url in watched.requests
    )
