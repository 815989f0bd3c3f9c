"""One function over many items, results in the items' order, in bounded memory: here, in processes, or on Ray.

Processes are forks of this one, which shares with them what it has opened. Items reach them by a pipe. The arrays of a
result come back in memory that both sides map: an anonymous file, which nothing has to clear away after a kill.
"""

import logging
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

ENGINES = ("local", "ray")
AHEAD = 3
"""Items handed out ahead of each process: enough to keep it busy, few enough to bound memory."""
IN_HAND = 2
"""Items that a process has at most: the one that it works on, and the next."""
LARGE = 1 << 23
"""Bytes of a result beyond which its memory is given back rather than kept for the next one."""
NO_ITEM = object()

type Run[Item, Result] = Callable[[Iterable[Item]], Generator[Result, None, None]]
"""Results of items in their order, as they are asked for; each holds good until the next one is asked for."""


class WorkerLost(UserError):
    """A process that was at work is gone; what it was given may well go through another time."""


@contextmanager
def pool[Item, Result](
    function: Callable[[Item], Result],
    workers: int,
    engine: str = "local",
    ahead: Callable[[Item], float] = lambda _: 1.0,
) -> Iterator[Run[Item, Result]]:
    """What runs `function` on items, once.

    Processes start at once: take a pool before locks and files that they should not hold.

    Args:
        function: has to be picklable on Ray, and for processes where this one has threads.
        workers: processes; 1 is this one. On Ray, tasks of one CPU at a time.
        ahead: how many ordinary items an item counts for.

    Raises (while results are asked for):
        UserError: raised by the function; or Ray is not installed or does not answer.
        WorkerLost: a worker was killed.
    """
    if engine == "ray":
        yield lambda items: _on_ray(function, items, workers)
    elif workers == 1:
        yield lambda items: (function(item) for item in items)
    else:
        started: list[_Worker] = []
        try:
            for _ in range(workers):
                started.append(_Worker(function, started))
            yield lambda items: _in_processes(started, items, ahead)
        finally:
            for worker in started:
                worker.end()


@dataclass
class _Task:
    """An item that was handed out, and what the process said of it, once it has."""

    worker: "_Worker"
    weight: float
    answer: Any = None


@dataclass(frozen=True)
class _Answer:
    """A pickled result, or an exception if it `failed`, whose arrays of `sizes` bytes lie in the process's memory number
    `slot`, end to end; `made` if that memory is new and its descriptor follows."""

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


def _in_processes(
    workers: list[_Worker], items: Iterable[Any], ahead: Callable[[Any], float]
) -> Generator[Any, None, None]:
    from multiprocessing.connection import wait

    waiting = iter(items)
    pending: deque[_Task] = deque()
    item = next(waiting, NO_ITEM)
    while pending or item is not NO_ITEM:
        while item is not NO_ITEM and sum(task.weight for task in pending) < AHEAD * len(workers):
            idlest = min(workers, key=lambda worker: len(worker.tasks))
            if len(idlest.tasks) >= IN_HAND:
                break
            pending.append(idlest.hand(item, ahead(item)))
            item = next(waiting, NO_ITEM)
        while pending[0].answer is None:
            for worker in wait([worker for worker in workers if worker.tasks]):
                worker.listen()  # type: ignore[union-attr]
            if item is not NO_ITEM:
                break
        else:
            task = pending.popleft()
            yield task.worker.result(task.answer)
            task.worker.forget(task.answer)


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
        arrays: list[memoryview] = []
        try:
            pickled = pickle.dumps(function(item), 5, buffer_callback=lambda array: arrays.append(array.raw()))
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


def _on_ray[Item, Result](function: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Generator[Result, None, None]:
    try:
        import ray
    except ImportError as error:
        raise UserError("--engine ray: ray is not installed; pip install 'megacpt[ray]'") from error
    started = not ray.is_initialized()
    if started:
        address = os.environ.get("RAY_ADDRESS")
        options: dict[str, Any] = {"address": address, "log_to_driver": False, "logging_level": logging.ERROR}
        try:
            ray.init(**options, **({"num_cpus": workers, "include_dashboard": False} if address is None else {}))
        except ConnectionError as error:
            raise UserError(
                f"--engine ray: no cluster answers at RAY_ADDRESS={address}; start it, or unset it"
            ) from error
    task = ray.remote(num_cpus=1)(_or_sentence).options(max_retries=3)
    pending: deque[Any] = deque()
    try:
        for item in items:
            pending.append(task.remote(function, item))
            if len(pending) >= AHEAD * workers:
                yield _fetched(ray, pending.popleft())
        while pending:
            yield _fetched(ray, pending.popleft())
    finally:
        if started:
            ray.shutdown()


def _or_sentence(function: Callable[[Any], Any], item: Any) -> tuple[Any, str | None]:
    """The result, or the words for a user: an exception would arrive wrapped in Ray's own."""
    try:
        return function(item), None
    except UserError as error:
        return None, str(error)


def _fetched(ray: Any, reference: Any) -> Any:
    try:
        result, sentence = ray.get(reference)
    except ray.exceptions.RayTaskError:
        raise
    except ray.exceptions.RayError as error:
        reason = str(error).splitlines()[0]
        raise WorkerLost(f"--engine ray: a task was lost for good ({reason}); run the same command again") from error
    if sentence is not None:
        raise UserError(sentence)
    return result
