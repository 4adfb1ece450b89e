"""Bytes to Batch and back: an .npz archive with `x` (n, ...) and optionally `y` (n,) and `task`.

Every size is checked before memory is taken for it, and nothing is ever unpickled.
"""

import io
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from streams.batch import Batch, BatchRejected
from streams.names import printable
from streams.npy import Header, check_size, read_array, read_header

MAX_LABEL_CHARACTERS = 256
MAX_TASK_CHARACTERS = 255
RATIO_MATTERS_FROM = 16 << 20  # bytes; a smaller archive is harmless however well it packs

_LOCAL, _END, _ZIP64 = b"PK\x03\x04", b"PK\x05\x06", b"PK\x06\x07"
_END_RECORD = struct.Struct("<4s4H2LH")
_LONGEST_ENTRY = 1 << 10  # bytes of one member in the central directory: 46, its name and extra fields


@dataclass(frozen=True, slots=True)
class Limits:
    """What one batch may claim. `bytes` counts the unpacked members, `ratio` is unpacked to packed."""

    bytes: int = 512 << 20
    members: int = 64
    ratio: int = 200
    samples: int = 1_000_000
    pixels: int = 1 << 24  # of one image


_DEFAULTS = Limits()


def decode(payload: bytes, limits: Limits = _DEFAULTS, with_task: bool = False) -> Batch:
    """Read the bytes of an .npz file; raises only BatchRejected.

    Members other than x and y are not looked at, `task` only if asked for.
    """
    _check_ends(payload, limits)
    with _damage_is_refused(), zipfile.ZipFile(io.BytesIO(payload)) as archive:
        members = _check_members(archive.infolist(), len(payload), limits)
        x = _read_x(archive, members["x.npy"], limits)
        y = _read_y(archive, members["y.npy"], len(x)) if "y.npy" in members else None
        told = with_task and "task.npy" in members
        task = _read_task(archive, members["task.npy"], len(x)) if told else None
    return Batch(x, y, task)


def encode(batch: Batch) -> bytes:
    """The canonical .npz bytes of a batch: equal arrays give equal bytes, on any day and machine."""
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
        task = None if batch.task is None else np.array([batch.task])
        for name, array in (("x.npy", batch.x), ("y.npy", batch.y), ("task.npy", task)):
            if array is not None:
                with archive.open(zipfile.ZipInfo(name), "w") as member:
                    np.lib.format.write_array(member, np.ascontiguousarray(array), allow_pickle=False)
    return target.getvalue()


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
        RuntimeError,  # an encrypted member; NotImplementedError is one too
        ValueError,
    ) as error:
        raise BatchRejected("bad_format", f"damaged zip: {printable(str(error))[:200]}") from error


