"""Errors that the user can mend: their message is all that is shown, without a traceback."""


class UserError(ValueError):
    """The message names the key or file, what is wrong with it, and the remedy."""
