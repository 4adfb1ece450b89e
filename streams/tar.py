"""Tar archives, read member by member without a file system: nothing is ever extracted, no link is followed.

The standard library's reader takes a damaged header for the end of the archive; here every byte is accounted for.
"""

import io
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from streams.batch import BatchRejected
from streams.names import printable

_BLOCK = 512
_END = bytes(_BLOCK)
_LONGEST_EXTENSION = 64 << 10  # bytes of an extended header
_LONGEST_NAME = 1024
_LONGEST_DIGITS = 5  # of a record's length in one
_FILES, _FOLDER = (b"0", b"\0"), b"5"
_SPECIAL = {b"1": "link", b"2": "symlink", b"3": "device", b"4": "device", b"6": "FIFO", b"S": "sparse file"}
_PAX, _PAX_FOR_ALL, _LONG_NAME, _LONG_LINK = b"x", b"g", b"L", b"K"


@dataclass(slots=True)
class _Extension:
    """What extended headers say of the member after them."""

    name: str | None = None
    size: int | None = None


@dataclass(slots=True)
class _Reader:
    payload: bytes
    at: int = 0
    extension: _Extension = field(default_factory=_Extension)

    def take(self, size: int) -> memoryview:
        """The next `size` bytes, and past the padding after them."""
        missing = self.at + size - len(self.payload)
        if missing > 0:
            raise BatchRejected("truncated", f"{missing} of {len(self.payload) + missing} bytes are missing")
        data = memoryview(self.payload)[self.at : self.at + size]
        self.at += -(-size // _BLOCK) * _BLOCK
        return data


def iter_files(payload: bytes) -> Iterator[tuple[str, memoryview]]:
    """Name and bytes of every regular file, in the archive's order; folders are passed over.

    Raises BatchRejected truncated, bad_format, trailing_bytes, not_regular or bad_member_name.
    """
    reader = _Reader(payload)
    names: set[str] = set()
    while (header := bytes(reader.take(_BLOCK))) != _END:
        _check_sum(header)
        kind = header[156:157]
        if kind in (_PAX, _PAX_FOR_ALL, _LONG_NAME, _LONG_LINK):
            _extend(reader, kind, _number(header[124:136]))
            continue
        extension, reader.extension = reader.extension, _Extension()
        name = _name(header) if extension.name is None else extension.name
        size = _number(header[124:136]) if extension.size is None else extension.size
        if kind in _SPECIAL:
            raise BatchRejected("not_regular", f"{printable(name)[:200]}: {_SPECIAL[kind]}, expected regular files")
        if kind == _FOLDER:
            continue
        if kind not in _FILES:
            raise BatchRejected("bad_format", f"{printable(name)[:200]}: a tar member of unknown type {kind!r}")
        _check_name(name, names)
        yield name, reader.take(size)
    if payload.count(0, reader.at) < len(payload) - reader.at:
        raise BatchRejected("trailing_bytes", f"{len(payload) - reader.at} bytes after the end of the tar")


def pack(members: Sequence[tuple[str, bytes]]) -> bytes:
    """An uncompressed tar of regular files, in the given order, without times and owners."""
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return target.getvalue()


def _check_sum(header: bytes) -> None:
    total = sum(header) - sum(header[148:156]) + 8 * ord(" ")
    if _number(header[148:156]) != total:
        raise BatchRejected("bad_format", "no tar: a member's header has a wrong checksum")


def _number(field: bytes) -> int:
    if field[:1] == b"\x80":  # GNU: base 256
        return int.from_bytes(field[1:], "big")
    text = field.rstrip(b"\0 ").lstrip(b" ") or b"0"
    if not text.isdigit() or b"8" in text or b"9" in text:
        raise BatchRejected("bad_format", "no tar: a member's header holds a malformed number")
    return int(text, 8)


def _name(header: bytes) -> str:
    name, prefix = header[:100].partition(b"\0")[0], b""
    if header[257:263] == b"ustar\0":
        prefix = header[345:500].partition(b"\0")[0]
    return _text(prefix + b"/" + name if prefix else name)


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "surrogateescape")


def _extend(reader: _Reader, kind: bytes, size: int) -> None:
    if size > _LONGEST_EXTENSION:
        raise BatchRejected("too_large", f"an extended header of {size} bytes, at most {_LONGEST_EXTENSION} expected")
    data = bytes(reader.take(size))
    if kind == _LONG_NAME:
        reader.extension.name = _text(data.rstrip(b"\0"))
    elif kind == _PAX:
        _read_pax(data, reader.extension)


def _read_pax(data: bytes, extension: _Extension) -> None:
    """Records "LENGTH KEY=VALUE\\n", where LENGTH counts all of the record."""
    at = 0
    while at < len(data):
        space = data.find(b" ", at, at + _LONGEST_DIGITS + 1)
        digits = data[at : max(space, at)]
        end = at + (int(digits) if digits.isdigit() else 0)
        key, equals, value = data[space + 1 : max(end - 1, space + 1)].partition(b"=")
        if space < 0 or end <= space or not equals or data[end - 1 : end] != b"\n":
            raise BatchRejected("bad_format", "no tar: a malformed extended header")
        if key == b"path":
            extension.name = _text(value)
        elif key == b"size":
            extension.size = int(value) if len(value) < 19 and value.isdigit() else -1
        elif key.startswith(b"GNU.sparse"):
            raise BatchRejected("not_regular", "sparse file, expected regular files")
        if extension.size == -1:
            raise BatchRejected("bad_format", "no tar: a malformed size in an extended header")
        at = end


def _check_name(name: str, names: set[str]) -> None:
    unsafe = name.startswith("/") or ".." in name.split("/")
    if unsafe or not name.isprintable() or not 0 < len(name) <= _LONGEST_NAME:
        raise BatchRejected("bad_member_name", f"{printable(name)[:200]}: no safe relative name")
    if name in names:
        raise BatchRejected("bad_member_name", f"two members are called {printable(name)[:200]}")
    names.add(name)
