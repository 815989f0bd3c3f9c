"""Processes that work for this one: order, memory, errors, and how they end."""

import os
import signal
import threading
import time
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest

from megacpt.data.text.rows import WrongRow
from megacpt.data.tokens.pool import pool
from megacpt.data.tokens.processes import AHEAD, LARGE, Processes, WorkerLost
from megacpt.errors import UserError


def squares(number: int) -> tuple[int, np.ndarray, np.ndarray]:
    """Slow where the number is divisible by 5, so that results come out of order."""
    time.sleep(0.02 if number % 5 == 0 else 0)
    size = LARGE if number == 7 else number % 4
    return number, np.full(size, number, np.uint8), np.arange(number, dtype=np.int64) ** 2


def fails(number: int) -> int:
    if number == 6:
        raise WrongRow("a.jsonl", 3, number, "is wrong")
    return 1 // (number - 4)


@contextmanager
def other_threads(count: int):
    """So many threads beside this one."""
    end = threading.Event()
    threads = [threading.Thread(target=end.wait) for _ in range(count)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        end.set()
        for thread in threads:
            thread.join()


@pytest.mark.parametrize("threads", [0, 1])
@pytest.mark.parametrize("workers", [1, 3])
def test_results_come_in_the_order_of_the_items(workers, threads):
    with other_threads(threads), pool(squares, workers) as run:
        for expected, (number, same, powers) in enumerate(run(range(40))):
            assert number == expected
            assert same.tolist() == [number] * (LARGE if number == 7 else number % 4)
            assert powers.tolist() == [i * i for i in range(number)]


def test_what_is_read_ahead_is_bounded():
    taken = []
    items = (taken.append(number) or number for number in range(60))
    with pool(squares, 2, ahead=lambda number: 1.0 if number < 30 else AHEAD) as run:
        for number, *_ in run(items):
            # Of two processes; one item waits for its turn.
            assert len(taken) - number <= (2 * AHEAD + 1 if number < 30 else 3)


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_is_raised_in_its_turn(workers):
    with pool(fails, workers) as run, closing(run([9, 2, 6, 4])) as results:
        assert [next(results), next(results)] == [0, -1]
        with pytest.raises(WrongRow, match=r"^a\.jsonl:9: is wrong$") as found:
            next(results)
        assert (found.value.first, found.value.index) == (3, 6)
    with pool(fails, workers) as run, pytest.raises(ZeroDivisionError):
        list(run([4]))


def test_a_result_holds_until_the_next_one_is_asked_for():
    with pool(squares, 2) as run:
        results = run(range(30))
        for _ in range(30):
            number, _, powers = next(results)
            time.sleep(0.005)
            assert powers.tolist() == [i * i for i in range(number)]


def test_a_killed_process_is_noticed():
    with pool(kill_oneself, 2) as run, pytest.raises(WorkerLost, match="a worker process was killed"):
        list(run(range(10)))


def kill_oneself(number: int) -> int:
    if number == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def test_processes_end_with_their_work_or_without_it():
    before = children()
    with pool(squares, 3) as run:
        next(run(range(40)))
        assert len(children() - before) == 3
    assert children() == before
    with suppress(UserError), pool(squares, 2):
        raise UserError("before anything was asked for")
    assert children() == before


def test_processes_end_with_the_one_that_started_them():
    read, write = os.pipe()
    starter = os.fork()
    if not starter:
        processes = Processes(squares, 3, lambda _: 1.0)
        next(processes.run(range(40)))
        os.write(write, " ".join(children()).encode())
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(starter, 0)
    started = os.read(read, 100).decode().split()
    assert len(started) == 3
    end = time.monotonic() + 20
    while any(runs(process) for process in started):
        assert time.monotonic() < end, "the processes outlive the one that started them"
        time.sleep(0.01)
    os.close(read)
    os.close(write)


def children() -> set[str]:
    return set(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())


def runs(process: str) -> bool:
    """Whether it is there and no zombie."""
    with suppress(OSError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False
