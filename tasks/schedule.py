"""When to train: not far too late, and not while another training has the GPU."""

from datetime import UTC, datetime

from prefect.runtime import flow_run
from prefect.settings import PREFECT_API_URL

GPU = "gpu"
"""Name of the global concurrency limit of which a training takes a slot."""
GPU_LEASE_S = 60
"""How long the slot of a training that died stays taken, and how long a server may be away before
another training may get it."""


def gpu_limits() -> list[str]:
    """The limits that a training waits for: none on Prefect's own temporary server, which nobody
    else uses."""
    return [GPU] if PREFECT_API_URL.value() else []


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
    delay_hours = (datetime.now(UTC) - scheduled).total_seconds() / 3600
    if delay_hours <= max_delay_hours:
        return None
    return (
        f"Dropped: it was to start at {scheduled:%Y-%m-%d %H:%M} UTC, which is "
        f"{delay_hours:.1f} hours ago; allowed are {max_delay_hours:g}."
    )
