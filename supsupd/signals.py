"""Signals of the main thread: the first asks for an end, the second is one."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def signals_set(event: threading.Event) -> Iterator[None]:
    """SIGTERM and SIGINT only set `event`; a second one ends the process at once, which costs no more than a crash."""

    def handle(number: int, _frame: object) -> None:
        if event.is_set():
            os._exit(128 + number)
        event.set()

    previous = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
