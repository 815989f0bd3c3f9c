"""The one exception that a user is meant to see."""


class UserError(Exception):
    """A mistake of the user's: one sentence that says what is wrong, where, and what to do.

    Command lines print it without a traceback and exit with code 2; nothing is left half-written.
    """
