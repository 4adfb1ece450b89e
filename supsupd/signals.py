"""Signals of the main thread: the first asks for an end, the second is one."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def signals_set(event: threading.Event, hangup: threading.Event | None = None) -> Iterator[None]:
    """SIGTERM and SIGINT only set `event`; a second one ends the process at once, which costs no more than a crash.
    SIGHUP sets `hangup`, if there is one."""

    def handle(number: int, _frame: object) -> None:
        if event.is_set():
            os._exit(128 + number)
        event.set()

    def handle_hangup(_number: int, _frame: object) -> None:
        if hangup is not None:
            hangup.set()

    handlers = {signal.SIGTERM: handle, signal.SIGINT: handle} | ({signal.SIGHUP: handle_hangup} if hangup else {})
    previous = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
