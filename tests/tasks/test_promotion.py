"""Promotion in a real MLflow on SQLite; what comparing finds is given, not measured."""

from __future__ import annotations

import multiprocessing
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest
from filelock import FileLock
from mlflow import MlflowClient
from prefect.settings import PREFECT_API_URL, temporary_settings

from gan.evaluation.comparison import Comparison, Interval, Standing
from tasks import aliases
from tasks.aliases import AliasError, find_holders, move_champion, roll_back
from tasks.promotion import (
    MAX_DECISIONS,
    Decision,
    PromotionError,
    PromotionMode,
    page,
    settle,
    weigh,
)
from tasks.pulling import VersionError
from tasks.services import ServiceError
from tasks.tracking import MODEL_NAME
from tests.registry import Registry
from tests.tasks.conftest import together

CHAMPION = Standing(
    frechet_distance=0.40,
    coverage=0.85,
    digit_as_asked=0.99,
    memorisation_pixels=0.01,
    memorisation_features=0.01,
)
BETTER = Comparison(
    judge="mnist-judge-1",
    num_samples=10_000,
    seed=0,
    challenger=replace(CHAMPION, frechet_distance=0.30),
    champion=CHAMPION,
    frechet_difference=Interval(low=-0.11, high=-0.09),
)
EQUAL = replace(BETTER, challenger=CHAMPION, frechet_difference=Interval(low=-0.01, high=0.01))


def found(comparison: Comparison) -> Callable[[Path, Path], Comparison]:
    """A comparison that was made already."""
    return lambda challenger, champion: comparison


def never_called(challenger: Path, champion: Path) -> Comparison:
    raise AssertionError("nothing needs to be compared here")


def tags(version: int) -> dict[str, str]:
    said: dict[str, str] = MlflowClient().get_model_version(MODEL_NAME, str(version)).tags
    return {name: value for name, value in said.items() if name.startswith("promotion")}


def holders() -> dict[str, int]:
    held = find_holders(MlflowClient())
    return {alias: held[alias] for alias in ("champion", "previous") if alias in held}


@pytest.fixture(autouse=True)
def runs_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MNIST_GAN_RUNS_DIR", str(tmp_path / "runs"))
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    return tmp_path / "runs"


@pytest.fixture
def spare(registry: Registry, tmp_path: Path) -> Callable[[], int]:
    """Registers another version, 3 or higher, whose files are its own: in `spare-<version>`."""

    def register() -> int:
        client = MlflowClient()
        folder = tmp_path / f"spare-{2 + len(list(tmp_path.glob('spare-*'))) + 1}"
        shutil.copytree(registry.bundle(1), folder / "artifacts" / "bundle")
        made = client.create_model_version(
            MODEL_NAME, str(folder), tags={"bundle": registry.digests[0]}
        )
        assert folder.name == f"spare-{made.version}"
        return int(made.version)

    return register


def test_challenger_that_is_better_beyond_the_noise_is_promoted() -> None:
    promoted, reason = weigh(BETTER)
    assert promoted
    assert "0.3000 against 0.4000" in reason
    assert "-0.1100 to -0.0900" in reason


@pytest.mark.parametrize(
    ("low", "high"), [(-0.2, 0.0), (-0.2, 0.001), (-0.01, 0.01), (0.0, 0.0), (0.1, 0.2)]
)
def test_interval_that_reaches_nought_is_not_enough(low: float, high: float) -> None:
    promoted, reason = weigh(replace(BETTER, frechet_difference=Interval(low=low, high=high)))
    assert not promoted
    assert "no better beyond the noise" in reason


@pytest.mark.parametrize(
    ("name", "allowed", "refused"),
    [
        ("coverage", 0.831, 0.829),
        ("digit_as_asked", 0.9851, 0.9849),
        ("digit_as_asked", 1.0, None),
        ("memorisation_pixels", 0.0199, 0.0201),
        ("memorisation_features", 0.0199, 0.0201),
    ],
)
def test_nearer_challenger_may_lose_elsewhere_up_to_the_bound(
    name: str, allowed: float, refused: float | None
) -> None:
    def weighed(value: float | None) -> tuple[bool, str]:
        return weigh(replace(BETTER, challenger=replace(BETTER.challenger, **{name: value})))

    assert weighed(allowed)[0]
    promoted, reason = weighed(refused)
    assert not promoted
    assert reason.startswith(name)


def test_champion_that_knows_no_digits_sets_no_bound_on_them() -> None:
    assert weigh(replace(BETTER, champion=replace(CHAMPION, digit_as_asked=None)))[0]


