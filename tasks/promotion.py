"""Promotion: the alias `champion` moves to a version that is measurably better and nowhere worse.

The former champion keeps the alias `previous`, and `roll_back` returns to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from mlflow import MlflowClient
from prefect import get_run_logger, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE

from gan.bundle import load_bundle
from gan.data import load_mnist
from gan.errors import UserError
from gan.evaluation.comparison import Comparison, Standing, compare
from gan.evaluation.scores import draws_like, explain
from tasks.aliases import drop_challenger, find_holders, move_champion
from tasks.data import DatasetRef
from tasks.pulling import VersionError, find_version
from tasks.tracking import MODEL_NAME
from tasks.versions import fetch_version

PromotionMode = Literal["if-better", "never", "always"]
"""When a version becomes champion: if it is better beyond the noise, not at all, or in any case."""

MAX_FALL = {"coverage": 0.02, "digit_as_asked": 0.005}
"""How far these shares may fall below the champion's."""
MAX_RISE = {"memorisation_pixels": 0.01, "memorisation_features": 0.01}
"""How far these shares may rise above the champion's."""
MAX_DECISIONS = 5
"""How often to decide if the champion changes every time in the meantime."""
CompareBundles = Callable[[Path, Path], Comparison]
"""Compares the challenger's bundle with the champion's."""


class PromotionError(UserError):
    """A decision that does not come to an end."""


@dataclass(frozen=True, kw_only=True)
class Decision:
    """Whether a version becomes champion, and why."""

    version: int
    champion: int | None
    """The champion at that time, with which the version was compared; None if there was none."""
    promoted: bool
    reason: str
    comparison: Comparison | None = None
    """None where the decision did not hang on it."""


# A comparison takes 50 s of one core, half of it for the nearest training images in pixels.
@task(name="promote", cache_policy=NO_CACHE)
def promote_version(
    version: int | str,
    mode: PromotionMode,
    dataset: DatasetRef,
    device: str,
    folder: Path,
    *,
    num_samples: int = 10_000,
    seed: int = 0,
) -> Decision:
    """Make a version champion if the mode says so; leaves the reason in tags, log and an artifact.

    Args:
        version: a number or an alias.
        mode: `if-better` compares it with the champion, `always` does not.
        dataset: the real images to judge with.
        device: where to draw and to judge.
        folder: where to fetch the bundles to, in folders `challenger` and `champion`.
        num_samples: drawings of each to judge; the fewer, the less can be told apart.
        seed: decides what both draw.

    Raises:
        VersionError: there is no such version, or its files are gone or altered.
        PromotionError: others kept moving the champion.
        AliasError: others held the aliases for too long.
    """

    def compare_bundles(challenger: Path, champion: Path) -> Comparison:
        data = load_mnist(dataset.folder, device)
        ours, theirs = (
            draws_like(load_bundle(bundle, device), data.train.labels)
            for bundle in (challenger, champion)
        )
        return compare(
            ours,
            theirs,
            data,
            num_samples=num_samples,
            seed=seed,
            device=device,
            cache=dataset.folder.parent,
        )

    decision = settle(version, mode, compare_bundles, folder)
    title = f"version {decision.version}: {describe(decision)}"
    get_run_logger().info("%s", title)
    create_markdown_artifact(markdown=page(decision), key="promotion", description=title)
    return decision


def settle(
    version: int | str, mode: PromotionMode, compare_bundles: CompareBundles, folder: Path
) -> Decision:
    """Decide on a version, move the aliases if it is promoted, and write the tags.

    If the champion changed while it was decided, it is decided again, against the new one.

    Raises:
        VersionError: there is no such version, or its files are gone or altered.
        PromotionError: others kept moving the champion.
        AliasError: others held the aliases for too long.
    """
    client = MlflowClient()
    number = int(find_version(client, version).version)
    for _ in range(MAX_DECISIONS):
        decision = _decide(client, number, mode, compare_bundles, folder)
        if decision.champion == number:
            drop_challenger(client, number)
        elif decision.promoted and not move_champion(number, decision.champion):
            continue
        _write_tags(client, decision)
        return decision
    raise PromotionError(
        f"the champion changed {MAX_DECISIONS} times while version {number} was compared with it; "
        "promote it again when the others are done"
    )


def _decide(
    client: MlflowClient,
    version: int,
    mode: PromotionMode,
    compare_bundles: CompareBundles,
    folder: Path,
) -> Decision:
    holders = find_holders(client)
    champion = holders.get("champion")

    def decided(promoted: bool, reason: str, comparison: Comparison | None = None) -> Decision:
        return Decision(
            version=version,
            champion=champion,
            promoted=promoted,
            reason=reason,
            comparison=comparison,
        )

    if champion == version:
        return decided(*_explain_champion(client, version, "previous" in holders))
    if mode == "never":
        return decided(False, "promotion was asked for never")
    if mode == "always":
        return decided(True, "promotion was asked for in any case")
    if champion is None:
        return decided(True, "there is no champion to compare it with")
    challenger = fetch_version.fn(version, folder / "challenger")
    try:
        fetched = fetch_version.fn(champion, folder / "champion")
    except VersionError as error:
        # Whether they are gone for good is not for a program to say, and the challenger may be
        # anything: nobody has compared it.
        return decided(
            False,
            f"it cannot be compared with the champion, version {champion}: {error}; if that one is "
            "lost, promote with mode always, or roll back",
        )
    comparison = compare_bundles(challenger.bundle, fetched.bundle)
    return decided(*weigh(comparison), comparison)


