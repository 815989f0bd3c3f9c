"""Commands that are timed."""

import sys

import pytest

from megacpt.bench.processes import TimeUp, timed
from megacpt.errors import UserError


def test_a_command_that_hangs_is_ended_with_what_it_started():
    sleeper = [sys.executable, "-c", "import time; time.sleep(60)"]
    script = f"import subprocess; print('here', flush=True); subprocess.run({sleeper})"
    with pytest.raises(TimeUp, match=r"not done after 2 s: here$"):
        timed([sys.executable, "-c", script], 1, limit=2.0)


def test_a_command_that_fails_is_told_with_its_last_words():
    with pytest.raises(UserError, match=r"exit code 3: no such corpus$"):
        timed([sys.executable, "-c", "print('no such corpus'); exit(3)"], 1)
    assert timed([sys.executable, "-c", ""], 1).seconds > 0