@pytest.mark.usefixtures("registry")
def test_better_challenger_becomes_champion_and_the_former_one_previous(tmp_path: Path) -> None:
    decision = settle("challenger", "if-better", found(BETTER), tmp_path)
    assert decision.promoted
    assert (decision.version, decision.champion) == (2, 1)
    held = find_holders(MlflowClient())
    assert held == {"champion": 2, "previous": 1}, "it is no challenger any more"
    assert tags(2) == {
        "promotion": "promoted",
        "promotion_reason": decision.reason,
        "promotion_champion": "1",
        "promotion_frechet_difference": "-0.1100 to -0.0900",
        "promotion_frechet_distance": "0.3000 against 0.4000",
        "promotion_coverage": "0.8500 against 0.8500",
        "promotion_digit_as_asked": "0.9900 against 0.9900",
        "promotion_memorisation_pixels": "0.0100 against 0.0100",
        "promotion_memorisation_features": "0.0100 against 0.0100",
        "promotion_num_samples": "10000",
        "promotion_seed": "0",
    }


@pytest.mark.usefixtures("registry")
def test_comparison_is_of_the_registered_bundles(registry: Registry, tmp_path: Path) -> None:
    def compare(challenger: Path, champion: Path) -> Comparison:
        for folder, version in ((challenger, 2), (champion, 1)):
            there = {path.name: path.read_bytes() for path in folder.iterdir()}
            assert there == {
                path.name: path.read_bytes() for path in registry.bundle(version).iterdir()
            }
        return EQUAL

    settle(2, "if-better", compare, tmp_path)


@pytest.mark.usefixtures("registry")
def test_challenger_that_is_no_better_stays_one_and_says_why(tmp_path: Path) -> None:
    decision = settle(2, "if-better", found(EQUAL), tmp_path)
    assert not decision.promoted
    assert find_holders(MlflowClient()) == {"champion": 1, "challenger": 2}
    assert tags(2)["promotion"] == "not promoted"
    assert tags(2)["promotion_reason"] == decision.reason
    assert "no better beyond the noise" in decision.reason


@pytest.mark.usefixtures("registry")
def test_never_moves_nothing_and_always_asks_nothing(tmp_path: Path) -> None:
    assert not settle(2, "never", never_called, tmp_path).promoted
    assert holders() == {"champion": 1}
    assert tags(2)["promotion"] == "not promoted"
    assert settle(2, "always", never_called, tmp_path).promoted
    assert holders() == {"champion": 2, "previous": 1}
    assert tags(2)["promotion"] == "promoted"


