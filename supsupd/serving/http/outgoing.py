"""What is written to one client, and whether the client takes it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

JOIN_BYTES = 1 << 16
"""Up to this size copying a body costs less than a system call of its own."""


class Outgoing:
    """The writing side of a connection.

    Args:
        transport: where to.
        patience: gives the seconds for which a client may take nothing of what waits to be sent.
        cut: called once these are over.
    """

    __slots__ = ("_cut", "_head_is_next", "_patience", "_transport", "_watch", "held")

    def __init__(self, transport: asyncio.Transport, patience: Callable[[], float], cut: Callable[[], None]) -> None:
        self._transport = transport
        self._patience = patience
        self._cut = cut
        self._watch: asyncio.TimerHandle | None = None
        self._head_is_next = False
        self.held = b""
        """An answer's head, which goes out with the first of its body: one system call, and one wake-up of the
        client, for most answers."""

    def expect_head(self) -> None:
        """What is written next is an answer's head."""
        self._head_is_next = True

    def write(self, data: bytes) -> None:
        if self._head_is_next:
            self._head_is_next = False
            self.held = data
        elif len(data) <= JOIN_BYTES:
            self._transport.write(self.held + data)
            self.held = b""
        else:
            self.flush()
            self._transport.write(data)

    def flush(self) -> None:
        """Sends a head that has no body."""
        if self.held:
            self._transport.write(self.held)
            self.held = b""

    def watch(self) -> None:
        """From now on the client must take something of what waits, time after time, until nothing does."""
        before = self._transport.get_write_buffer_size()
        loop = asyncio.get_running_loop()
        self._watch = loop.call_later(self._patience(), self._look, before) if before else None

    def unwatch(self) -> None:
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None

    def _look(self, before: int) -> None:
        if self._transport.get_write_buffer_size() < before:
            self.watch()
        else:
            self._cut()
