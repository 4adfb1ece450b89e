"""Commands to one thread from others: each runs there between two pieces of work, and its caller waits for it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

T = TypeVar("T")


class CommandRefused(RuntimeError):
    """The command was not begun and never will be: the thread ends, or its work takes too long."""


class CommandQueue:
    """What waits for the thread that calls `run_waiting`.

    Args:
        wake: tells that thread that something waits.
    """

    def __init__(self, wake: Callable[[], None]) -> None:
        self._wake = wake
        self._waiting: SimpleQueue[tuple[Callable[[], Any], Future[Any]]] = SimpleQueue()
        self._closed = threading.Event()

    def call(self, command: Callable[[], T], seconds: float) -> T:
        """What `command` gives, or raises, in the other thread.

        Raises CommandRefused when its turn does not come within `seconds`; what has begun is waited for.
        """
        future: Future[T] = Future()
        self._waiting.put((command, future))
        self._wake()
        if self._closed.is_set():  # nobody may be there any more to take it
            self._refuse_waiting()
        try:
            return future.result(seconds)
        except CancelledError:
            raise CommandRefused("shutting down; nothing was changed") from None
        except TimeoutError:
            if future.done() or not future.cancel():  # it has begun, or ended with a TimeoutError of its own
                return future.result()
            raise CommandRefused(f"no turn within {seconds:g} s: a batch is in training; nothing was changed") from None

    def run_waiting(self) -> None:
        """Runs all that waits, in order; to be called by the one thread that may."""
        while (taken := self._next()) is not None:
            command, future = taken
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(command())
                except Exception as error:  # noqa: BLE001 - it is the caller's
                    future.set_exception(error)

    def close(self) -> None:
        """Refuses all that waits and all that comes."""
        self._closed.set()
        self._refuse_waiting()

    def _refuse_waiting(self) -> None:
        while (taken := self._next()) is not None:
            taken[1].cancel()

    def _next(self) -> tuple[Callable[[], Any], Future[Any]] | None:
        try:
            return self._waiting.get_nowait()
        except Empty:
            return None
