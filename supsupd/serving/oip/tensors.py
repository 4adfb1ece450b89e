"""Tensors as the wire knows them: a datatype, a shape, and values as raw bytes or as JSON. Pure functions."""

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from supsupd.serving.oip.strict_json import ProtocolError

MAX_NAME = 64
MAX_DIMENSIONS = 8
LARGEST_SIZE = 2**31 - 1
DATATYPES = {
    "BOOL": np.dtype(np.bool_),
    "UINT8": np.dtype("u1"),
    "UINT16": np.dtype("<u2"),
    "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
    "INT8": np.dtype("i1"),
    "INT16": np.dtype("<i2"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "FP16": np.dtype("<f2"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
}
DATATYPE_OF = {dtype: name for name, dtype in DATATYPES.items()}
_LENGTH = struct.Struct("<I")


@dataclass(frozen=True, slots=True)
class Tensor:
    """A named array of the wire.

    data: an array of `shape`, of the dtype in DATATYPES, or float32 for BF16; for BYTES its elements, row-major.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: np.ndarray | list[bytes]

    @property
    def nbytes(self) -> int:
        """About how much there is to go through."""
        return sum(map(len, self.data)) if isinstance(self.data, list) else self.data.nbytes

    @property
    def elements(self) -> int:
        return len(self.data) if isinstance(self.data, list) else self.data.size


def from_raw(name: str, datatype: Any, shape: Any, raw: bytes | memoryview) -> Tensor:
    """A tensor of raw bytes: row-major, little-endian; BF16 as two bytes, an element of BYTES after its length.

    The array is a view of `raw` where it can be. Raises ProtocolError: bad_datatype, shape_mismatch.
    """
    shape = check_shape(name, shape)
    if datatype == "BYTES":
        return Tensor(name, datatype, shape, _split_bytes(name, math.prod(shape), raw))
    dtype = DATATYPES["UINT16"] if datatype == "BF16" else dtype_of(name, datatype, "BF16", "BYTES")
    wanted = math.prod(shape) * dtype.itemsize
    if len(raw) != wanted:
        raise ProtocolError(f"shape_mismatch: {datatype} {list(shape)} of {name} takes {wanted} bytes, {len(raw)} came")
    array = np.frombuffer(raw, dtype)
    if datatype == "BF16":  # the upper half of an FP32
        wide = array.astype("<u4")
        wide <<= 16
        array = wide.view("<f4")
    elif datatype == "BOOL" and array.view("u1").max() > 1:
        raise ProtocolError(f"bad_datatype: BOOL data of {name} must be bytes 0 or 1 only")
    return Tensor(name, datatype, shape, array.reshape(shape))


def to_raw(tensor: Tensor) -> bytes:
    """The same bytes again. BF16 takes the upper half of each float32, without rounding."""
    if isinstance(tensor.data, list):
        return b"".join(_LENGTH.pack(len(element)) + element for element in tensor.data)
    if tensor.datatype == "BF16":
        upper = np.ascontiguousarray(tensor.data, "<f4").view("<u4") >> 16
        return upper.astype("<u2").tobytes()
    return tensor.data.astype(DATATYPES[tensor.datatype], copy=False).tobytes()


def from_json(name: str, datatype: Any, shape: Any, data: list[Any]) -> Tensor:
    """A tensor of JSON values, flat and row-major or nested exactly as `shape` says.

    Raises ProtocolError: bad_datatype (BF16 and BYTES too, which come as raw bytes only), shape_mismatch.
    """
    shape = check_shape(name, shape)
    dtype = dtype_of(name, datatype)
    values, kinds = flatten(name, data, shape)
    return Tensor(name, datatype, shape, as_array(name, datatype, dtype, values, kinds).reshape(shape))


def to_json(tensor: Tensor) -> list[str] | np.ndarray:
    """The values, flat and row-major, for orjson; BYTES as text. Raises ValueError for what JSON has no number for."""
    if isinstance(tensor.data, list):
        return [element.decode() for element in tensor.data]
    if tensor.data.dtype.kind == "f" and not np.isfinite(tensor.data).all():
        raise ValueError(f"{tensor.name} is not finite")
    return np.ascontiguousarray(tensor.data).reshape(-1)


def check_shape(name: str, shape: Any) -> tuple[int, ...]:
    """1 to MAX_DIMENSIONS integers from 1 to LARGEST_SIZE, of a tensor whose name can be told. Raises ProtocolError."""
    if len(name) > MAX_NAME or not name.isprintable():
        raise ProtocolError(f"bad_request: a tensor's name must be up to {MAX_NAME} printable characters")
    if type(shape) not in (list, tuple) or not all(type(size) is int and 0 < size <= LARGEST_SIZE for size in shape):
        raise ProtocolError(
            f"shape_mismatch: the shape of {name} must be an array of integers from 1 to {LARGEST_SIZE}"
        )
    if not 1 <= len(shape) <= MAX_DIMENSIONS:
        raise ProtocolError(f"shape_mismatch: {name} has {len(shape)} axes, expected 1 to {MAX_DIMENSIONS}")
    return tuple(shape)


def dtype_of(name: str, datatype: Any, *others: str) -> np.dtype:
    """What the values of a datatype are in an array. Raises ProtocolError for one that is none, nor one of `others`."""
    dtype = DATATYPES.get(datatype) if type(datatype) is str else None
    if dtype is None:
        raise ProtocolError(f"bad_datatype: {name} must be one of " + ", ".join([*DATATYPES, *others]))
    return dtype


def _split_bytes(name: str, count: int, raw: bytes | memoryview) -> list[bytes]:
    elements: list[bytes] = []
    at = 0
    while at + _LENGTH.size <= len(raw) and len(elements) < count:
        start = at + _LENGTH.size
        at = start + _LENGTH.unpack_from(raw, at)[0]
        elements.append(bytes(raw[start:at]))
    if at != len(raw) or len(elements) != count:
        raise ProtocolError(f"shape_mismatch: {name} wants {count} elements, each after its length in 4 bytes")
    return elements


def flatten(name: str, data: list[Any], shape: Sequence[int]) -> tuple[list[Any], set[type]]:
    """The values of `data`, and of which types they are. Raises ProtocolError: shape_mismatch."""
    kinds = set(map(type, data))
    if list in kinds:
        for axis, size in enumerate(shape[1:], start=1):
            if kinds != {list} or any(len(row) != size for row in data):
                raise ProtocolError(
                    f"shape_mismatch: the data of {name} is not nested as its shape says on axis {axis}"
                )
            data = list(chain.from_iterable(data))
            kinds = set(map(type, data))
    if len(data) != math.prod(shape):
        raise miscounted(name, shape, len(data))
    return data, kinds


def miscounted(name: str, shape: Sequence[int], count: int) -> ProtocolError:
    """What is wrong with so many values for this shape."""
    return ProtocolError(
        f"shape_mismatch: shape {list(shape)} of {name} wants {math.prod(shape)} values, data has {count}"
    )


def as_array(name: str, datatype: str, dtype: np.dtype, values: list[Any], kinds: set[type]) -> np.ndarray:
    """Flat values, of these types, as an array. Raises ProtocolError: bad_datatype."""
    fitting: dict[str, set[type]] = {"b": {bool}, "f": {int, float}}
    allowed = fitting.get(dtype.kind, {int})
    if not kinds <= allowed:
        names = " or ".join(sorted(kind.__name__ for kind in allowed))
        raise ProtocolError(f"bad_datatype: {datatype} data of {name} must be {names} values only")
    try:
        with np.errstate(over="ignore"):
            return np.array(values, dtype=dtype)
    except OverflowError:
        raise ProtocolError(f"bad_datatype: a value of {name} does not fit in {datatype}") from None
