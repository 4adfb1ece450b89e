"""Long JSON: a tensor of numbers is read out of its text piece by piece, never as one Python object for each number."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson

from supsupd.serving.oip.strict_json import ProtocolError, parse_json_slowly, parse_object
from supsupd.serving.oip.tensors import Tensor, as_array, check_shape, dtype_of, flatten, miscounted

PIECE_BYTES = 1 << 16
"""Of text, that is read at once: well under a millisecond, and two megabytes of objects at most."""
MOST_STRINGS = 10_000
MOST_WORDS = 1 << 20
"""Bytes of JSON beside the numbers of a tensor."""
_OPENING = re.compile(rb"\[(?:[ \t\r\n]*\[)*")
_COMMA = re.compile(rb"[ \t\r\n]*,")
_BLANK = b" \t\r\n"


def parse_long_object(text: bytes) -> dict[str, Any]:
    """The JSON object in `text`, in whose inputs the data that are long are Numbers. Raises ProtocolError."""
    if (found := _long_numbers(text)) is None:
        if len(text) > MOST_WORDS:
            raise ProtocolError(f"bad_request: {len(text)} bytes of JSON, expected at most {MOST_WORDS} beside numbers")
        return parse_object(text)
    start, stop = found
    if len(text) - (stop - start) > MOST_WORDS:
        raise ProtocolError(f"bad_request: expected at most {MOST_WORDS} bytes of JSON beside the numbers of one input")
    before, after = text[:start], text[stop:]
    number = 0
    while (mark := f"numbers {number}").encode() in before or mark.encode() in after:
        number += 1
    request = parse_object(b'%b"%b"%b' % (before, mark.encode(), after))
    inputs = request.get("inputs")
    for told in inputs if type(inputs) is list else ():
        if type(told) is dict and told.get("data") == mark:
            told["data"] = Numbers(text, start, stop)
    return request


def _long_numbers(text: bytes) -> tuple[int, int] | None:
    """Where the first array is between whose brackets so much lies without a string; None: nowhere."""
    at, is_string = 0, False
    for _ in range(MOST_STRINGS):
        quote = text.find(b'"', at)
        end = len(text) if quote < 0 else quote
        if not is_string and end - at > PIECE_BYTES:
            start = text.find(b"[", at, end)
            brace = text.find(b"}", start, end)
            stop = text.rfind(b"]", start, end if brace < 0 else brace) + 1
            return (start, stop) if 0 <= start < stop else None
        if quote < 0:
            return None
        if not (is_string and _is_escaped(text, quote)):
            is_string = not is_string
        at = quote + 1
    return None


def _is_escaped(text: bytes, quote: int) -> bool:
    before = quote
    while text[before - 1] == ord("\\"):
        before -= 1
    return (quote - before) % 2 == 1


@dataclass(frozen=True, slots=True)
class Numbers:
    """The text of an array of numbers, from its first bracket to its last."""

    text: bytes
    start: int
    stop: int

    def tensor(self, name: str, datatype: Any, shape: Any) -> Tensor:
        """As `from_json` of what the text says. Raises ProtocolError."""
        shape = check_shape(name, shape)
        reading = _Reading(self.text, name, datatype, dtype_of(name, datatype))
        reading.check_count(self.start, self.stop, shape)
        opening = _OPENING.match(self.text, self.start, self.stop)
        assert opening is not None
        depth = opening.group().count(b"[")
        if depth not in (1, len(shape)):
            raise ProtocolError(f"shape_mismatch: the data of {name} is not nested as its shape says on axis 1")
        array = np.empty(math.prod(shape), reading.dtype)
        filled = reading.fill(array, self.start, self.stop, shape if depth > 1 else (len(array),))
        if filled != len(array):
            raise miscounted(name, shape, filled)
        return Tensor(name, datatype, shape, array.reshape(shape))


@dataclass(frozen=True, slots=True)
class _Reading:
    """One tensor's numbers, on their way from text into an array."""

    text: bytes
    name: str
    datatype: str
    dtype: np.dtype

    def check_count(self, start: int, stop: int, shape: tuple[int, ...]) -> None:
        """Raises ProtocolError, before there is an array, unless there are as many numbers as the shape says."""
        pieces = range(start, stop, PIECE_BYTES)
        count = 1 + sum(self.text.count(b",", at, min(stop, at + PIECE_BYTES)) for at in pieces)
        if count != math.prod(shape):
            raise miscounted(self.name, shape, count)

    def fill(self, out: np.ndarray, start: int, stop: int, shape: tuple[int, ...]) -> int:
        """Writes the numbers of the array from `start` to `stop`, nested as `shape` says, into `out`; how many."""
        filled, at, end = 0, start + 1, stop - 1
        while at <= end:
            part = self._part_end(at, end, len(shape))
            if len(shape) > 1 and part - at > 2 * PIECE_BYTES:  # a row that is long itself
                first = at + len(self.text[at:part]) - len(self.text[at:part].lstrip(_BLANK))
                if self.text[first : first + 1] != b"[":
                    raise self._not_nested(len(out.shape))
                filled += self.fill(out[filled:], first, part, shape[1:])
            else:
                values = self._values(at, part, shape[1:])
                if filled + len(values) > len(out):
                    raise self._not_nested(1)
                out[filled : filled + len(values)] = values
                filled += len(values)
            at = self._next(part, end)
        return filled

    def _part_end(self, at: int, end: int, depth: int) -> int:
        """Where some of what is left ends: numbers up to a comma, or whole rows; one that is long comes alone."""
        if end - at <= PIECE_BYTES:
            return end
        if depth == 1:
            comma = self.text.find(b",", at + PIECE_BYTES, end)
            return end if comma < 0 else comma
        closing = re.compile(rb"\](?:[ \t\r\n]*\]){%d}" % (depth - 2))
        found = closing.search(self.text, at + PIECE_BYTES // 2, end)
        if found is not None and found.end() - at > 2 * PIECE_BYTES:
            found = closing.search(self.text, at, end)
        return end if found is None else found.end()

    def _next(self, part: int, end: int) -> int:
        """Where it goes on behind a comma; behind the end if there is nothing more."""
        comma = _COMMA.match(self.text, part, end)
        if comma is not None:
            return comma.end()
        if self.text[part:end].strip(_BLANK):
            raise self._broken(part, part + 16)
        return end + 1

    def _values(self, at: int, part: int, row: tuple[int, ...]) -> np.ndarray:
        text = b"[%b]" % self.text[at:part]
        try:
            data = orjson.loads(text)
        except ValueError:
            data = None
        if not data:  # nothing between two commas is no number
            raise self._broken(at, part)
        values, kinds = flatten(self.name, data, (len(data), *row))
        return as_array(self.name, self.datatype, self.dtype, values, kinds)

    def _broken(self, at: int, part: int) -> ProtocolError:
        try:
            parse_json_slowly(b"[%b]" % self.text[at:part])
        except ProtocolError as error:
            return ProtocolError(f"{error} (of the data of {self.name} from byte {at} of the body)")
        return ProtocolError(f"bad_json: a value is missing in the data of {self.name}, from byte {at} of the body")

    def _not_nested(self, axis: int) -> ProtocolError:
        return ProtocolError(f"shape_mismatch: the data of {self.name} is not nested as its shape says on axis {axis}")
