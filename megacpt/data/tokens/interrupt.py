"""Ctrl-C and SIGTERM at a place of one's own choice."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def held_back() -> Iterator[Callable[[], None]]:
    """Hold Ctrl-C and SIGTERM back until the yielded function is called, which raises KeyboardInterrupt then.

    A second signal interrupts at once. An error after a signal counts as the interruption: a signal to all processes of
    a job ends its workers as well. Outside the main thread, which alone can handle signals, nothing is changed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    caught: list[int] = []

    def handle(number: int, _: FrameType | None) -> None:
        caught.append(number)
        if len(caught) > 1:
            raise KeyboardInterrupt

    def check() -> None:
        if caught:
            raise KeyboardInterrupt

    before = {number: signal.signal(number, handle) for number in SIGNALS}
    try:
        yield check
    except Exception as error:
        if caught:
            raise KeyboardInterrupt from error
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
