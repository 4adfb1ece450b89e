"""numpy's files: an .npy array x, or an .npz archive with `x` (n, ...) and optionally `y` (n,) and `task`.

Every size is checked before memory is taken for it, and nothing is ever unpickled.
"""

import io
import struct
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from streams import arrays
from streams.batch import Batch, BatchRejected
from streams.budget import Budget
from streams.names import printable
from streams.npy import Buffer, check_size, read_array, read_header
from streams.reading import Limits, Reading

_LOCAL, _END, _ZIP64 = b"PK\x03\x04", b"PK\x05\x06", b"PK\x06\x07"
_ENCRYPTED = 1
_LOCAL_BYTES = 30  # of a member's own header, before its name and extra fields
_LENGTHS, _LENGTHS_AT = struct.Struct("<HH"), 26  # of both, in that header
_CHUNK = 1 << 20  # bytes inflated at a time
_PIECE = 1 << 16  # bytes handed to the inflater at a time: it copies what it leaves
_END_RECORD = struct.Struct("<4s4H2LH")
_LONGEST_ENTRY = 1 << 10  # bytes of one member in the central directory: 46, its name and extra fields
_SMALL = 4 * arrays.MAX_LABEL_CHARACTERS << 20  # bytes; more than any y that is merely cut off
_X, _Y, _TASK = "x.npy", "y.npy", "task.npy"


def decode_npz(payload: bytes, reading: Reading, budget: Budget) -> Batch:
    """Members other than x and y are not looked at, `task` only if asked for."""
    _check_ends(payload, reading.limits)
    with _damage_is_refused(), zipfile.ZipFile(io.BytesIO(payload)) as archive:
        members = _check_members(archive.infolist(), reading.limits, budget)
        x = _read_x(_unpack(payload, members[_X]), budget)
        y = _read_y(_unpack(payload, members[_Y]), len(x), budget) if _Y in members else None
        told = reading.with_task and _TASK in members
        task = _read_task(_unpack(payload, members[_TASK]), len(x)) if told else None
    return Batch(x, y, task)


def decode_npy(payload: bytes, reading: Reading, budget: Budget) -> Batch:
    """One array x, without labels."""
    return Batch(_read_x(payload, budget), None)


def encode(batch: Batch) -> bytes:
    """The canonical .npz bytes of a batch: equal arrays give equal bytes, on any day and machine."""
    task = None if batch.task is None else np.array([batch.task])
    members = ((_X, batch.x), (_Y, batch.y), (_TASK, task))
    return _pack([(name, _npy(array)) for name, array in members if array is not None])


def pack_pair(x: bytes, y: bytes | None) -> bytes:
    """The .npz of two .npy files; parses nothing, and equal files give equal bytes."""
    return _pack([(_X, x)] if y is None else [(_X, x), (_Y, y)])


def _pack(members: Sequence[tuple[str, bytes | memoryview]]) -> bytes:
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
        for name, data in members:
            with archive.open(zipfile.ZipInfo(name), "w") as member:
                member.write(data)
    return target.getvalue()


def _npy(array: np.ndarray) -> memoryview:
    target = io.BytesIO()
    np.lib.format.write_array(target, np.ascontiguousarray(array), allow_pickle=False)
    return target.getbuffer()


@contextmanager
def _damage_is_refused() -> Iterator[None]:
    """zipfile reports damage through many exceptions; all of them mean that this is no readable archive."""
    try:
        yield
    except BatchRejected:
        raise
    except (
        zipfile.BadZipFile,
        zlib.error,
        struct.error,
        EOFError,
        OSError,
        OverflowError,
        NotImplementedError,
        ValueError,
    ) as error:
        raise BatchRejected("bad_format", f"damaged zip: {printable(str(error))[:200]}") from error


def _check_ends(payload: bytes, limits: Limits) -> None:
    """Both ends of the archive, before zipfile reads a list of members that could be of any length."""
    if not payload.startswith((_LOCAL[: len(payload)], _END)):
        raise BatchRejected("bad_format", f"not a zip: starts with {payload[:6]!r}, expected an .npz archive")
    at = payload.rfind(_END, -(_END_RECORD.size + 0xFFFF))
    if at < 0 or at + _END_RECORD.size > len(payload):
        raise BatchRejected("truncated", f"{len(payload)} bytes, the end of the zip is missing")
    *_, members, size, offset, comment = _END_RECORD.unpack_from(payload, at)
    missing = at + _END_RECORD.size + comment - len(payload)
    if missing > 0:
        raise BatchRejected("truncated", f"{missing} bytes are missing at the end of the zip")
    if missing < 0:
        raise BatchRejected("trailing_bytes", f"{-missing} bytes after the end of the zip")
    if payload[at - 20 : at - 16] == _ZIP64 or members > limits.members or size > limits.members * _LONGEST_ENTRY:
        raise BatchRejected("too_large", f"{members} members in {size} bytes, at most {limits.members} expected")
    if offset + size != at:
        raise BatchRejected("bad_format", "the zip's list of members is not where its end record says")


