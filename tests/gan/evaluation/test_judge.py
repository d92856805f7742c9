import shutil
import sys
from pathlib import Path

import pytest
import torch

from gan.data import DATASET_DIGEST, Mnist, Split
from gan.evaluation.judge import (
    JUDGE_FOLDER,
    JUDGE_ID,
    Judge,
    JudgeError,
    judge_images,
    load_judge,
    read_card,
)
from gan.evaluation.train_judge import main, save_judge, shift, train_judge

FILES = [f"{JUDGE_ID}.safetensors", f"{JUDGE_ID}.json"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in FILES:
        shutil.copy(JUDGE_FOLDER / name, tmp_path)
    return tmp_path


def head(split: Split, num: int) -> Split:
    return Split(images=split.images[:num], labels=split.labels[:num])


def test_the_judge_reads_the_test_images_as_its_card_says(mnist: Mnist) -> None:
    verdict = judge_images(load_judge(), mnist.test.images)
    accuracy = (verdict.digits == mnist.test.labels).double().mean().item()
    assert accuracy >= 0.995
    assert accuracy == pytest.approx(read_card()["test_accuracy"], abs=2e-4)
    assert read_card()["dataset"] == DATASET_DIGEST


def test_the_pinned_weights_take_at_most_a_megabyte() -> None:
    assert (JUDGE_FOLDER / FILES[0]).stat().st_size <= 1_000_000


def test_features_and_logits_have_their_shapes_and_do_not_depend_on_the_batch() -> None:
    images = torch.randint(256, (25, 28, 28), dtype=torch.uint8)
    judge = load_judge()
    verdict = judge_images(judge, images, batch_size=10)
    assert verdict.features.shape == (25, 128)
    assert verdict.features.dtype == torch.float32
    assert verdict.features.min() >= 0
    assert judge.logits(images).shape == (25, 10)
    torch.testing.assert_close(verdict.features, judge.features(images))
    assert torch.equal(verdict.digits, judge.logits(images).argmax(1))


def test_altered_weights_are_refused(folder: Path) -> None:
    path = folder / FILES[0]
    payload = bytearray(path.read_bytes())
    payload[-1] ^= 1
    path.write_bytes(payload)
    with pytest.raises(JudgeError, match="was altered"):
        load_judge(folder=folder)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(JudgeError, match=name):
        load_judge(folder=folder)


@pytest.mark.parametrize("card", [b"", b"{", b"\xff{}"])
def test_a_damaged_card_is_named(folder: Path, card: bytes) -> None:
    (folder / FILES[1]).write_bytes(card)
    with pytest.raises(JudgeError, match=FILES[1]):
        load_judge(folder=folder)


def test_the_card_of_another_judge_is_refused(folder: Path) -> None:
    (folder / FILES[1]).write_text('{"id": "mnist-judge-0"}')
    with pytest.raises(JudgeError, match="mnist-judge-0"):
        load_judge(folder=folder)


def test_a_pinned_judge_is_never_overwritten(folder: Path, mnist: Mnist) -> None:
    before = (folder / FILES[0]).read_bytes()
    with pytest.raises(JudgeError, match="is pinned"):
        save_judge(Judge(), mnist.test, folder)
    assert (folder / FILES[0]).read_bytes() == before


@pytest.mark.parametrize(("place", "words"), [("", "is pinned"), ("nowhere", "no folder")])
def test_a_judge_that_could_not_be_saved_is_not_trained(
    folder: Path, mnist_dir: Path, monkeypatch: pytest.MonkeyPatch, place: str, words: str
) -> None:
    options = ["--data", str(mnist_dir), "--folder", str(folder / place)]
    monkeypatch.setattr(sys, "argv", ["train_judge", *options])
    monkeypatch.setattr("gan.evaluation.train_judge.train_judge", lambda train: pytest.fail("long"))
    with pytest.raises(SystemExit, match=words):
        main()


def test_a_saved_judge_is_the_one_that_is_loaded(tmp_path: Path, mnist: Mnist) -> None:
    judge = Judge().eval()
    save_judge(judge, head(mnist.test, 100), tmp_path)
    images = mnist.test.images[:10]
    assert torch.equal(load_judge(folder=tmp_path).logits(images), judge.logits(images))


def test_the_same_seed_trains_the_same_judge(mnist: Mnist) -> None:
    few = head(mnist.train, 512)
    before = torch.get_rng_state()
    first, again, other = (train_judge(few, seed=seed, epochs=1) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    for name, value in first.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
    assert not torch.equal(first.head.weight, other.head.weight)


def test_shifts_go_two_pixels_at_most_in_every_direction() -> None:
    images = torch.zeros(2000, 28, 28, dtype=torch.uint8)
    images[:, 10, 20] = 255
    where = shift(images, torch.Generator().manual_seed(0)).nonzero()
    assert len(where) == 2000
    moves = {(row - 10, column - 20) for _, row, column in where.tolist()}
    assert moves == {(y, x) for y in range(-2, 3) for x in range(-2, 3)}
