"""A run that a user or the system ends: what Prefect shall make of it."""

import os
from pathlib import Path
from typing import Any

from prefect.client.schemas.objects import State
from prefect.exceptions import TerminationSignal
from prefect.states import Cancelled


def cancelled_by(signal: KeyboardInterrupt | TerminationSignal, folder: Path) -> State[Any]:
    """The state of a run that was interrupted from outside.

    Raises:
        TerminationSignal: the same, where Prefect's supervisor of this process decides (a pod that
            is evicted is scheduled again).
    """
    if os.environ.get("PREFECT_FLOW_RUN_EXECUTE_SIGTERM_BEHAVIOR"):
        raise signal
    by = "Ctrl-C" if isinstance(signal, KeyboardInterrupt) else "SIGTERM"
    return Cancelled(message=f"Ended by {by}; what was done is kept in {folder}.")
