"""Run a command line in a process that is forked from the ranks' server: what a start would import is there already.

For tests of what a command does. How it starts is for tests that start one: nothing of that is seen here.
"""

import multiprocessing
import os
import runpy
import sys
import tempfile
from collections.abc import Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from subprocess import CompletedProcess
from types import MappingProxyType
from typing import Any
from unittest.mock import patch

import torch.distributed as dist

from tests.ranks import PRELOAD, TIMEOUT_S

NOTHING: Mapping[str, str] = MappingProxyType({})


def _main(words: Sequence[str], before: str, environment: Mapping[str, str], folder: str, said: Path) -> None:
    """`python words...` in this process, after the statements `before`."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(said / name, os.O_WRONLY | os.O_CREAT), number)
    multiprocessing.set_start_method("fork", force=True)  # a command's own, where the server's is another
    exec(before, {})
    by_name = words[0] == "-m"
    sys.argv = [*words[1:]] if by_name else [*words]
    if by_name:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, str(Path(sys.argv[0]).parent))
        runpy.run_path(sys.argv[0], run_name="__main__")


class Forked:
    """`python words...`, begun; `before` is Python to run first, such as what makes the command fail somewhere."""

    store: dist.TCPStore
    """Where a rank has met the others; it lasts as long as one of them."""

    def __init__(self, *words: object, before: str = "", environment: Mapping[str, str] = NOTHING) -> None:
        self.args = [str(word) for word in words]
        self._said = tempfile.TemporaryDirectory()
        context: Any = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        with patch.dict(os.environ, {"CUDA_VISIBLE_DEVICES": ""}):
            its = {**os.environ, **environment}
            arguments = (self.args, before, its, os.getcwd(), Path(self._said.name))
            self.process: BaseProcess = context.Process(target=_main, args=arguments)
            self.process.start()

    def wait(self, timeout: float = TIMEOUT_S) -> CompletedProcess[str]:
        """What it said, and its exit code, negative for a signal; it is killed after `timeout` seconds."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
            raise AssertionError(f"{self.args}: not done after {timeout:.0f} s")
        said = Path(self._said.name)
        out, err = ((said / name).read_text() if (said / name).exists() else "" for name in ("stdout", "stderr"))
        self._said.cleanup()
        return CompletedProcess(self.args, self.process.exitcode, out, err)


def forked(*words: object, before: str = "", environment: Mapping[str, str] = NOTHING) -> CompletedProcess[str]:
    """`subprocess.run` of `python words...`, text captured."""
    return Forked(*words, before=before, environment=environment).wait()


def forked_ranks(world: int, *words: object) -> list[Forked]:
    """The command begun on `world` ranks, which meet at a store of this process, as at torchrun's."""
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    meeting = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    sizes = {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    ranks = [
        Forked(*words, environment={**meeting, **sizes, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(world)
    ]
    for rank in ranks:
        rank.store = store
    return ranks
