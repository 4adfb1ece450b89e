"""The protocol of everything that batches come from."""

from collections.abc import Iterator
from typing import Protocol

from streams.batch import Arrival, Refusal


class Source(Protocol):
    """For one thread; only `poke` may come from any other."""

    name: str

    def iter_arrivals(self) -> Iterator[Arrival | Refusal]:
        """One full pass: what is finished and not acknowledged, by mtime, then natural order of name."""

    def acknowledge(self, item: Arrival | Refusal) -> None:
        """The caller has made `item` durable: its position is never yielded again."""

    def pending(self) -> int:
        """How many were seen in the last completed pass that are not finished yet."""

    def wait(self, timeout: float) -> None:
        """Return when something may have changed, at `poke`, or after `timeout` seconds at the latest."""

    def poke(self) -> None:
        """End the current or next `wait` at once."""

    def close(self) -> None:
        """Release watches and threads; may be called twice."""
