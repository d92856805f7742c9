"""What takes minutes, everywhere or on a slow machine."""

import os

import pytest
import torch

from gan.recipes import vanilla
from gan.training import uses_bfloat16

in_a_hurry = not os.environ.get("CHAOS_RUNS")
"""Where failures are tried in three minutes, not in hours."""

takes_minutes = pytest.mark.skipif(in_a_hurry, reason="waits for minutes: make chaos")

takes_minutes_in_float32 = pytest.mark.skipif(
    in_a_hurry and not uses_bfloat16(vanilla(), torch.device("cpu")),
    reason="trains for minutes on a processor without bfloat16 products: make chaos",
)
"""Also marked `chaos`, so that `make chaos` has it everywhere."""