def _check_ends(payload: bytes, limits: Limits) -> None:
    """Both ends of the archive, before zipfile reads a list of members that could be of any length."""
    if not payload:
        raise BatchRejected("truncated", "0 bytes")
    if payload[:1] == b"\x80" and payload[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        raise BatchRejected("forbidden_pickle", "a pickle, expected an .npz archive")
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


def _check_members(infos: list[zipfile.ZipInfo], packed: int, limits: Limits) -> dict[str, zipfile.ZipInfo]:
    if len(infos) > limits.members:
        raise BatchRejected("too_large", f"{len(infos)} members, at most {limits.members} expected")
    members: dict[str, zipfile.ZipInfo] = {}
    for info in infos:
        name = info.orig_filename  # zipfile cuts `filename` at a NUL
        _check_name(name)
        if name in members:
            raise BatchRejected("bad_member_name", f"two members are called {printable(name)}")
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise BatchRejected("bad_format", f"{printable(name)}: neither stored nor deflated")
        members[name] = info
    _check_total(sum(info.file_size for info in infos), packed, limits)
    if "x.npy" not in members:
        if any(name.endswith(".pkl") for name in members):
            raise BatchRejected("forbidden_pickle", "an archive of pickles, expected an .npz with a member x")
        names = ", ".join(printable(name) for name in members)[:200] or "no members"
        raise BatchRejected("bad_format", f"no member x: found {names}")
    return members


def _check_name(name: str) -> None:
    unsafe = name.startswith("/") or ".." in name.split("/") or "\\" in name or ":" in name
    if unsafe or not name.isprintable() or not 0 < len(name) <= 255:
        raise BatchRejected("bad_member_name", f"{printable(name)[:200]}: no safe relative name")


def _check_total(total: int, packed: int, limits: Limits) -> None:
    # Counted over the whole archive: members that overlap in the file gain nothing.
    if total > limits.bytes:
        raise BatchRejected("too_large", f"unpacks to {total} bytes, at most {limits.bytes} expected")
    if total > RATIO_MATTERS_FROM and total > packed * limits.ratio:
        raise BatchRejected("too_large", f"{packed} bytes unpack to {total}, at most {limits.ratio} times expected")


def _read_x(archive: zipfile.ZipFile, info: zipfile.ZipInfo, limits: Limits) -> np.ndarray:
    with archive.open(info) as stream:
        header = read_header(stream, "x")
        if header.dtype.kind not in "fiub" or header.dtype.itemsize > 8:
            raise BatchRejected("bad_dtype", f"x: {header.dtype}, expected float16/32/64, integers or bool")
        check_size(header, info.file_size, "x")
        if not 2 <= len(header.shape) <= 4 or 0 in header.shape:
            raise BatchRejected("bad_shape", f"x: {header.shape}, expected (n, d), (n, H, W) or (n, H, W, C), n >= 1")
        if header.shape[0] > limits.samples:
            raise BatchRejected("too_many_samples", f"x: {header.shape[0]}, at most {limits.samples} expected")
        x = read_array(stream, header)
    _check_finite(x)
    return x


def _check_finite(x: np.ndarray) -> None:
    if x.dtype.kind != "f":
        return
    bad = np.flatnonzero(~np.isfinite(x))
    if len(bad):
        first = tuple(int(i) for i in np.unravel_index(bad[0], x.shape))
        raise BatchRejected("non_finite", f"x: {len(bad)} of {x.size} values are NaN or infinite, the first at {first}")


def _read_y(archive: zipfile.ZipFile, info: zipfile.ZipInfo, samples: int) -> np.ndarray:
    with archive.open(info) as stream:
        header = read_header(stream, "y")
        _check_labels(header, samples)
        check_size(header, info.file_size, "y")
        y = read_array(stream, header)
    if y.dtype.kind == "U":
        return _check_text(y, "bad_labels", "y")
    if y.dtype == np.uint64 and y.max() > np.iinfo(np.int64).max:
        raise BatchRejected("bad_labels", f"y: {y.max()} does not fit into int64")
    return y.astype(np.int64)


def _check_labels(header: Header, samples: int) -> None:
    if header.dtype.kind not in "iuU":
        raise BatchRejected("bad_labels", f"y: {header.dtype}, expected integers or strings")
    if header.shape != (samples,):
        raise BatchRejected("bad_labels", f"y: shape {header.shape}, expected ({samples},) as x has {samples} samples")
    if header.dtype.kind == "U" and not 0 < header.dtype.itemsize <= 4 * MAX_LABEL_CHARACTERS:
        raise BatchRejected("bad_labels", f"y: strings of 1 to {MAX_LABEL_CHARACTERS} characters expected")


def _read_task(archive: zipfile.ZipFile, info: zipfile.ZipInfo, samples: int) -> str:
    """The one value of `task`, a scalar or (1,), or (n,) for all samples; an integer becomes its decimal digits."""
    with archive.open(info) as stream:
        header = read_header(stream, "task")
        if header.dtype.kind not in "iuU" or header.shape not in ((), (1,), (samples,)):
            raise BatchRejected(
                "bad_task",
                f"task: {header.dtype} of shape {header.shape}, expected one integer or string, or ({samples},) of it",
            )
        if header.dtype.kind == "U" and not 0 < header.dtype.itemsize <= 4 * MAX_TASK_CHARACTERS:
            raise BatchRejected("bad_task", f"task: expected 1 to {MAX_TASK_CHARACTERS} characters")
        check_size(header, info.file_size, "task")
        values = read_array(stream, header).reshape(-1)
    if values.dtype.kind == "U":
        _check_text(values, "bad_task", "task")
    found = np.unique(values)
    if len(found) > 1:
        raise BatchRejected("bad_task", f"task: {len(found)} different ones, expected one for the whole batch")
    task = str(found[0])
    if not task or not task.isprintable():
        raise BatchRejected("bad_task", f"task: {printable(task)!r}, expected 1 or more printable characters")
    return task


def _check_text(values: np.ndarray, code: str, where: str) -> np.ndarray:
    """numpy takes any 32 bits for a character; only real ones can be compared, stored and sent."""
    points = values.view(np.uint32)
    bad = np.count_nonzero((points > 0x10FFFF) | ((points >= 0xD800) & (points <= 0xDFFF)))
    if bad:
        raise BatchRejected(code, f"{where}: {bad} characters are not Unicode")
    return values
