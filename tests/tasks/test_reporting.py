from dataclasses import replace
from pathlib import Path

import mlflow
import numpy as np
import pytest
from mlflow import MlflowClient
from PIL import Image

from gan.evaluation.scores import load_floors, score_rows
from tasks.evaluation import Findings
from tasks.promotion import Decision
from tasks.registry import RegisteredVersion
from tasks.reporting import artifact_address, champion_scores, findings_page, page, summary
from tasks.tracking import MODEL_NAME
from tasks.training import TrainedGenerator

DECISION = Decision(version=3, champion=2, promoted=False, reason="it is no better")
VERSION = RegisteredVersion(name="mnist-gan-generator", version=3, alias="challenger")


def test_floor_is_shown_beside_every_score_of_as_many_images() -> None:
    floors = load_floors()
    scores = replace(floors, frechet_distance=12.5)
    rows = {name: (drawn, real) for name, drawn, real, _ in score_rows(scores)}
    assert rows["frechet_distance"] == (12.5, f"{floors.frechet_distance:.4f}")
    assert all(real for _, real in rows.values())
    assert all(meaning for *_, meaning in score_rows(scores))


def test_no_floor_is_shown_beside_scores_of_fewer_images() -> None:
    assert all(not real for _, _, real, _ in score_rows(replace(load_floors(), num_samples=500)))


def test_digit_as_asked_is_left_out_where_nothing_was_asked() -> None:
    names = [name for name, *_ in score_rows(replace(load_floors(), digit_as_asked=None))]
    assert "digit_as_asked" not in names


def test_summary_says_what_came_out_and_what_to_type_next(tmp_path: Path) -> None:
    trained = TrainedGenerator(
        bundle=tmp_path / "bundle", digest="0" * 64, seconds=61.5, images_per_s=2000.4
    )
    text = summary("quick, 5 epochs", trained, load_floors(), VERSION, DECISION, "abc", tmp_path)
    for words in (
        "quick, 5 epochs",
        "frechet_distance",
        "10,000 images, mnist-judge-1",
        "in 62 s, 2,000 images/s\n",
        f"run abc in {mlflow.get_tracking_uri()}",
        "not promoted: it is no better",
        "make ui",
        "models:/mnist-gan-generator@challenger",
    ):
        assert words in text
    again = replace(trained, taken_up_at=3000)
    text = summary("quick, 5 epochs", again, load_floors(), VERSION, DECISION, "abc", tmp_path)
    assert "in 62 s, 2,000 images/s since step 3,000\n" in text


def test_page_holds_the_sheet_the_champion_and_the_links(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((302, 302), np.uint8)).save(tmp_path / "sheet.png")
    champion = {"frechet_distance": "0.4321", "recipe": "quick"}
    text = page("quick", load_floors(), champion, {"run": "http://x/y"}, tmp_path / "sheet.png")
    assert "data:image/png;base64," in text
    (row,) = [line for line in text.splitlines() if line.startswith("| frechet_distance |")]
    assert f"| 0.4321 | {load_floors().frechet_distance:.4f} |" in row
    assert "[run](http://x/y)" in text
    assert text.count("\n") < 40, "a page, not a flood"


def test_findings_stand_beside_the_champion_and_what_real_images_get() -> None:
    floors = load_floors()
    findings = Findings(
        num_draws=3,
        num_samples=10_000,
        means=floors.metrics() | {"two_sample_50k": 0.98, "synthetic_accuracy": 0.97},
        deviations={"frechet_distance": 0.0123},
    )
    text = findings_page("version 7", findings, {"frechet_distance": "0.4321"})
    lines = {line.split(" |")[0].strip("| "): line for line in text.splitlines() if "|" in line}
    floor = f"{floors.frechet_distance:.4f}"
    assert f"| {floor} ± 0.0123 | 0.4321 | {floor} |" in lines["frechet_distance"]
    assert "| 0.9800 |  |  |" in lines["two_sample_50k"], "nothing was measured for it"
    assert "| 0.9700 |  | 0.9964 |" in lines["synthetic_accuracy"]
    assert "the mean of 3 draws, and its standard deviation." in text
    assert "Adversaries and student were trained" in text
    assert "digit_share" not in text


def test_findings_speak_of_no_deviation_of_one_draw_and_no_student_that_was_not() -> None:
    means = replace(load_floors(), digit_as_asked=None).metrics() | {"two_sample_50k": 0.98}
    findings = Findings(num_draws=1, num_samples=10_000, means=means, deviations={})
    text = findings_page("version 7", findings, {})
    assert "judged by mnist-judge-1: one draw." in text
    assert "Adversaries were trained" in text
    assert "deviation" not in text
    assert "student" not in text


@pytest.mark.usefixtures("registry")
def test_champions_scores_are_its_tags_where_there_is_one_that_compares() -> None:
    client, floors = MlflowClient(), load_floors()
    client.set_model_version_tag(MODEL_NAME, "1", "judge", floors.judge)
    tags = champion_scores(client, floors.judge, floors.num_samples)
    assert tags["frechet_distance"] == f"{floors.frechet_distance:.4f}"
    assert champion_scores(client, floors.judge, 500) == {}
    client.delete_registered_model_alias(MODEL_NAME, "champion")
    assert champion_scores(client, floors.judge, floors.num_samples) == {}


@pytest.mark.parametrize("alias", ["champion", "challenger"])
def test_next_line_names_the_alias_given(alias: str, tmp_path: Path) -> None:
    trained = TrainedGenerator(bundle=tmp_path, digest="0" * 64, seconds=1, images_per_s=1)
    version = replace(VERSION, alias=alias)
    assert f"@{alias}" in summary("t", trained, load_floors(), version, DECISION, "abc", tmp_path)


def test_files_behind_a_proxying_server_are_named_where_they_lie(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for store in ("s3://gan-models/mlflow", "s3://gan-models/mlflow/"):
        monkeypatch.setenv("MLFLOW_ARTIFACTS_DESTINATION", store)
        for proxied in (
            "mlflow-artifacts:/1/abc/artifacts",
            "mlflow-artifacts://host:5000/1/abc/artifacts",
        ):
            assert artifact_address(proxied) == "s3://gan-models/mlflow/1/abc/artifacts"
    assert artifact_address("s3://other/1/abc") == "s3://other/1/abc"
    monkeypatch.delenv("MLFLOW_ARTIFACTS_DESTINATION")
    assert artifact_address("mlflow-artifacts:/1/abc") == "mlflow-artifacts:/1/abc"


def test_password_of_the_store_of_files_is_on_no_page(monkeypatch: pytest.MonkeyPatch) -> None:
    assert artifact_address("ftp://me:secret@host/1/abc") == "ftp://host/1/abc"
    monkeypatch.setenv("MLFLOW_ARTIFACTS_DESTINATION", "sftp://me:secret@host/mlflow")
    assert artifact_address("mlflow-artifacts:/1/abc") == "sftp://host/mlflow/1/abc"
