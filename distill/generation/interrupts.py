"""Ctrl-C that ends work in order: the first one asks for it, the second one insists."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def draining(drain: Callable[[], str]) -> Iterator[None]:
    """While this lasts, the first SIGINT or SIGTERM calls `drain` and says its sentence on stderr; the next one raises
    KeyboardInterrupt. `drain` runs in a signal handler: it must take no lock. In the main thread only."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    asked = False

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        # Not print: the signal may have come while something was being printed.
        os.write(2, f"\n{drain()}\n".encode())

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
