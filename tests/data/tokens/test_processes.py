"""Processes that work for this one: order, memory, errors, and how they end."""

import os
import signal
import stat
import struct
import threading
import time
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest

from megacpt.data.text.rows import WrongRow
from megacpt.data.tokens.pool import pool
from megacpt.data.tokens.processes import AHEAD, Processes, WorkerLost
from megacpt.errors import UserError

LARGE = 1 << 20
"""More bytes than a pipe holds."""
HALF_A_MESSAGE = struct.pack("!i", 100) + b"half"
"""The beginning of one of 100 bytes, as multiprocessing writes it."""


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


class Diary:
    """Answers a number with the process that has it; appends what it is told, text, to a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __call__(self, what: int | str) -> tuple[int, int] | None:
        if isinstance(what, int):
            time.sleep(0.01 if what % 5 == 0 else 0)
            return what, os.getpid()
        if what == "fail":
            raise UserError("it cannot be done")
        with self.path.open("a", encoding="utf-8") as handle:
            handle.write(f"{os.getpid()} {what}\n")
        return None


@contextmanager
def three(function):
    processes = Processes(function, 3, lambda _: 1.0)
    try:
        yield processes
    finally:
        processes.end()


@pytest.mark.parametrize("threads", [0, 1])
def test_an_order_is_done_by_the_process_of_the_latest_result(tmp_path, threads):
    path = tmp_path / "diary"
    with other_threads(threads), three(Diary(path)) as processes:
        expected = set()
        for number, process in processes.run(range(40)):
            processes.tell(f"{number} " + "x" * (LARGE if number == 7 else 3))
            expected.add(f"{process} {number}")
            if number == 20:
                processes.settle()
                assert len(path.read_text().splitlines()) == 21
        processes.settle()
        assert {line[: line.rindex(" ")] for line in path.read_text().splitlines()} == expected


def test_orders_of_a_process_are_done_in_their_order(tmp_path):
    with three(Diary(tmp_path / "diary")) as processes:
        for number, _ in processes.run(range(40)):
            processes.tell(str(number))
        processes.settle()
    done: dict[str, list[int]] = {}
    for line in (tmp_path / "diary").read_text().splitlines():
        process, number = line.split()
        done.setdefault(process, []).append(int(number))
    assert all(numbers == sorted(numbers) for numbers in done.values())
    assert sum(map(len, done.values())) == 40


def test_an_order_that_fails_is_told_of_whenever_one_settles(tmp_path):
    with three(Diary(tmp_path / "diary")) as processes:
        results = processes.run(range(3))
        next(results)
        processes.tell("fail")
        for _ in range(3):
            with pytest.raises(UserError, match=r"^it cannot be done$"):
                processes.settle()


def test_settling_notices_a_killed_process(tmp_path):
    with three(Diary(tmp_path / "diary")) as processes:
        _, process = next(processes.run(range(1)))
        processes.tell("a")
        os.kill(process, signal.SIGKILL)
        with pytest.raises(WorkerLost, match="a worker process was killed"):
            processes.settle()


def test_a_killed_process_is_noticed():
    with pool(kill_oneself, 2) as run, pytest.raises(WorkerLost, match="a worker process was killed"):
        list(run(range(10)))


def kill_oneself(number: int) -> int:
    if number == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def test_a_process_killed_in_the_middle_of_its_answer_is_noticed():
    with pool(half_an_answer, 2) as run, pytest.raises(WorkerLost, match="a worker process was killed"):
        list(run(range(10)))


def half_an_answer(number: int) -> int:
    if number == 5:
        descriptors = (int(path.name) for path in Path("/proc/self/fd").iterdir())
        # The latest: what ran before in this process may have left others.
        pipe = max(number for number in descriptors if is_socket(number))
        os.write(pipe, HALF_A_MESSAGE)
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def is_socket(descriptor: int) -> bool:
    with suppress(OSError):
        return stat.S_ISSOCK(os.fstat(descriptor).st_mode)
    return False


def test_processes_end_with_their_work_or_without_it():
    before = children()
    with pool(squares, 3) as run:
        next(run(range(40)))
        assert len(children() - before) == 3
    assert children() == before
    with suppress(UserError), pool(squares, 2):
        raise UserError("before anything was asked for")
    assert children() == before


@pytest.mark.parametrize("half_said", [b"", HALF_A_MESSAGE])
def test_processes_end_with_the_one_that_started_them(half_said):
    read, write = os.pipe()
    starter = os.fork()
    if not starter:
        processes = Processes(squares, 3, lambda _: 1.0)
        next(processes.run(range(40)))
        os.write(write, " ".join(children()).encode())
        for worker in processes._workers:
            os.write(worker.fileno(), half_said)
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
