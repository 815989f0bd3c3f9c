"""The exceptions that a user is meant to see, and how a command line tells of them."""

import io
import sys
from collections.abc import Callable


class UserError(Exception):
    """A mistake of the user's: one sentence that says what is wrong, where, and what to do.

    Command lines print it without a traceback and exit with code 2; nothing is left half-written.
    """


class DiskError(UserError):
    """A UserError that blames the place written to: what has been finished there is good, and may be gone on from."""


def exit_code(work: Callable[[], object], interrupted: str | None = None) -> int:
    """Do a tool's work: 0 when it is done, 2 after a user's mistake, which is told on stderr.

    Args:
        interrupted: what to say of Ctrl-C before exit code 130, unless the interruption has words of its own; None
            leaves it to Python.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A name that the terminal's encoding lacks is no reason to fail when the work is done; stderr escapes it, too.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        work()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interruption:
        if interrupted is None:
            raise
        print(f"error: {str(interruption) or interrupted}", file=sys.stderr)
        return 130
    return 0
