"""What the user can mend."""


class UserError(ValueError):
    """Something that the user can mend. Its text is one sentence that says how."""
