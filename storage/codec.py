"""Masks as they lie in the store: raw bits, or fewer bytes in the frozen Zstandard format (RFC 8878).

The bits of a mask are nearly independent, so that its bytes, or in a sparse mask the gaps between its set bits, are
symbols whose entropy code Zstandard has: canonical Huffman. What it costs and saves: docs/performance.md.
"""

import sys
from typing import Literal

import numpy as np

from storage import packing

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

Coding = Literal["zstd", "gaps"]
"""zstd: a frame of the bytes; gaps: a frame of what `gaps` makes of them."""

ESCAPE = 255
FRAME: dict[int, int] = {
    zstd.CompressionParameter.compression_level: 1,
    # Blocks of 16 KiB with a code of their own: layers differ in density.
    zstd.CompressionParameter.window_log: 14,
}


class Undecodable(ValueError):
    """Stored bytes that no mask was encoded to."""


def encode(bits: bytes) -> tuple[bytes, Coding | None]:
    """The packed bits in fewer bytes, and their coding; the bits themselves and None where that saves nothing."""
    coding: Coding = "zstd"
    symbols = bits
    if packing.popcount(bits) < len(bits) and len(steps := gaps(bits)) < len(bits):
        coding, symbols = "gaps", steps
    coded = zstd.compress(symbols, options=FRAME)
    return (coded, coding) if len(coded) < len(bits) else (bits, None)


def decode(data: bytes, coding: str | None, most: int) -> bytes:
    """The bits that `encode` was given; `data` itself where they are raw.

    Raises Undecodable where coded ones are not, or would be more than `most` bytes, before so many are made.
    """
    if coding is None:
        return data
    symbols = _decompress(data, most)
    if coding == "zstd":
        return symbols
    if coding == "gaps":
        return from_gaps(symbols, most)
    raise Undecodable(f"coding {coding!r} is unknown")


def gaps(bits: bytes) -> bytes:
    """How many zeros stand before each set bit, and before one more behind the last bit.

    A byte each; 255 says that as many zeros stand there, and more follow.
    """
    flags = np.unpackbits(np.frombuffer(bits, np.uint8), bitorder="little").view(np.bool_)
    zeros = np.diff(np.flatnonzero(flags), prepend=-1, append=len(flags)) - 1
    escapes, rest = np.divmod(zeros, ESCAPE)
    steps = np.full(len(zeros) + escapes.sum(), ESCAPE, np.uint8)
    steps[np.cumsum(escapes + 1) - 1] = rest
    return steps.tobytes()


def from_gaps(steps: bytes, most: int) -> bytes:
    """What `gaps` was given. Raises Undecodable unless there are such bits, in at most `most` bytes."""
    symbols = np.frombuffer(steps, np.uint8)
    ends = symbols != ESCAPE
    places = np.cumsum(symbols + ends, dtype=np.int64)[ends] - 1
    size = int(places[-1]) if len(places) and ends[-1] else -1
    if size % 8 or not 0 <= size <= 8 * most:
        raise Undecodable(f"the gaps do not end at the end of at most {most} bytes")
    flags = np.zeros(size, np.bool_)
    flags[places[:-1]] = True
    return np.packbits(flags, bitorder="little").tobytes()


def _decompress(data: bytes, most: int) -> bytes:
    try:
        size = zstd.get_frame_info(data).decompressed_size
        if size is None or size > most:
            raise Undecodable(f"a frame of {size} bytes where there are at most {most}")
        frame = zstd.ZstdDecompressor()
        symbols = frame.decompress(data, max_length=size)
    except zstd.ZstdError as error:
        raise Undecodable(str(error)) from error
    if not frame.eof or frame.unused_data:
        raise Undecodable("not one whole Zstandard frame")
    return symbols
