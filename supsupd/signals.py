"""Signals of the main thread: the first asks for an end, the second is one."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def signals_set(event: threading.Event, hangup: threading.Event | None = None) -> Iterator[Callable[[float], None]]:
    """SIGTERM and SIGINT only set `event`; a second one ends the process at once, which costs no more than a crash.
    SIGHUP sets `hangup`, if there is one.

    Gives what the main thread waits with, for so many seconds or until a signal: it sets the events. An event alone
    would not do: a signal that comes just before its wait, or amid its lock, would be heard too late or never.
    """
    came: set[int] = set()

    def handle(number: int, _frame: object) -> None:
        if came & {signal.SIGTERM, signal.SIGINT} and number != signal.SIGHUP:
            os._exit(128 + number)
        came.add(number)

    def wait(seconds: float) -> None:
        select.select([heard], [], [], seconds)
        with contextlib.suppress(BlockingIOError):
            heard.recv(4096)
        if came & {signal.SIGTERM, signal.SIGINT}:
            event.set()
        if hangup is not None and signal.SIGHUP in came:
            came.discard(signal.SIGHUP)
            hangup.set()

    numbers = [signal.SIGTERM, signal.SIGINT, *([signal.SIGHUP] if hangup else [])]
    heard, rung = socket.socketpair()
    with heard, rung:
        heard.setblocking(False)
        rung.setblocking(False)
        previous = {number: signal.signal(number, handle) for number in numbers}
        previous_rung = signal.set_wakeup_fd(rung.fileno(), warn_on_full_buffer=False)
        try:
            yield wait
        finally:
            signal.set_wakeup_fd(previous_rung)
            for number, handler in previous.items():
                signal.signal(number, handler)
