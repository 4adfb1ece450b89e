"""The protocol of everything that batches come from."""

from collections.abc import Iterator, Sequence
from typing import Protocol

from streams.batch import Arrival, Item


class SourceUnavailable(Exception):
    """The source cannot be reached now; the text says where and why, in one line, without secrets."""


class Source(Protocol):
    """For one thread; only `poke` may come from any other.

    A source is told at its making how far it was read before: cursors, {key: position}. Nothing that is handed over is
    gone before it is acknowledged: the caller makes items durable first, in the order in which they came, and then says
    so. Not iterating is how a caller slows a source down.
    """

    name: str

    def iter_arrivals(self) -> Iterator[Item]:
        """One full pass: all that is there now and not acknowledged, in the source's own order.

        A `Gap` is yielded in place of what is missing, and nothing after it until it is acknowledged. Raises
        SourceUnavailable; the next pass begins anew.
        """

    def acknowledge(self, items: Sequence[Item]) -> None:
        """The caller has made `items` durable, all that came before them too: they are not yielded again.

        Raises SourceUnavailable: then they may come again, with the same identities.
        """

    def postpone(self, item: Arrival) -> None:
        """`item`, which may grow, is not whole yet: it comes again later, in the end as one that may not grow."""

    def problem(self) -> str | None:
        """What keeps it from working, in one line; None while nothing does. For any thread."""

    def pending(self) -> int:
        """How many were seen that are not finished, or not acknowledged, yet. For any thread."""

    def wait(self, timeout: float) -> None:
        """Return when something may have changed, at `poke`, or after `timeout` seconds at the latest."""

    def poke(self) -> None:
        """End the current or next `wait` at once."""

    def close(self) -> None:
        """Release watches, connections and threads; may be called twice."""
