"""How many bytes a batch may take once it is decoded, whatever its format: counted here, before they are taken."""

from dataclasses import dataclass

from streams.batch import BatchRejected
from streams.reading import Limits

RATIO_MATTERS_FROM = 16 << 20  # bytes; a batch that takes less is harmless however well it packs
_COPIES = 3  # of a batch while it is decoded: what a library makes of the bytes, the arrays' parts, and the arrays
_BESIDE = 64 << 20  # bytes beside those: buffers, and what the system has not got back of earlier ones


def most_unpacked(packed: int, limits: Limits) -> int:
    """Bytes that `packed` ones may become: arrays as they are held, labels among them."""
    return min(limits.bytes, max(RATIO_MATTERS_FROM, limits.ratio * packed))


def working_bytes(packed: int, limits: Limits) -> int:
    """Bytes that a process may take to decode `packed` ones: whatever a format claims, no more than this is there."""
    return _BESIDE + packed + _COPIES * most_unpacked(packed, limits)


@dataclass(slots=True)
class Budget:
    """What one batch takes so far, and how much it may; all raise BatchRejected too_large or too_many_samples.

    packed: bytes that it came in. rows, taken: what was counted by `take`.
    """

    packed: int
    limits: Limits
    rows: int = 0
    taken: int = 0

    def take(self, size: int, rows: int = 0) -> None:
        """`size` bytes and `rows` samples more are about to be held."""
        if rows:
            self.rows += rows
            self.check_rows(self.rows)
        self.taken += size
        self.check(self.taken)

    def check(self, size: int) -> None:
        """Whether it may take `size` bytes in all."""
        if size > self.limits.bytes:
            raise BatchRejected("too_large", f"unpacks to {size} bytes, at most {self.limits.bytes} expected")
        if size > most_unpacked(self.packed, self.limits):
            text = f"{self.packed} bytes unpack to {size}, at most {self.limits.ratio} times expected"
            raise BatchRejected("too_large", text)

    def check_rows(self, rows: int) -> None:
        """Whether it may have so many samples."""
        if rows > self.limits.samples:
            raise BatchRejected("too_many_samples", f"x: {rows}, at most {self.limits.samples} expected")
