"""A flow of bytes cut into batches: by newlines, or by lengths."""

import json
import re
from contextlib import suppress

from streams.batch import BatchRejected
from streams.names import printable

MAGIC = b"SUPSUPD1"
"""What a flow of frames begins with; each frame is its length, 4 bytes, big-endian, and so many bytes."""

_LENGTH = 4
_TOKENS = re.compile(rb'"(?:[^"\\]|\\.)*+"?|[][{}]')  # a text that does not end is one token: nothing is read twice
_VALUE = re.compile(rb'\s*:\s*("(?:[^"\\]|\\.)*+"|[^"\s,}]+)')
_INTEGER = re.compile(rb"-?[0-9]+")
_TOLD = ("name", "id")
_LONGEST_KEY = len(r'"\u006e\u0061\u006d\u0065"')


class Frames:
    """Bytes in, frames out."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._buffer = bytearray()
        self._length: int | None = None
        self._skip = 0
        self._ended = False

    def feed(self, data: bytes) -> None:
        skipped = min(self._skip, len(data))
        self._skip -= skipped
        self._buffer += memoryview(data)[skipped:]

    def end(self) -> None:
        self._ended = True

    def next(self) -> bytes | BatchRejected | None:
        if self._skip and self._ended:
            self._skip = 0
        if self._length is None:
            if len(self._buffer) < _LENGTH:
                return self._cut(_LENGTH) if self._buffer else None
            self._length = int.from_bytes(self._buffer[:_LENGTH], "big")
            del self._buffer[:_LENGTH]
        length = self._length
        if length > self._limit:
            self._length = None
            dropped = min(length, len(self._buffer))
            del self._buffer[:dropped]
            self._skip = length - dropped
            return BatchRejected("too_large", f"a frame of {length} bytes, at most {self._limit} expected")
        if len(self._buffer) < length:
            return self._cut(length)
        self._length = None
        frame = bytes(self._buffer[:length])
        del self._buffer[:length]
        return frame

    def _cut(self, expected: int) -> BatchRejected | None:
        if not self._ended:
            return None
        found = len(self._buffer)
        self._buffer.clear()
        self._length = None
        return BatchRejected("truncated", f"the input ended after {found} of {expected} bytes")


class Lines:
    """Bytes in, lines out; an empty line is none."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._buffer = bytearray()
        self._searched = 0
        self._skipping = False
        self._ended = False

    def feed(self, data: bytes) -> None:
        if self._skipping:
            _, newline, data = data.partition(b"\n")
            self._skipping = not newline
        self._buffer += data

    def end(self) -> None:
        self._ended = True

    def next(self) -> bytes | BatchRejected | None:
        while (found := self._buffer.find(b"\n", self._searched)) >= 0:
            line = bytes(memoryview(self._buffer)[:found])
            del self._buffer[: found + 1]
            self._searched = 0
            if len(line) > self._limit:
                return self._too_long(len(line))
            if line.strip():
                return line
        self._searched = len(self._buffer)
        if self._searched > self._limit:
            self._buffer.clear()
            self._searched, self._skipping = 0, True
            return self._too_long(None)
        return self._last() if self._ended and self._buffer.strip() else None

    def _too_long(self, length: int | None) -> BatchRejected:
        given = "more" if length is None else f"{length} bytes"
        return BatchRejected("too_large", f"a line of {given}, at most {self._limit} bytes expected")

    def _last(self) -> bytes | BatchRejected:
        """What stands behind the last newline."""
        line = bytes(self._buffer)
        self._buffer.clear()
        self._searched = 0
        if is_closed(line):
            return line
        return BatchRejected("truncated", f"the input ended within a line, after {len(line)} bytes")


def is_closed(line: bytes) -> bool:
    """Whether as many brackets are closed as were opened, and that at its end; for a line of JSON."""
    depth = 0
    for token in _TOKENS.finditer(line):
        depth += {b"{": 1, b"[": 1, b"}": -1, b"]": -1}.get(token[0], 0)
    return depth == 0 and line.rstrip().endswith(b"}")


def told_by(line: bytes) -> dict[str, str]:
    """The outer "name" and "id" of a JSON object, without reading the numbers in it: those are for the decoder.

    Raises BatchRejected for one that is neither a string nor an integer: passed over, it would protect from nothing.
    """
    told: dict[str, str] = {}
    depth = 0
    for token in _TOKENS.finditer(line):
        if token[0] in b"{[":
            depth += 1
        elif token[0] in b"}]":
            depth -= 1
        elif depth == 1 and (key := _key_of(token[0])) and (value := _VALUE.match(line, token.end())):
            told.pop(key, None)
            if (text := _told(key, value[1])) is not None:
                told[key] = text
    return told


def _key_of(token: bytes) -> str | None:
    """One of those that tell something, however it is written."""
    if len(token) > _LONGEST_KEY:
        return None
    with suppress(ValueError):
        text = str(json.loads(token))
        return text if text in _TOLD else None
    return None


def _told(key: str, value: bytes) -> str | None:
    """None for null, and for what is no JSON: the decoder says where. Raises BatchRejected for another type."""
    if value.startswith(b'"'):
        with suppress(ValueError):
            return str(json.loads(value))
    elif _INTEGER.fullmatch(value):
        return value.decode()
    elif value != b"null":
        shown = printable(value[:20].decode("ascii", "replace"))
        raise BatchRejected("bad_format", f'"{key}" is {shown}, expected a string or an integer')
    return None
