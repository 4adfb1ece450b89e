"""The .npy format, read so that nothing a header claims is believed before it is checked."""

import ast
import math
import struct
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from streams.batch import BatchRejected

MAX_HEADER_BYTES = 10_000
MAX_DIMENSIONS = 32
MAX_LENGTH = (1 << 63) - 1  # of one dimension
_MAGIC = b"\x93NUMPY"
_LENGTHS = {b"\x01\x00": ("<H", "latin1"), b"\x02\x00": ("<I", "latin1"), b"\x03\x00": ("<I", "utf-8")}
Buffer: TypeAlias = bytes | bytearray | memoryview


@dataclass(frozen=True, slots=True)
class Header:
    """What an .npy header says; `size` is its own length in bytes, `claimed` that of the data announced."""

    dtype: np.dtype
    shape: tuple[int, ...]
    fortran_order: bool
    size: int

    @property
    def claimed(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def read_header(data: Buffer, where: str) -> Header:
    """The header of array `where`; raises BatchRejected truncated/bad_header/bad_shape/forbidden_pickle."""
    text, size = _read_text(data, where)
    try:
        fields = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise BatchRejected("bad_header", f"{where}: the header is not a Python literal") from error
    if not isinstance(fields, dict) or fields.keys() != {"descr", "fortran_order", "shape"}:
        raise BatchRejected("bad_header", f"{where}: expected the keys descr, fortran_order and shape")
    if not isinstance(fields["fortran_order"], bool):
        raise BatchRejected("bad_header", f"{where}: fortran_order is neither True nor False")
    dtype = _parse_dtype(fields["descr"], where)
    return Header(dtype, _parse_shape(fields["shape"], where), fields["fortran_order"], size)


def check_size(header: Header, size: int, limit: int, where: str) -> None:
    """Header and data must fill the `size` bytes exactly; raises BatchRejected truncated, trailing_bytes, bad_shape.

    What claims over `limit` bytes is a lie rather than cut off.
    """
    have = size - header.size
    if header.claimed > max(have, limit):
        raise BatchRejected("bad_shape", f"{where}: header claims {header.claimed} bytes, there are {have}")
    if header.claimed > have:
        raise BatchRejected("truncated", f"{where}: expected {header.claimed} bytes after the header, got {have}")
    if header.claimed < have:
        raise BatchRejected("trailing_bytes", f"{where}: {have - header.claimed} bytes after the array's end")


def read_array(data: Buffer, header: Header) -> np.ndarray:
    """The data after a checked header: contiguous, writable, of native byte order; a bytearray is not copied."""
    array = np.frombuffer(data, header.dtype, math.prod(header.shape), header.size)
    array = array.reshape(header.shape, order="F" if header.fortran_order else "C")
    if header.dtype.kind == "b":
        array = array.view(np.uint8) != 0  # a byte other than 0 and 1 is no valid bool
    return np.require(array, array.dtype.newbyteorder("="), ["C", "W"])


def _read_text(data: Buffer, where: str) -> tuple[str, int]:
    start = bytes(data[: len(_MAGIC) + 2])
    if len(start) < len(_MAGIC) + 2 and _MAGIC.startswith(start[:6]):
        raise BatchRejected("truncated", f"{where}: {len(start)} bytes, the header is cut off")
    if start[:6] != _MAGIC or start[6:] not in _LENGTHS:
        raise BatchRejected("bad_header", f"{where}: expected an .npy array of version 1, 2 or 3")
    code, encoding = _LENGTHS[start[6:]]
    begin = len(start) + struct.calcsize(code)
    if len(data) < begin:
        raise BatchRejected("truncated", f"{where}: the header's length is cut off")
    (length,) = struct.unpack_from(code, data, len(start))
    if length > MAX_HEADER_BYTES:
        raise BatchRejected("bad_header", f"{where}: a header of {length} bytes, at most {MAX_HEADER_BYTES} expected")
    raw = bytes(data[begin : begin + length])
    if len(raw) != length:
        raise BatchRejected("truncated", f"{where}: expected a header of {length} bytes, got {len(raw)}")
    return raw.decode(encoding, "replace"), begin + length


def _parse_dtype(descr: Any, where: str) -> np.dtype:
    if not isinstance(descr, str | list):  # np.dtype(None) would be float64
        raise BatchRejected("bad_header", f"{where}: the dtype is given as a {type(descr).__name__}")
    try:
        dtype = np.dtype(descr)
    except (TypeError, ValueError, SyntaxError, OverflowError, RecursionError) as error:
        raise BatchRejected("bad_header", f"{where}: numpy knows no such dtype") from error
    if dtype.hasobject:
        raise BatchRejected("forbidden_pickle", f"{where}: an object array would have to be unpickled")
    return dtype


def _parse_shape(shape: Any, where: str) -> tuple[int, ...]:
    if not isinstance(shape, tuple) or not all(type(n) is int and 0 <= n <= MAX_LENGTH for n in shape):
        raise BatchRejected("bad_shape", f"{where}: expected a shape of integers from 0 to {MAX_LENGTH}")
    if len(shape) > MAX_DIMENSIONS:
        raise BatchRejected("bad_shape", f"{where}: {len(shape)} dimensions, at most {MAX_DIMENSIONS} expected")
    return shape
