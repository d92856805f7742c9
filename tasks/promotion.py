"""Promotion: the alias `champion` moves to a version that is better and nowhere worse."""

from __future__ import annotations

from dataclasses import dataclass

from mlflow import MlflowClient
from prefect import task
from prefect.cache_policies import NO_CACHE

from gan.errors import UserError
from gan.evaluation.scores import Scores
from tasks.registry import MODEL_NAME

MIN_GAIN = 0.1
"""The share of the champion's Frechet distance by which a challenger must be nearer: two seeds of
`quick` were 9% apart (0.37 and 0.40)."""
MAX_LOSS = {"coverage": 0.02, "digit_as_asked": 0.005}
"""How far these shares may fall below the champion's."""
MAX_RISE = {"memorisation_pixels": 0.01, "memorisation_features": 0.01}
"""How far these shares may rise above the champion's."""


class PromotionError(UserError):
    """The registry changed in the meantime."""


@dataclass(frozen=True, kw_only=True)
class Decision:
    """Whether a version becomes champion, and why."""

    promote: bool
    reason: str


def decide(challenger: Scores, champion: Scores) -> Decision:
    """Compare scores that were measured alike: same judge, images and seed."""
    for name, bound in MAX_LOSS.items():
        theirs, ours = getattr(champion, name), getattr(challenger, name)
        if theirs is not None and (ours is None or ours < theirs - bound):
            return Decision(promote=False, reason=f"{name} falls from {theirs:.4f} to {ours}")
    for name, bound in MAX_RISE.items():
        theirs, ours = getattr(champion, name), getattr(challenger, name)
        if ours > theirs + bound:
            return Decision(promote=False, reason=f"{name} rises from {theirs:.4f} to {ours:.4f}")
    gain = 1 - challenger.frechet_distance / champion.frechet_distance
    distances = f"{challenger.frechet_distance:.4f} against {champion.frechet_distance:.4f}"
    if gain < MIN_GAIN:
        return Decision(promote=False, reason=f"no better beyond noise: Frechet {distances}")
    return Decision(promote=True, reason=f"nearer to real digits: Frechet {distances}")


@task(name="record decision", cache_policy=NO_CACHE)
def record_decision(version: int, champion: int, decision: Decision) -> None:
    """Write the decision to the version's tags and, if it says so, move the alias.

    The former champion keeps the alias `previous`.

    Raises:
        PromotionError: another version became champion since the decision was made.
    """
    client = MlflowClient()
    if int(client.get_model_version_by_alias(MODEL_NAME, "champion").version) != champion:
        raise PromotionError(f"version {champion} is no longer champion; decide again")
    client.set_model_version_tag(MODEL_NAME, str(version), "promotion", decision.reason)
    if decision.promote:
        client.set_registered_model_alias(MODEL_NAME, "previous", str(champion))
        client.set_registered_model_alias(MODEL_NAME, "champion", str(version))