def _check_members(infos: list[zipfile.ZipInfo], limits: Limits, budget: Budget) -> dict[str, zipfile.ZipInfo]:
    if len(infos) > limits.members:
        raise BatchRejected("too_large", f"{len(infos)} members, at most {limits.members} expected")
    members: dict[str, zipfile.ZipInfo] = {}
    for info in infos:
        name = info.orig_filename  # zipfile cuts `filename` at a NUL
        _check_name(name)
        if name in members:
            raise BatchRejected("bad_member_name", f"two members are called {printable(name)}")
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or info.flag_bits & _ENCRYPTED:
            raise BatchRejected("bad_format", f"{printable(name)}: neither stored nor deflated, or encrypted")
        members[name] = info
    # Counted over the whole archive: members that overlap in the file gain nothing.
    budget.check(sum(info.file_size for info in infos))
    if _X not in members:
        if any(name.endswith(".pkl") for name in members):
            raise BatchRejected("forbidden_pickle", "an archive of pickles, expected an .npz with a member x")
        names = ", ".join(printable(name) for name in members)[:200] or "no members"
        raise BatchRejected("bad_format", f"no member x: found {names}")
    return members


def _check_name(name: str) -> None:
    unsafe = name.startswith("/") or ".." in name.split("/") or "\\" in name or ":" in name
    if unsafe or not name.isprintable() or not 0 < len(name) <= 255:
        raise BatchRejected("bad_member_name", f"{printable(name)[:200]}: no safe relative name")


def _unpack(payload: bytes, info: zipfile.ZipInfo) -> bytearray | memoryview:
    """The bytes of a member; never more than it says, and only as they come. Raises BatchRejected bad_format."""
    name_length, extra_length = _LENGTHS.unpack_from(payload, info.header_offset + _LENGTHS_AT)
    start = info.header_offset + _LOCAL_BYTES + name_length + extra_length
    packed = memoryview(payload)[start : start + info.compress_size]
    data = packed if info.compress_type == zipfile.ZIP_STORED else _inflate(packed, info.file_size)
    if len(data) != info.file_size or zlib.crc32(data) != info.CRC:
        raise BatchRejected("bad_format", f"{info.filename}: damaged, its length or CRC is another")
    return data


def _inflate(packed: memoryview, size: int) -> bytearray:
    """What the deflated bytes hold; more than `size` bytes only in that the last chunk may reach beyond it."""
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    data = bytearray()
    for at in range(0, len(packed), _PIECE):
        piece: Buffer = packed[at : at + _PIECE]
        while True:
            chunk = inflater.decompress(piece, _CHUNK)
            data += chunk
            if inflater.eof or len(data) > size:
                return data
            if len(chunk) < _CHUNK:  # nothing of the piece is left
                break
            piece = inflater.unconsumed_tail
    return data


def _read_x(data: Buffer, budget: Budget) -> np.ndarray:
    header = read_header(data, "x")
    if header.dtype.kind in "fiub":  # else the type is the better reason
        check_size(header, len(data), budget.limits.bytes, "x")
    arrays.check_x_claim(header.dtype, header.shape, budget)
    budget.take(header.claimed)
    return arrays.finite(read_array(data, header))


def _read_y(data: Buffer, samples: int, budget: Budget) -> np.ndarray:
    header = read_header(data, "y")
    arrays.check_y_claim(header.dtype, header.shape, samples)
    check_size(header, len(data), _SMALL, "y")
    budget.take(header.claimed if header.dtype.kind == "U" else arrays.INTEGER_BYTES * samples)
    return arrays.labels(read_array(data, header))


def _read_task(data: Buffer, samples: int) -> str:
    """The one value of `task`, a scalar or (1,), or (n,) for all samples."""
    header = read_header(data, "task")
    arrays.check_task_claim(header.dtype, header.shape, samples)
    check_size(header, len(data), _SMALL, "task")
    return arrays.one_task(read_array(data, header))
