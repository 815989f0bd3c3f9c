"""One function over many items, results in the items' order, in bounded memory: here, in processes, or on Ray."""

import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from megacpt.errors import UserError

ENGINES = ("local", "ray")
AHEAD = 3
"""Items handed out ahead of each process: enough to keep it busy, few enough to bound memory."""


class WorkerLost(UserError):
    """A process that was at work is gone; what it was given may well go through another time."""


def ordered[Item, Result](
    function: Callable[[Item], Result], items: Iterable[Item], workers: int, engine: str = "local"
) -> Iterator[Result]:
    """`function` of each item.

    Args:
        function: has to be picklable, unless one local worker runs it here.
        workers: processes; on Ray, tasks of one CPU at a time.

    Raises:
        UserError: raised by the function; or Ray is not installed or does not answer.
        WorkerLost: a worker was killed.
    """
    if engine == "ray":
        return _on_ray(function, items, workers)
    return map(function, items) if workers == 1 else _in_processes(function, items, workers)


def _in_processes[Item, Result](
    function: Callable[[Item], Result], items: Iterable[Item], workers: int
) -> Iterator[Result]:
    import multiprocessing

    pending: deque[Any] = deque()
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _end_with_parent) as pool:
        try:
            for item in items:
                pending.append(pool.submit(function, item))
                if len(pending) >= AHEAD * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool as error:
            raise WorkerLost(
                "a worker process was killed, most likely for lack of memory; run again with fewer --workers"
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _end_with_parent() -> None:
    """Make a worker end when the main process is killed, and leave Ctrl-C to the main process."""
    import multiprocessing
    import signal
    from multiprocessing.connection import wait

    parent = multiprocessing.parent_process()
    assert parent is not None
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch(sentinel: int) -> None:
        wait([sentinel])
        os._exit(1)

    threading.Thread(target=watch, args=(parent.sentinel,), daemon=True).start()


def _on_ray[Item, Result](function: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Iterator[Result]:
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
