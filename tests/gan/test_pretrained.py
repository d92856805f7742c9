import pytest
import torch

from gan.bundle import CARD, PRETRAINED, load_bundle, verify_bundle
from gan.evaluation.judge import judge_images, load_judge
from gan.recipes import best
from gan.sampling import draw


def test_it_is_whole_and_small() -> None:
    verify_bundle(PRETRAINED)
    assert sum(file.stat().st_size for file in PRETRAINED.iterdir()) < 8e6


def test_it_is_of_recipe_best_as_it_is_today() -> None:
    assert load_bundle(PRETRAINED).config == best().networks


def test_its_card_says_how_to_make_it_again() -> None:
    card = (PRETRAINED / CARD).read_text()
    for word in ("`best`", "commit", "seed", "processor", "devices", "threads", "torch"):
        assert word in card


@pytest.mark.slow
def test_it_draws_what_is_asked() -> None:
    digits = torch.arange(10).repeat(100)
    seen = judge_images(
        load_judge(torch.device("cpu")), draw(load_bundle(PRETRAINED), digits, seed=0)
    )
    assert (seen.digits == digits).double().mean() > 0.98
