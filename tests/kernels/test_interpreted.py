"""The tests of this folder once more in a process whose kernels run in Triton's interpreter.

Triton reads TRITON_INTERPRET when a kernel is decorated and when its own library is imported, so one process has one
kind of kernel; the other tests of the suite, and training in it, keep the torch references.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megacpt_kernels.dispatch import INTERPRETED

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(INTERPRETED, reason="this process is the one that runs them")
def test_all_of_them_pass_in_the_interpreter() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "tests/kernels",
        "-m",
        "not gpu",
        "-p",
        "no:xdist",
        "-p",
        "no:cacheprovider",
    ]
    finished = subprocess.run(
        command,
        cwd=REPOSITORY,
        env=environment | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    report = finished.stdout[-8000:] + finished.stderr[-2000:]
    assert finished.returncode == 0, report
    passed = re.search(r"(\d+) passed", finished.stdout)
    assert passed, report
    assert int(passed[1]) > 100, report
