"""One function over many items in processes of this machine, results in the items' order, in bounded memory.

A process is a fork of this one, which shares with it what it has opened; items and results travel by a pipe. What is
large stays where it was made: a process can be told what to do with it, once its result is known here.
"""

import os
import pickle
import select
import signal
import threading
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

from megacpt.errors import UserError

AHEAD = 3
"""Items handed out ahead of each process: enough to keep it busy, few enough to bound memory."""
IN_HAND = 2
"""Items that a process has at most: the one that it works on, and the next."""
NO_ITEM = object()


class WorkerLost(UserError):
    """A process that was at work is gone; what it was given may well go through another time."""


class Processes:
    """Processes that work on items for one `run`.

    Args:
        function: what is done with an item, and with what a process is told; has to be picklable if this process has
            other threads.
        ahead: how many ordinary items an item counts for.

    Raises:
        UserError: the system does not let that many be started.

    Raises (while results are asked for, or in `settle`):
        WorkerLost: a process was killed.
    """

    def __init__(self, function: Callable[[Any], Any], workers: int, ahead: Callable[[Any], float]) -> None:
        self._ahead = ahead
        self._workers: list[_Worker] = []
        self._latest: _Worker | None = None
        self._answers = select.poll()
        try:
            for _ in range(workers):
                self._workers.append(_Worker(function, self._workers))
                self._answers.register(self._workers[-1].fileno(), select.POLLIN)
        except BaseException as error:
            started = len(self._workers)
            self.end()
            if isinstance(error, OSError):
                raise UserError(
                    f"of {workers:,} worker processes only {started:,} could be started ({error.strerror}); "
                    "run again with fewer --workers"
                ) from error
            raise

    def end(self) -> None:
        """End them, whatever they do."""
        for worker in self._workers:
            worker.end()

    def run(self, items: Iterable[Any]) -> Generator[Any, None, None]:
        """Results as they are asked for."""
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
            while not pending[0].done:
                self._listen()
                if item is not NO_ITEM:
                    break
            else:
                task = pending.popleft()
                self._latest = task.worker
                yield task.outcome()

    def tell(self, order: Any) -> None:
        """Have `order` done, some time before `settle`, by the process that made the latest result of `run`."""
        assert self._latest is not None, "there was no result yet"
        self._latest.tell(order)

    def settle(self) -> None:
        """Wait until everything that was told is done.

        Raises:
            Exception: what the function raised at something that was told, now or before.
        """
        marks = [worker.hand(Mark(), 0.0) for worker in self._workers]
        while not all(mark.done for mark in marks):
            self._listen()

    def _listen(self) -> None:
        """Take an answer of each process that has one; wait for the first."""
        ready = {descriptor for descriptor, _ in self._answers.poll()}
        for worker in self._workers:
            if worker.fileno() in ready:
                worker.listen()


class Mark:
    """An item that is answered at once."""


@dataclass
class _Task:
    """What a process will answer, and once it has, how."""

    worker: "_Worker"
    weight: float
    done: bool = False
    failed: bool = False
    answer: Any = None

    def outcome(self) -> Any:
        if self.failed:
            raise self.answer
        return self.answer


class _Worker:
    """A process, as the one that started it sees it.

    Attributes:
        tasks: what it has not answered yet, in order.
    """

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
        self._orders: list[Any] = []
        self._failure: Exception | None = None
        self.tasks: deque[_Task] = deque()

    def fileno(self) -> int:
        """Of what becomes readable when there is an answer."""
        return self._pipe.fileno()

    def hand(self, item: Any, weight: float) -> _Task:
        """Give it something that it answers, and with it what it was told since the last time."""
        if self._failure is not None:
            raise self._failure
        with _loss():
            self._pipe.send_bytes(pickle.dumps((self._orders, item), 5))
        self._orders = []
        self.tasks.append(_Task(self, weight))
        return self.tasks[-1]

    def tell(self, order: Any) -> None:
        """Give it something that it answers only if it fails."""
        self._orders.append(order)

    def listen(self) -> None:
        """Take its next answer.

        Raises:
            Exception: what the function raised at an order; whoever tells it more gets to hear it again.
        """
        with _loss():
            ordered, failed, answer = self._pipe.recv()
        if ordered:
            self._failure = answer
            raise answer
        task = self.tasks.popleft()
        task.done, task.failed, task.answer = True, failed, answer

    def end(self) -> None:
        """End the process, whatever it does."""
        self._pipe.close()
        self._process.kill()
        self._process.join()


@contextmanager
def _loss() -> Iterator[None]:
    try:
        yield
    except (EOFError, OSError) as error:
        raise WorkerLost(
            "a worker process was killed, most likely for lack of memory; run again with fewer --workers"
        ) from error


def _work(function: Callable[[Any], Any], pipe: Any, others: Iterable[Any]) -> None:
    """What a process does, until the one that started it closes the pipe or ends: that one handles signals."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    for other in others:
        other.close()
    tasks: SimpleQueue[tuple[list[Any], Any]] = SimpleQueue()
    threading.Thread(target=_receive, args=(pipe, tasks), daemon=True).start()
    while True:
        orders, item = tasks.get()
        for order in orders:
            failed, answer = _attempt(function, order)
            if failed:
                _answer(pipe, True, failed, answer)
        _answer(pipe, False, *((False, None) if isinstance(item, Mark) else _attempt(function, item)))
        del item


def _answer(pipe: Any, ordered: bool, failed: bool, answer: Any) -> None:
    pipe.send_bytes(pickle.dumps((ordered, failed, answer), 5))


def _attempt(function: Callable[[Any], Any], what: Any) -> tuple[bool, Any]:
    """Whether it failed, and the result or the error."""
    try:
        return False, function(what)
    except Exception as error:
        if not isinstance(error, UserError):
            error.add_note(traceback.format_exc())
        return True, error


def _receive(pipe: Any, tasks: SimpleQueue[tuple[list[Any], Any]]) -> None:
    try:
        while True:
            tasks.put(pipe.recv())
    except (EOFError, OSError):
        pass  # the other one has ended: an OSError if in the middle of a message
    except Exception:
        traceback.print_exc()
    finally:
        os._exit(0)
