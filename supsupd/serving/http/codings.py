"""Content codings: how large a body becomes, told before it does, and packing and unpacking it."""

from __future__ import annotations

import io
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

from supsupd.serving.engine import EngineError
from supsupd.serving.oip.strict_json import ProtocolError

CODINGS = {"gzip": zlib.MAX_WBITS | 16, "deflate": zlib.MAX_WBITS}
"""Content codings and what zlib calls them; "deflate" is a zlib stream."""
MAX_RATIO, RATIO_MATTERS_FROM = 200, 16 << 20
"""What a body may unpack to, by its own size, unless it is harmless however well it packs."""
PIECE_BYTES = 1 << 18
"""What is unpacked, or looked at, in one step."""
FAST = 1
_BRAIN = b"BF16"


class TooMuch(EngineError):
    """A body that unpacks to more than it may."""

    status = 413


@dataclass(slots=True)
class Measure:
    """Bytes of a body once it is unpacked, and in its JSON: commas, and whether a tensor may be of half floats that no
    array has."""

    size: int = 0
    commas: int = 0
    is_brain: bool = False


def measure(body: bytes, coding: str, most: int, text_bytes: int | None) -> Measure:
    """What a body in `coding`, or "identity", comes to; nothing of it is kept.

    most: bytes that it may unpack to. text_bytes: how many of them are JSON; None: all. Raises TooMuch, ProtocolError.
    """
    found, tail = Measure(), b""
    for piece in _pieces(body, coding, most):
        text = piece if text_bytes is None else piece[: max(0, text_bytes - found.size)]
        found.size += len(piece)
        found.commas += text.count(b",")
        found.is_brain = found.is_brain or _BRAIN in tail + text
        tail = text[-len(_BRAIN) :]
    return found


def unpack(body: bytes, coding: str, most: int) -> bytes:
    """The body as it was before it was coded. Raises TooMuch, ProtocolError."""
    if coding == "identity":
        return body
    whole = io.BytesIO()
    for piece in _pieces(body, coding, most):
        whole.write(piece)
    return whole.getvalue()  # the same bytes, no copy


def pack(body: bytes, coding: str) -> bytes:
    """The body in this coding."""
    stream = zlib.compressobj(FAST, zlib.DEFLATED, CODINGS[coding])
    parts = [stream.compress(body[at : at + PIECE_BYTES]) for at in range(0, len(body), PIECE_BYTES)]
    return b"".join([*parts, stream.flush()])


def _pieces(body: bytes, coding: str, most: int) -> Iterator[bytes]:
    if coding == "identity":
        yield from (body[at : at + PIECE_BYTES] for at in range(0, len(body), PIECE_BYTES))
        return
    stream, size, at = zlib.decompressobj(CODINGS[coding]), 0, 0
    while at < len(body) and not stream.eof:
        packed, is_more = body[at : at + PIECE_BYTES], True
        at += len(packed)
        while is_more:
            try:
                piece = stream.decompress(packed, PIECE_BYTES)
            except zlib.error as error:
                raise ProtocolError(f"bad_request: the body is not {coding}: {error}") from None
            packed = stream.unconsumed_tail
            size += len(piece)
            _check(size, len(body), most)
            yield piece
            is_more = bool(packed) or len(piece) == PIECE_BYTES
    if not stream.eof or stream.unused_data or at < len(body):
        raise ProtocolError(f"bad_request: the body is not one whole stream of {coding}")


def _check(size: int, packed: int, most: int) -> None:
    if size > most:
        raise TooMuch(f"the body is larger than {most} bytes")
    if size > RATIO_MATTERS_FROM and size > packed * MAX_RATIO:
        raise TooMuch(f"the body unpacks to more than {MAX_RATIO} times its {packed} bytes")
