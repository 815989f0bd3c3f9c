"""One function over many items, results in the items' order, in bounded memory: here, in processes, or on Ray."""

import logging
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from megacpt.data.tokens.processes import AHEAD, Processes, WorkerLost
from megacpt.errors import UserError

ENGINES = ("local", "ray")

type Run[Item, Result] = Callable[[Iterable[Item]], Generator[Result, None, None]]
"""Results of items in their order, as they are asked for; each holds good until the next one is asked for."""


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
        processes = Processes(function, workers, ahead)
        try:
            yield processes.run
        finally:
            processes.end()


def _on_ray[Item, Result](
    function: Callable[[Item], Result], items: Iterable[Item], workers: int
) -> Generator[Result, None, None]:
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
    task = ray.remote(num_cpus=1)(_or_error).options(max_retries=3)
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


def _or_error(function: Callable[[Any], Any], item: Any) -> tuple[Any, UserError | None]:
    """The result, or the error for the user, which would arrive wrapped in Ray's own."""
    try:
        return function(item), None
    except UserError as error:
        return None, error


def _fetched(ray: Any, reference: Any) -> Any:
    try:
        result, error = ray.get(reference)
    except ray.exceptions.RayTaskError:
        raise
    except ray.exceptions.RayError as loss:
        reason = str(loss).splitlines()[0]
        raise WorkerLost(f"--engine ray: a task was lost for good ({reason}); run the same command again") from loss
    if error is not None:
        raise error
    return result
