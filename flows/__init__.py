"""What happens, in order."""

import gc

# Imports make half a million objects that stay; by default Python stops every 700 to search them.
gc.set_threshold(100_000)
