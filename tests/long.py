"""What only `make chaos` has the time for."""

import os

import pytest

takes_minutes = pytest.mark.skipif(
    not os.environ.get("CHAOS_RUNS"), reason="waits for minutes: make chaos"
)
