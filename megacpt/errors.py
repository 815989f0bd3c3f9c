"""The exceptions that a user is meant to see."""


class UserError(Exception):
    """A mistake of the user's: one sentence that says what is wrong, where, and what to do.

    Command lines print it without a traceback and exit with code 2; nothing is left half-written.
    """


class DiskError(UserError):
    """A UserError that blames the place written to: what has been finished there is good, and may be gone on from."""
