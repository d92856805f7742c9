"""What happens, in order."""

import gc

# Imports make half a million objects that stay; by default, every 700 bring a search for garbage.
gc.set_threshold(100_000)
