"""One function over many items, results in the items' order, in bounded memory: here, in processes, or on Ray."""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from megacpt.data.tokens.cluster import connected, fetched, import_ray
from megacpt.data.tokens.processes import AHEAD, Processes
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
    ray = import_ray()
    with connected(ray, workers):
        task = ray.remote(num_cpus=1)(_or_error).options(max_retries=3)
        pending: deque[Any] = deque()
        for item in items:
            pending.append(task.remote(function, item))
            if len(pending) >= AHEAD * workers:
                yield _result(ray, pending.popleft())
        while pending:
            yield _result(ray, pending.popleft())


def _or_error(function: Callable[[Any], Any], item: Any) -> tuple[Any, UserError | None]:
    """The result, or the error for the user, which would arrive wrapped in Ray's own."""
    try:
        return function(item), None
    except UserError as error:
        return None, error


def _result(ray: Any, task: Any) -> Any:
    result, error = fetched(ray, task)
    if error is not None:
        raise error
    return result
