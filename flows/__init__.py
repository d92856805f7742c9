"""What happens, in order."""

import gc

# Imports make a million objects that stay; by default Python looks through them again and again.
gc.set_threshold(100_000)
