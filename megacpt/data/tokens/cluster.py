"""A Ray cluster to hand tasks to: the one that RAY_ADDRESS names or that runs here, else a local one."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from megacpt.data.tokens.processes import WorkerLost
from megacpt.errors import UserError

SECONDS_TO_ANSWER = 10.0


def import_ray() -> Any:
    """The module ray.

    Raises:
        UserError: it is not installed.
    """
    try:
        import ray
    except ImportError as error:
        raise UserError("--engine ray: ray is not installed; pip install 'megacpt[ray]'") from error
    return ray


@contextmanager
def connected(ray: Any, workers: int | None) -> Iterator[None]:
    """While on a cluster; one that was joined or started for this is left afterwards.

    Args:
        workers: CPUs of a cluster that is started here; None for as many as there are.

    Raises:
        UserError: nobody answers at RAY_ADDRESS.
    """
    entered = _enter(ray, workers)
    try:
        yield
    finally:
        if entered:
            ray.shutdown()


def _enter(ray: Any, workers: int | None) -> bool:
    """Join a cluster, or start one here; whether this process did either (and must leave)."""
    if ray.is_initialized():
        return False
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    named = os.environ.get("RAY_ADDRESS", "")
    try:
        _knock(named)
        ray.init(address=named or "auto", **quiet)
    except OSError as error:
        if named:
            raise UserError(
                f"--engine ray: no cluster answers at RAY_ADDRESS={named}; start it, or unset RAY_ADDRESS"
            ) from error
        ray.init(address="local", num_cpus=workers, include_dashboard=False, **quiet)
    return True


def _knock(address: str) -> None:
    """Raise where nobody listens at HOST:PORT: ray itself tries for minutes."""
    host, colon, port = address.rpartition(":")
    if colon and port.isdigit() and "/" not in host:
        socket.create_connection((host, int(port)), timeout=SECONDS_TO_ANSWER).close()


def fetched(ray: Any, task: Any) -> Any:
    """What a task returned.

    Raises:
        WorkerLost: the task was lost for good.
    """
    try:
        return ray.get(task)
    except ray.exceptions.RayTaskError:
        raise
    except ray.exceptions.RayError as error:
        reason = str(error).splitlines()[0]
        raise WorkerLost(f"--engine ray: a task was lost for good ({reason}); run the same command again") from error
