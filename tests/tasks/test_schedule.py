from datetime import UTC, datetime, timedelta

import pytest
from prefect.runtime import flow_run

from tasks.schedule import reason_to_drop


@pytest.fixture(autouse=True)
def three_days_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """A flow run's context; the deployments' tests drop a real run."""
    start = datetime.now(UTC) - timedelta(days=3)
    monkeypatch.setattr(flow_run, "get_scheduled_start_time", lambda: start)
    monkeypatch.setattr(flow_run, "get_run_count", lambda: 1)


@pytest.mark.parametrize("max_delay_hours", [None, 72.1, 1000])
def test_start_within_the_allowed_delay_goes_on(max_delay_hours: float | None) -> None:
    assert reason_to_drop(max_delay_hours) is None


@pytest.mark.parametrize("max_delay_hours", [0.5, 24, 71.9])
def test_start_beyond_it_is_dropped_with_both_numbers(max_delay_hours: float) -> None:
    reason = reason_to_drop(max_delay_hours)
    assert reason is not None
    assert "72.0 hours ago" in reason
    assert reason.endswith(f"allowed are {max_delay_hours:g}.")


def test_run_that_began_in_time_is_taken_up_again_however_late(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(flow_run, "get_run_count", lambda: 2)
    assert reason_to_drop(1) is None
