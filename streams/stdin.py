"""Standard input as a source: one JSON object a line, or frames of bytes."""

import os
import select
import uuid
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress

from streams.batch import Arrival, BatchRejected, Item, Refusal, digest_of
from streams.broker import MAX_HELD_BYTES, MAX_UNACKNOWLEDGED, UNKNOWN_FORM, reason_of
from streams.formats import sniff
from streams.framing import MAGIC, Frames, Lines, told_by
from streams.names import printable, shortened
from streams.source import SourceUnavailable

_READ_BYTES = 1 << 18
_MAX_NAME = 256  # bytes
_MAX_IDENTITY = 4096


class StdinSource:
    """The `Source` of a pipe, by default standard input. Its first bytes say whether it is frames or JSON lines.

    It is read only as fast as its batches are acknowledged: a full pipe makes the sender wait. What was read and not
    acknowledged is lost with the process; a sender that gives its objects an "id" may send them all again.
    `form` is that of frames; None looks at their bytes.
    """

    def __init__(
        self, *, name: str = "stdin", fd: int = 0, form: str | None = None, max_batch_bytes: int = 256 << 20
    ) -> None:
        self.name = name
        self._fd = fd
        self._form = form
        self._limit = max_batch_bytes
        self._run = uuid.uuid4().hex[:12]  # positions of another process mean nothing
        self._splitter: Lines | Frames | None = None
        self._head = b""
        self._count = 0
        self._held: deque[Arrival | Refusal] = deque()
        self._ended = False
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._closed = False

    def iter_arrivals(self) -> Iterator[Item]:
        """What is held and what can be read now; nothing more once the input has ended."""
        last = -1
        while True:
            for item in list(self._held):
                if (number := _number(item)) > last and item in self._held:
                    last = number
                    yield item
            if not self._has_room() or not self._read():
                return

    def acknowledge(self, items: Sequence[Item]) -> None:
        done = {item.position for item in items}
        self._held = deque(item for item in self._held if item.position not in done)

    def postpone(self, item: Arrival) -> None:
        """Batches do not grow here."""
        raise AssertionError(f"{item.name} may not grow")

    def pending(self) -> int:
        return len(self._held)

    def problem(self) -> str | None:
        """Nothing ever: an input that has ended has said all it had to say."""
        return None

    def wait(self, timeout: float) -> None:
        watched = [self._wake_read] if self._ended or not self._has_room() else [self._wake_read, self._fd]
        ready, _, _ = select.select(watched, [], [], max(timeout, 0))
        if self._wake_read in ready:
            os.read(self._wake_read, 4096)

    def poke(self) -> None:
        with suppress(BlockingIOError, OSError):  # it is full of pokes, or closed
            os.write(self._wake_write, b"!")

    def close(self) -> None:
        """The input itself stays open: it is the process's own."""
        if not self._closed:
            self._closed = True
            os.close(self._wake_read)
            os.close(self._wake_write)

    def _has_room(self) -> bool:
        size = sum(len(item.payload) for item in self._held if isinstance(item, Arrival))
        return len(self._held) < MAX_UNACKNOWLEDGED and (size < MAX_HELD_BYTES or not self._held)

    def _read(self) -> bool:
        """Reads what is there now, at most one portion; False where there is nothing."""
        if self._splitter is not None and self._take(self._splitter):
            return True
        if self._ended or not select.select([self._fd], [], [], 0)[0]:
            return False
        try:
            data = os.read(self._fd, _READ_BYTES)
        except OSError as error:
            raise SourceUnavailable(f"{self.name}: {reason_of(error)}") from None
        self._ended = not data
        if self._splitter is None:
            self._head += data
            if MAGIC.startswith(self._head) and not self._ended:
                return True
            frames = self._head.startswith(MAGIC)
            self._splitter = Frames(self._limit) if frames else Lines(self._limit)
            data, self._head = self._head[len(MAGIC) :] if frames else self._head, b""
        self._splitter.feed(data)
        if self._ended:
            self._splitter.end()
        self._take(self._splitter)
        return True

    def _take(self, splitter: Lines | Frames) -> bool:
        """Holds the next batch that is whole, if there is one."""
        part = splitter.next()
        if part is None:
            return False
        self._count += 1
        name = f"{self.name}/{self._count}"
        try:
            if isinstance(part, BatchRejected):
                raise part
            self._held.append(self._arrival(part, name, told_by(part) if isinstance(splitter, Lines) else None))
        except BatchRejected as error:
            reason = printable(str(error))
            self._held.append(Refusal(self.name, name, error.code, reason, self.name, self._position()))
        return True

    def _arrival(self, part: bytes, name: str, told: dict[str, str] | None) -> Arrival:
        """told: what a line says of itself; None for a frame."""
        form, identity = (self._form, None) if told is None else ("json", told.get("id"))
        name = name if told is None else told.get("name", name)
        return Arrival(
            source=self.name,
            name=shortened(printable(name), _MAX_NAME),
            form=form or sniff(part) or UNKNOWN_FORM,
            sha256=digest_of(part),
            payload=part,
            key=self.name,
            position=self._position(),
            identity=None if identity is None else shortened(f"{self.name}:{printable(identity)}", _MAX_IDENTITY),
        )

    def _position(self) -> str:
        return f"{self._run}/{self._count}"


def _number(item: Arrival | Refusal) -> int:
    return int(item.position.rpartition("/")[2])
