"""One function over many items in processes of this machine, results in the items' order, in bounded memory.

A process is a fork of this one, which shares with it what it has opened. Items reach it by a pipe. The arrays of a
result come back in memory that both sides map: an anonymous file, which nothing has to clear away after a kill.
"""

import mmap
import os
import pickle
import signal
import threading
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from queue import SimpleQueue
from typing import Any

from megacpt.errors import UserError

AHEAD = 3
"""Items handed out ahead of each process: enough to keep it busy, few enough to bound memory."""
IN_HAND = 2
"""Items that a process has at most: the one that it works on, and the next."""
LARGE = 1 << 23
"""Bytes of a result beyond which its memory is given back rather than kept for the next one."""
NO_ITEM = object()


class WorkerLost(UserError):
    """A process that was at work is gone; what it was given may well go through another time."""


class Processes:
    """Processes that work on items for one `run`.

    Args:
        function: has to be picklable if this process has other threads.
        ahead: how many ordinary items an item counts for.

    Raises (while results are asked for):
        WorkerLost: a process was killed.
    """

    def __init__(self, function: Callable[[Any], Any], workers: int, ahead: Callable[[Any], float]) -> None:
        self._ahead = ahead
        self._workers: list[_Worker] = []
        try:
            for _ in range(workers):
                self._workers.append(_Worker(function, self._workers))
        except BaseException:
            self.end()
            raise

    def end(self) -> None:
        """End them, whatever they do."""
        for worker in self._workers:
            worker.end()

    def run(self, items: Iterable[Any]) -> Generator[Any, None, None]:
        """Results as they are asked for; the arrays of each are there until the next one is."""
        from multiprocessing.connection import wait

        waiting = iter(items)
        pending: deque[_Task] = deque()
        item = next(waiting, NO_ITEM)
        while pending or item is not NO_ITEM:
            while item is not NO_ITEM and sum(task.weight for task in pending) < AHEAD * len(self._workers):
                idlest = min(self._workers, key=lambda worker: len(worker.tasks))
                if len(idlest.tasks) >= IN_HAND:
                    break
                pending.append(idlest.hand(item, self._ahead(item)))
                item = next(waiting, NO_ITEM)
            while pending[0].answer is None:
                busy: list[Any] = [worker for worker in self._workers if worker.tasks]
                ready: list[Any] = wait(busy)
                for worker in ready:
                    worker.listen()
                if item is not NO_ITEM:
                    break
            else:
                task = pending.popleft()
                yield task.worker.result(task.answer)
                task.worker.forget(task.answer)


@dataclass
class _Task:
    """An item that was handed out, and what the process said of it, once it has."""

    worker: "_Worker"
    weight: float
    answer: Any = None


@dataclass(frozen=True)
class _Answer:
    """What a process says of a task.

    Attributes:
        pickled: the result without its arrays, or the exception if it `failed`.
        sizes: bytes of the arrays, which lie end to end in the process's memory number `slot`.
        made: whether that memory is new, and its descriptor follows.
    """

    pickled: bytes
    sizes: list[int] = field(default_factory=list)
    slot: int = -1
    made: bool = False
    failed: bool = False


class _Worker:
    """A process, as the one that started it sees it."""

    def __init__(self, function: Callable[[Any], Any], elder: Iterable["_Worker"]) -> None:
        import multiprocessing

        # A fork while other threads run may find locks that nobody is left to open.
        alone = threading.active_count() == 1
        context: Any = multiprocessing.get_context("fork" if alone else "spawn")
        self._pipe, theirs = context.Pipe()
        others = [self._pipe, *(worker._pipe for worker in elder)] if alone else []
        self._process = context.Process(target=_work, args=(function, theirs, others), daemon=True)
        self._process.start()
        theirs.close()
        self._memory: list[int] = []
        self._free: list[int] = []
        self.tasks: deque[_Task] = deque()

    def fileno(self) -> int:
        """Of what becomes readable when there is an answer."""
        return self._pipe.fileno()

    def hand(self, item: Any, weight: float) -> _Task:
        """Give it something to do."""
        with _loss():
            self._pipe.send((item, self._free))
        self._free = []
        self.tasks.append(_Task(self, weight))
        return self.tasks[-1]

    def listen(self) -> None:
        """Take its next answer."""
        from multiprocessing.reduction import recv_handle

        with _loss():
            answer = self._pipe.recv()
            if answer.made:
                self._memory.append(recv_handle(self._pipe))
        self.tasks.popleft().answer = answer

    def result(self, answer: _Answer) -> Any:
        """The result that it has told of; until `forget` its arrays are there."""
        if answer.failed:
            raise pickle.loads(answer.pickled)
        total = sum(answer.sizes)
        view = memoryview(mmap.mmap(self._memory[answer.slot], total, prot=mmap.PROT_READ) if total else b"")
        edges = pairwise(accumulate(answer.sizes, initial=0))
        return pickle.loads(answer.pickled, buffers=[view[start:stop] for start, stop in edges])

    def forget(self, answer: _Answer) -> None:
        """Let it use the memory of a result again."""
        self._free.append(answer.slot)

    def end(self) -> None:
        """End the process, whatever it does."""
        self._pipe.close()
        self._process.kill()
        self._process.join()
        for descriptor in self._memory:
            os.close(descriptor)


@contextmanager
def _loss() -> Iterator[None]:
    try:
        yield
    except (EOFError, ConnectionError) as error:
        raise WorkerLost(
            "a worker process was killed, most likely for lack of memory; run again with fewer --workers"
        ) from error


def _work(function: Callable[[Any], Any], pipe: Any, others: Iterable[Any]) -> None:
    """What a process does, until the one that started it closes the pipe or ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for other in others:
        other.close()
    tasks: SimpleQueue[tuple[Any, list[int]]] = SimpleQueue()
    threading.Thread(target=_receive, args=(pipe, tasks), daemon=True).start()
    memory: list[int] = []
    free: list[int] = []
    while True:
        item, forgotten = tasks.get()
        free += forgotten
        try:
            pickled, arrays = _pickled(function(item))
        except Exception as error:
            if not isinstance(error, UserError):
                error.add_note(traceback.format_exc())
            pipe.send(_Answer(pickle.dumps(error), failed=True))
            continue
        del item
        made = not free
        if made:
            free.append(len(memory))
            memory.append(os.memfd_create("result"))
        slot = free.pop()
        _write(memory[slot], arrays)
        pipe.send(_Answer(pickled, [array.nbytes for array in arrays], slot, made))
        if made:
            _send_descriptor(pipe, memory[slot])


def _pickled(result: Any) -> tuple[bytes, list[memoryview]]:
    """A result without its arrays, and these."""
    arrays: list[pickle.PickleBuffer] = []
    pickled = pickle.dumps(result, 5, buffer_callback=arrays.append)
    return pickled, [array.raw() for array in arrays]


def _receive(pipe: Any, tasks: SimpleQueue[tuple[Any, list[int]]]) -> None:
    try:
        while True:
            tasks.put(pipe.recv())
    except (EOFError, ConnectionError):
        os._exit(0)


def _send_descriptor(pipe: Any, descriptor: int) -> None:
    from multiprocessing.reduction import send_handle

    send_handle(pipe, descriptor, None)


def _write(descriptor: int, arrays: Iterable[memoryview]) -> None:
    """Put arrays into memory end to end."""
    if os.fstat(descriptor).st_size > LARGE:
        os.ftruncate(descriptor, 0)
    at = 0
    for array in arrays:
        done = 0
        while done < array.nbytes:
            done += os.pwrite(descriptor, array[done:], at + done)
        at += array.nbytes
