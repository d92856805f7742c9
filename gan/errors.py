"""What the user can mend."""

import re

OUT_OF_MEMORY = re.compile(
    r"out of memory|can't allocate memory|not enough memory|MemoryError|ALLOC_FAILED"
    r"|could not create a primitive(?! descriptor)",
    re.IGNORECASE,
)
"""What torch, oneDNN and Python say where there is no more memory."""


class UserError(ValueError):
    """Something that the user can mend. Its text is one sentence that says how."""
