"""Commands in processes of their own, with an end: what they compile or leave in memory touches nobody else."""

import math
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megacpt.errors import UserError

LIMIT_SECONDS = 900.0
"""After so long a command is taken to hang, as Megatron-LM's does when its worker process has failed."""
MODULE_SECONDS = 3600.0
"""The same of a module of ours, which may have been asked for many steps on a slow device."""


class TimeUp(UserError):
    """A command had not ended in its time, and was ended."""


@dataclass(frozen=True)
class Timed:
    """A finished command: wall seconds, and the largest resident memory of its main process in MB."""

    seconds: float
    resident: float


def timed(
    command: Sequence[str],
    cores: int | None = None,
    environment: dict[str, str] | None = None,
    limit: float = LIMIT_SECONDS,
) -> Timed:
    """Run a command, on the first `cores` cores of those this process may use; whatever ends it ends what it started.

    Raises:
        TimeUp: it had not ended after `limit` seconds; holds the end of what it said.
        UserError: it failed; holds the end of what it said.
    """
    with tempfile.TemporaryFile("w+") as said:
        began = time.perf_counter()
        process = subprocess.Popen(
            command,
            stdout=said,
            stderr=subprocess.STDOUT,
            preexec_fn=_binding(cores),
            env=os.environ | (environment or {}),
            start_new_session=True,
        )
        watch = threading.Timer(max(0.0, limit), os.killpg, (process.pid, signal.SIGKILL))
        watch.start()
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:  # Ctrl-C, or SIGTERM where it is made an exit
            os.killpg(process.pid, signal.SIGKILL)
            raise
        finally:
            watch.cancel()
        seconds = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            said.seek(0)
            told = " ".join(said.read().split())[-300:] or "nothing was said"
            if seconds >= limit:
                raise TimeUp(f"{' '.join(command)}: not done after {limit:,.0f} s: {told}")
            raise UserError(f"{' '.join(command)}: exit code {process.returncode}: {told}")
    return Timed(seconds, usage.ru_maxrss / 1e3)


def _binding(cores: int | None) -> Callable[[], None] | None:
    if cores is None:
        return None
    allowed = sorted(os.sched_getaffinity(0))[:cores]
    return lambda: os.sched_setaffinity(0, allowed)


def run_module(module: str, *words: object, limit: float = math.inf) -> None:
    """Run a module of ours.

    Raises:
        TimeUp, UserError: as `timed`.
    """
    timed([sys.executable, "-m", module, *map(str, words)], limit=min(limit, MODULE_SECONDS))