@pytest.mark.usefixtures("registry")
def test_tags_of_an_earlier_decision_do_not_stay(tmp_path: Path) -> None:
    settle(2, "if-better", found(EQUAL), tmp_path)
    settle(2, "always", never_called, tmp_path)
    assert tags(2).keys() == {"promotion", "promotion_reason", "promotion_champion"}


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize("mode", ["if-better", "never", "always"])
def test_champion_stays_champion_with_the_tags_it_has(mode: PromotionMode, tmp_path: Path) -> None:
    first = settle(1, mode, never_called, tmp_path)
    assert first.promoted, "the registry made it champion, and nobody has said so yet"
    said = {"promotion": "promoted", "promotion_reason": "there was no champion before it"}
    assert tags(1) == said
    decision = settle(1, mode, never_called, tmp_path)
    assert not decision.promoted
    assert decision.reason == "it is champion already"
    assert holders() == {"champion": 1}
    assert tags(1) == said


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize("earlier", [True, False], ids=["decided before", "first decision"])
@pytest.mark.parametrize("said", [0, 1, 2])
def test_a_start_that_died_after_the_alias_moved_is_finished(
    earlier: bool, said: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if earlier:
        settle(2, "never", never_called, tmp_path)
    budget, write = iter(range(said)), MlflowClient.set_model_version_tag
    with monkeypatch.context() as death:
        death.setattr(
            MlflowClient, "set_model_version_tag", lambda *given: (next(budget), write(*given))
        )
        with pytest.raises(StopIteration):
            settle(2, "if-better", found(BETTER), tmp_path)
    assert holders() == {"champion": 2, "previous": 1}
    assert tags(2).get("promotion") == ("not promoted" if earlier else None)
    MlflowClient().set_registered_model_alias(MODEL_NAME, "challenger", "2")  # it was about to go
    settle(2, "if-better", never_called, tmp_path)
    assert tags(2) == {
        "promotion": "promoted",
        "promotion_reason": "it was made champion by a run that ended before it said why",
    }
    assert holders() == {"champion": 2, "previous": 1}


@pytest.mark.usefixtures("registry")
def test_where_there_is_no_champion_the_version_becomes_it(tmp_path: Path) -> None:
    MlflowClient().delete_registered_model_alias(MODEL_NAME, "champion")
    assert not settle(2, "never", never_called, tmp_path).promoted
    decision = settle(2, "if-better", never_called, tmp_path)
    assert decision.promoted
    assert decision.champion is None
    assert holders() == {"champion": 2}


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize("version", [3, "rival"])
def test_unknown_version_is_refused(version: int | str, tmp_path: Path) -> None:
    with pytest.raises(VersionError, match="has no version or alias"):
        settle(version, "if-better", never_called, tmp_path)


@pytest.mark.parametrize("mode", ["if-better", "always"])
@pytest.mark.parametrize("fault", ["gone", "altered", "tag"])
def test_version_without_its_files_never_gets_an_alias(
    spare: Callable[[], int], mode: PromotionMode, fault: str, tmp_path: Path
) -> None:
    version = spare()
    damage(version, fault, tmp_path)
    with pytest.raises(VersionError):
        settle(version, mode, found(BETTER), tmp_path / "run")
    assert holders() == {"champion": 1}
    assert not tags(version)


def test_files_that_go_while_it_is_decided_are_noticed(
    spare: Callable[[], int], tmp_path: Path
) -> None:
    version = spare()

    def compare(challenger: Path, champion: Path) -> Comparison:
        damage(version, "gone", tmp_path)
        return BETTER

    with pytest.raises(VersionError):
        settle(version, "if-better", compare, tmp_path / "run")
    assert holders() == {"champion": 1}


def damage(version: int, fault: str, tmp_path: Path) -> None:
    bundle = tmp_path / f"spare-{version}" / "artifacts" / "bundle"
    if fault == "gone":
        shutil.rmtree(bundle)
    elif fault == "altered":
        (bundle / "model_card.md").write_text("another")
    else:
        MlflowClient().set_model_version_tag(MODEL_NAME, str(version), "bundle", 64 * "0")


@pytest.mark.parametrize("fault", ["gone", "altered", "tag"])
def test_champion_without_its_files_gives_way_only_to_one_asked_for_in_any_case(
    spare: Callable[[], int], fault: str, tmp_path: Path
) -> None:
    champion = spare()
    settle(champion, "always", never_called, tmp_path)
    damage(champion, fault, tmp_path)
    decision = settle(2, "if-better", never_called, tmp_path / "run")
    assert not decision.promoted
    assert f"cannot be compared with the champion, version {champion}" in decision.reason
    assert holders() == {"champion": champion, "previous": 1}
    assert settle(2, "always", never_called, tmp_path / "run").promoted
    assert holders() == {"champion": 2, "previous": 1}, "the damaged one gets no alias"


def test_return_of_the_previous_one_leaves_none_if_the_champion_is_damaged(
    spare: Callable[[], int], tmp_path: Path
) -> None:
    champion = spare()
    settle(champion, "always", never_called, tmp_path)
    damage(champion, "gone", tmp_path)
    assert roll_back().previous == champion
    assert holders() == {"champion": 1}


def test_champion_that_changed_meanwhile_is_compared_with_anew(
    spare: Callable[[], int], tmp_path: Path
) -> None:
    rival, asked = spare(), []

    def compare(challenger: Path, champion: Path) -> Comparison:
        asked.append(champion.parent.name)
        if len(asked) == 1:
            assert move_champion(rival, 1)
            return BETTER
        return EQUAL

    decision = settle(2, "if-better", compare, tmp_path)
    assert len(asked) == 2
    assert not decision.promoted, "it was better than the former champion, not than the new one"
    assert decision.champion == rival
    assert tags(2)["promotion_champion"] == str(rival)
    assert holders() == {"champion": rival, "previous": 1}


def test_champion_that_never_stays_the_same_ends_it_with_a_sentence(
    spare: Callable[[], int], tmp_path: Path
) -> None:
    rival, asked = spare(), []

    def compare(challenger: Path, champion: Path) -> Comparison:
        asked.append(champion)
        held = holders()["champion"]
        assert move_champion(rival if held == 1 else 1, held)
        return BETTER

    with pytest.raises(PromotionError, match=f"changed {MAX_DECISIONS} times"):
        settle(2, "if-better", compare, tmp_path)
    assert len(asked) == MAX_DECISIONS
    assert holders()["champion"] in (1, rival)


ROUNDS = 20


def race(
    version: int,
    folder: Path,
    start: Barrier,
    both: Barrier,
    results: Queue[Decision],
) -> None:
    """What each process does: it finds its version better than anyone's, 20 times over."""
    for _ in range(ROUNDS):
        start.wait(60)
        compared: list[Path] = []

        def compare(
            challenger: Path, champion: Path, compared: list[Path] = compared
        ) -> Comparison:
            compared.append(champion)
            if len(compared) == 1:
                both.wait(60)  # by now both have read who is champion
            return BETTER

        results.put(settle(version, "if-better", compare, folder))


@pytest.mark.slow
def test_of_two_processes_the_later_decides_again_against_the_winner(
    spare: Callable[[], int], tmp_path: Path
) -> None:
    rivals = (2, spare())
    spawn = multiprocessing.get_context("spawn")
    start, both, results = spawn.Barrier(3), spawn.Barrier(2), spawn.Queue()
    processes = [
        spawn.Process(
            target=race,
            args=(rival, tmp_path / f"of-{rival}", start, both, results),
        )
        for rival in rivals
    ]
    with together(processes):
        for _ in range(ROUNDS):
            MlflowClient().set_registered_model_alias(MODEL_NAME, "champion", "1")
            start.wait(60)
            settled = [results.get(timeout=60) for _ in rivals]
            decisions = {decision.champion: decision for decision in settled}
            assert all(decision.promoted for decision in decisions.values())
            first = decisions.pop(1).version
            (second,) = decisions.values()
            assert {first, second.version} == set(rivals)
            assert second.champion == first, "no two versions win against the same champion"
            assert holders() == {"champion": second.version, "previous": first}


@pytest.mark.usefixtures("registry")
def test_others_who_hold_the_aliases_are_waited_for_and_not_for_ever(
    runs_dir: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(aliases, "PATIENCE_S", 0.2)
    runs_dir.mkdir()
    with (
        FileLock(runs_dir / ".promotion.lock"),
        pytest.raises(AliasError, match="others have been moving aliases"),
    ):
        settle(2, "always", never_called, tmp_path)
    assert holders() == {"champion": 1}


def test_prefect_server_that_does_not_answer_is_said(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    move_champion(2, 1)
    with (
        temporary_settings({PREFECT_API_URL: "http://127.0.0.1:1/api"}),
        pytest.raises(ServiceError, match="Prefect does not answer at http"),
    ):
        roll_back()
    assert holders() == {"champion": 2, "previous": 1}


@pytest.mark.usefixtures("registry")
def test_rollback_goes_there_and_back() -> None:
    move_champion(2, 1)
    for champion, previous in ((1, 2), (2, 1), (1, 2)):
        done = roll_back()
        assert (done.champion, done.previous) == (champion, previous)
        assert holders() == {"champion": champion, "previous": previous}
        assert tags(champion)["promotion"] == "promoted"
        assert tags(previous) == {
            "promotion": "rolled back",
            "promotion_reason": f"version {champion} is returned to",
        }


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize("gone", [False, True])
@pytest.mark.parametrize("lives", range(1, 3))
def test_rollback_that_dies_between_two_aliases_has_returned(
    gone: bool, lives: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the champion there, and where its version was deleted."""
    move_champion(2, 1)
    if gone:
        MlflowClient().delete_model_version(MODEL_NAME, "2")
    moves = []

    def die_in_time(move: Callable[..., None]) -> Callable[..., None]:
        def moving(*arguments: object) -> None:
            if len(moves) == lives:
                raise KeyboardInterrupt
            moves.append(arguments)
            move(*arguments)

        return moving

    for name in ("set_registered_model_alias", "delete_registered_model_alias"):
        monkeypatch.setattr(MlflowClient, name, die_in_time(getattr(MlflowClient, name)))
    with suppress(KeyboardInterrupt):
        roll_back()
    assert len(moves) == lives
    assert holders()["champion"] == 1


@pytest.mark.usefixtures("registry")
def test_rollback_without_a_former_champion_is_refused_and_leaves_nothing(runs_dir: Path) -> None:
    with pytest.raises(AliasError, match="has no former champion to return to"):
        roll_back()
    assert not runs_dir.exists()
    MlflowClient().set_registered_model_alias(MODEL_NAME, "previous", "1")
    with pytest.raises(AliasError, match="has no former champion to return to"):
        roll_back()


@pytest.mark.parametrize("fault", ["gone", "altered", "tag"])
def test_rollback_to_a_version_without_its_files_is_refused(
    spare: Callable[[], int], fault: str, tmp_path: Path
) -> None:
    former = spare()
    move_champion(former, 1)
    move_champion(2, former)
    damage(former, fault, tmp_path)
    with pytest.raises(VersionError):
        roll_back()
    assert holders() == {"champion": 2, "previous": former}


def test_page_shows_both_standings_the_bounds_and_the_interval() -> None:
    promoted, reason = weigh(BETTER)
    decision = Decision(version=2, champion=1, promoted=promoted, reason=reason, comparison=BETTER)
    text = page(decision)
    assert text.startswith(f"# {MODEL_NAME} version 2\n\npromoted: it is nearer")
    assert "| frechet_distance | 0.3000 | 0.4000 | better beyond the noise |" in text
    assert "| coverage | 0.8500 | 0.8500 | a fall of 0.02 |" in text
    assert "| memorisation_pixels | 0.0100 | 0.0100 | a rise of 0.01 |" in text
    assert "between -0.1100 and -0.0900" in text
    assert "|" not in page(replace(decision, comparison=None))