def _explain_champion(client: MlflowClient, version: int, has_previous: bool) -> tuple[bool, str]:
    """Whether it is for this decision to say how the champion became it, and what to say."""
    known = client.get_model_version(MODEL_NAME, str(version)).tags
    if known.get("promotion") == "promoted":
        return False, "it is champion already"
    if has_previous:
        return True, "it was made champion by a run that ended before it said why"
    return True, "there was no champion before it"


def weigh(comparison: Comparison) -> tuple[bool, str]:
    """Whether the challenger is better beyond the noise and nowhere worse, and the reason."""
    challenger, champion = comparison.challenger, comparison.champion
    interval = comparison.frechet_difference
    distances = (
        f"Frechet distance {challenger.frechet_distance:.4f} against "
        f"{champion.frechet_distance:.4f}, the difference {interval.low:.4f} to {interval.high:.4f}"
    )
    if interval.high >= 0:
        return False, f"it is no better beyond the noise: {distances}"
    for name, bound in MAX_FALL.items():
        ours, theirs = getattr(challenger, name), getattr(champion, name)
        if theirs is not None and (ours is None or ours < theirs - bound):
            fallen = "nothing" if ours is None else f"{ours:.4f}"
            return False, f"{name} falls from {theirs:.4f} to {fallen}, by more than {bound}"
    for name, bound in MAX_RISE.items():
        ours, theirs = getattr(challenger, name), getattr(champion, name)
        if ours > theirs + bound:
            return False, f"{name} rises from {theirs:.4f} to {ours:.4f}, by more than {bound}"
    return True, f"it is nearer to real digits: {distances}"


def describe(decision: Decision) -> str:
    """The decision and its reason in one line."""
    return f"{'promoted' if decision.promoted else 'not promoted'}: {decision.reason}"


def page(decision: Decision) -> str:
    """The decision as markdown, with the scores of both where they were compared."""
    title = f"# {MODEL_NAME} version {decision.version}\n\n{describe(decision)}.\n"
    comparison = decision.comparison
    if comparison is None:
        return title
    rows = "\n".join(
        f"| {name} | {ours} | {theirs} | {_bound(name)} | {explain(name).meaning} |"
        for name, ours, theirs in _score_rows(comparison)
    )
    interval = comparison.frechet_difference
    return f"""{title}
| score | version {decision.version} | champion {decision.champion} | allowed | |
| --- | --- | --- | --- | --- |
{rows}

The difference of the Frechet distances lies between {interval.low:.4f} and {interval.high:.4f}, 95
times in 100; it must be below 0. {comparison.num_samples:,} drawings of each, seed
{comparison.seed}, judged by {comparison.judge}.
"""


def _score_rows(comparison: Comparison) -> Iterator[tuple[str, str, str]]:
    """The name of each score, the challenger's and the champion's, or `none`."""
    for field in fields(Standing):
        ours, theirs = (
            "none" if score is None else f"{score:.4f}"
            for score in (
                getattr(comparison.challenger, field.name),
                getattr(comparison.champion, field.name),
            )
        )
        yield field.name, ours, theirs


def _bound(name: str) -> str:
    if name in MAX_FALL:
        return f"a fall of {MAX_FALL[name]}"
    return f"a rise of {MAX_RISE[name]}" if name in MAX_RISE else "better beyond the noise"


def _write_tags(client: MlflowClient, decision: Decision) -> None:
    """Say on the version how it was decided; nothing is left of an earlier decision."""
    version = str(decision.version)
    is_champion = decision.version == decision.champion
    if is_champion and not decision.promoted:
        return  # it has the tags that say how it became champion
    known = client.get_model_version(MODEL_NAME, version).tags
    tags = {"promotion_reason": decision.reason}
    if decision.champion is not None and not is_champion:
        tags["promotion_champion"] = str(decision.champion)
    if comparison := decision.comparison:
        interval = comparison.frechet_difference
        tags |= {
            f"promotion_{name}": f"{ours} against {theirs}"
            for name, ours, theirs in _score_rows(comparison)
        }
        tags |= {
            "promotion_frechet_difference": f"{interval.low:.4f} to {interval.high:.4f}",
            "promotion_num_samples": str(comparison.num_samples),
            "promotion_seed": str(comparison.seed),
        }
    # Last, as it tells the next start that all is said.
    tags["promotion"] = "promoted" if decision.promoted else "not promoted"
    for name in known.keys() - tags.keys():
        if name.startswith("promotion_"):
            client.delete_model_version_tag(MODEL_NAME, version, name)
    for name, value in tags.items():
        client.set_model_version_tag(MODEL_NAME, version, name, value)
