from dataclasses import replace

import pytest

from gan.evaluation.scores import load_floors
from tasks.promotion import decide

CHAMPION = replace(
    load_floors(),
    frechet_distance=0.40,
    coverage=0.85,
    digit_as_asked=0.99,
    memorisation_pixels=0.01,
    memorisation_features=0.01,
)


def test_clearly_nearer_challenger_is_promoted_with_both_distances() -> None:
    decision = decide(replace(CHAMPION, frechet_distance=0.30), CHAMPION)
    assert decision.promote
    assert "0.3000 against 0.4000" in decision.reason


@pytest.mark.parametrize("distance", [0.40, 0.39, 0.45])
def test_equal_nearly_equal_or_worse_is_not(distance: float) -> None:
    decision = decide(replace(CHAMPION, frechet_distance=distance), CHAMPION)
    assert not decision.promote
    assert "no better beyond noise" in decision.reason


@pytest.mark.parametrize(
    "changed",
    [
        {"coverage": 0.80},
        {"digit_as_asked": 0.97},
        {"digit_as_asked": None},
        {"memorisation_pixels": 0.05},
        {"memorisation_features": 0.05},
    ],
)
def test_nearer_challenger_that_loses_elsewhere_is_not(changed: dict[str, float | None]) -> None:
    challenger = replace(CHAMPION, frechet_distance=0.20, **changed)
    decision = decide(challenger, CHAMPION)
    assert not decision.promote
    assert decision.reason.startswith(next(iter(changed)))


def test_champion_that_knows_no_digits_sets_no_bound_on_them() -> None:
    unconditional = replace(CHAMPION, frechet_distance=9.0, digit_as_asked=None)
    assert decide(CHAMPION, unconditional).promote
