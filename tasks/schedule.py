"""Schedules: a start that comes far too late is dropped, not made up for."""

from datetime import UTC, datetime, timedelta

from prefect.runtime import flow_run


def reason_to_drop(max_delay_hours: float | None) -> str | None:
    """Why this flow run should not start any more, in a sentence; None where it should.

    A run that began in time and is taken up again is never dropped.

    Args:
        max_delay_hours: how late it may start, against the time it was scheduled for; None for
            any delay.
    """
    if max_delay_hours is None or flow_run.get_run_count() > 1:
        return None
    scheduled = flow_run.get_scheduled_start_time()
    delay = datetime.now(UTC) - scheduled
    if delay <= timedelta(hours=max_delay_hours):
        return None
    return (
        f"Dropped: it was to start at {scheduled:%Y-%m-%d %H:%M} UTC, which is "
        f"{delay / timedelta(hours=1):.1f} hours ago; allowed are {max_delay_hours:g}."
    )
