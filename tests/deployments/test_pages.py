"""What a person sees: the pages of Prefect and MLflow in a headless Chromium."""

import io
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow.entities import Run
from PIL import Image
from playwright.sync_api import Page, expect, sync_playwright
from prefect.client.schemas.objects import FlowRun

from tasks.run_view import NAME, QUERY
from tests.browser import CHROMIUM, PATIENCE_MS, SWITCHES
from tests.deployments.local_stack import LocalStack

pytestmark = [
    pytest.mark.slow,
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="Chromium is missing: make system-packages"),
]


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    expect.set_options(timeout=PATIENCE_MS)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=SWITCHES)
        page = browser.new_page(viewport={"width": 1200, "height": 1000})
        page.set_default_timeout(PATIENCE_MS)
        yield page
        browser.close()


@pytest.fixture(scope="module")
def run(stack: LocalStack, trained: FlowRun) -> Run:
    (run,) = stack.tracked(trained.id)
    return run


@pytest.fixture(scope="module")
def prefect_ui(stack: LocalStack) -> str:
    return stack.user["PREFECT_API_URL"].removesuffix("/api")


@pytest.fixture(scope="module")
def mlflow_ui(stack: LocalStack) -> str:
    return f"{stack.user['MLFLOW_TRACKING_URI']}/#"


def keep(page: Page, folder: Path | None, name: str) -> None:
    """Take a picture for the README, if they are wanted: small, with few colours."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        page.wait_for_timeout(2000)
        for close in page.locator("[data-component-id='mlflow.assistant.chat_panel.close']").all():
            close.click()
        page.wait_for_timeout(1000)
        picture = Image.open(io.BytesIO(page.screenshot()))
        picture.convert("RGB").quantize(64).save(folder / f"{name}.png", optimize=True)


def open_artifacts(page: Page, flow_run_page: str) -> None:
    page.goto(flow_run_page)
    page.wait_for_load_state("networkidle")
    page.get_by_text("Artifacts", exact=True).click()


def test_flow_run_page_shows_its_tasks_and_artifacts(
    page: Page, prefect_ui: str, trained: FlowRun, screenshots: Path | None
) -> None:
    open_artifacts(page, f"{prefect_ui}/runs/flow-run/{trained.id}")
    expect(page.get_by_text(trained.name).first).to_be_visible()
    expect(page.get_by_text("Completed").first).to_be_visible()
    expect(page.get_by_text("markdown").first).to_be_visible()
    expect(page.get_by_text("generator", exact=True).first).to_be_visible()
    keep(page, screenshots, "prefect-flow-run")


def test_artifact_shows_the_digits_and_leads_to_the_mlflow_run(
    page: Page, prefect_ui: str, trained: FlowRun, run: Run, screenshots: Path | None
) -> None:
    open_artifacts(page, f"{prefect_ui}/runs/flow-run/{trained.id}")
    page.get_by_text("generator", exact=True).first.click()
    sheet = page.locator("img[src^='data:image/png']")
    expect(sheet).to_be_visible()
    assert sheet.evaluate("image => image.naturalWidth") >= 280
    expect(page.get_by_text("frechet_distance")).to_be_visible()
    keep(page, screenshots, "prefect-artifact")
    link = page.get_by_role("link", name="MLflow run").get_attribute("href")
    assert link is not None
    page.goto(link)
    expect(page.get_by_text(str(run.info.run_name)).first).to_be_visible()


@pytest.fixture
def wide(page: Page) -> Iterator[Page]:
    """A window that shows all columns: MLflow leaves out what lies beyond."""
    before = page.viewport_size
    assert before is not None
    page.set_viewport_size({"width": 2000, "height": 1600})
    yield page
    page.set_viewport_size(before)


def test_run_table_shows_scores_and_settings_without_set_up(
    wide: Page, mlflow_ui: str, run: Run, screenshots: Path | None
) -> None:
    wide.goto(f"{mlflow_ui}/experiments/{run.info.experiment_id}/runs?{QUERY}")
    expect(wide.get_by_role("link", name=str(run.info.run_name)).first).to_be_visible()
    for column in ("frechet_distance", "coverage", "recipe", "learning_rate"):
        expect(wide.get_by_role("columnheader", name=column).first).to_be_visible()
    keep(wide, screenshots, "mlflow-runs")


def test_charts_show_curves_digits_and_scores_without_set_up(
    wide: Page, mlflow_ui: str, run: Run
) -> None:
    with wide.expect_response(lambda response: "samples" in response.url) as picture:
        wide.goto(
            f"{mlflow_ui}/experiments/{run.info.experiment_id}/runs?{QUERY}&compareRunsMode=CHART"
        )
    assert picture.value.ok
    for section in ("Curves", "Digits", "Scores"):
        expect(wide.get_by_text(section).first).to_be_visible()


def test_view_is_in_the_menu_of_views(page: Page, mlflow_ui: str, run: Run) -> None:
    page.goto(
        f"{mlflow_ui}/experiments/{run.info.experiment_id}/runs?workflowType=machine_learning"
    )
    page.get_by_role("button", name="Views").click()
    page.get_by_role("menuitem", name=NAME).click()
    expect(page.get_by_text("viewing a shared view")).to_be_visible()


def test_pictures_come_back_from_the_store(page: Page, mlflow_ui: str, run: Run) -> None:
    page.goto(f"{mlflow_ui}/experiments/{run.info.experiment_id}/runs/{run.info.run_id}/artifacts")
    with page.expect_response(lambda response: "losses.png" in response.url) as answer:
        page.get_by_text("losses.png").click()
    assert answer.value.ok
    page.wait_for_function(
        "[...document.images].some(image => image.complete && image.naturalWidth > 300)"
    )


def test_model_page_names_the_champion_and_its_run(
    page: Page, mlflow_ui: str, run: Run, screenshots: Path | None
) -> None:
    page.goto(f"{mlflow_ui}/models/mnist-gan-generator/versions/1")
    expect(page.get_by_text("champion").first).to_be_visible()
    expect(page.get_by_role("link", name=str(run.info.run_name)).first).to_be_visible()
    expect(page.get_by_text("frechet_distance").first).to_be_visible()
    keep(page, screenshots, "mlflow-model")
