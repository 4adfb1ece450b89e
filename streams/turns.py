"""Who may decode now, so that nobody waits for what another one has sent, and all together stay within bounds."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(eq=False, slots=True)
class _Turn:
    """One request of `who` that needs `size` bytes."""

    who: str
    size: int


class Turns:
    """One request of each asker at a time, and at most `most` of all that need at most `total` bytes together.

    The oldest that fits comes next: a small one passes a large one that waits for bytes. What needs more than `total`
    has its turn when nobody else has one. For any thread.
    """

    def __init__(self, most: int, total: int) -> None:
        self._most = most
        self._total = total
        self._changed = threading.Condition()
        self._waiting: list[_Turn] = []
        self._running: list[_Turn] = []

    @contextmanager
    def taken(self, who: str, size: int) -> Iterator[None]:
        """Waits for a turn of `who`, and has it as long as the block runs."""
        turn = _Turn(who, size)
        with self._changed:
            self._waiting.append(turn)
            try:
                self._changed.wait_for(lambda: self._next() is turn)
                self._running.append(turn)
            finally:
                self._waiting.remove(turn)
                self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._running.remove(turn)
                self._changed.notify_all()

    def _next(self) -> _Turn | None:
        return next(filter(self._fits, self._waiting), None)

    def _fits(self, turn: _Turn) -> bool:
        if any(other.who == turn.who for other in self._running) or len(self._running) >= self._most:
            return False
        return not self._running or sum(other.size for other in self._running) + turn.size <= self._total
