"""Masks as packed bits: bit i of a mask is bit i % 8 (from the lowest) of byte i // 8."""

import hashlib

import numpy as np


def pack(bits: np.ndarray) -> bytes:
    """Pack a flat boolean mask.

    bits: (n,) bool. Returns (n + 7) // 8 bytes whose padding is zero.
    Raises ValueError for another shape or type.
    """
    if bits.dtype != np.bool_ or bits.ndim != 1:
        raise ValueError(f"a mask is a flat array of bool, not {bits.dtype} of shape {bits.shape}")
    return np.packbits(bits, bitorder="little").tobytes()


def unpack(data: bytes, n: int) -> np.ndarray:
    """The (n,) bool mask that `pack` made `data` from.

    Raises ValueError unless `data` is exactly a packed mask of n bits.
    """
    check_packed(data, n)
    return np.unpackbits(np.frombuffer(data, np.uint8), count=n, bitorder="little").view(np.bool_)


def check_packed(data: bytes, n: int) -> None:
    """Raise ValueError unless `data` has the length of n bits and zero padding."""
    if n < 0 or len(data) != (n + 7) // 8:
        raise ValueError(f"{n} bits take {max(n + 7, 0) // 8} bytes, not {len(data)}")
    if n % 8 and data[-1] >> (n % 8):
        raise ValueError(f"the padding behind bit {n} is not zero")


def popcount(data: bytes) -> int:
    """The number of set bits."""
    return int(np.bitwise_count(np.frombuffer(data, np.uint8)).sum(dtype=np.int64))


def sha256(data: bytes) -> str:
    """The SHA-256 of `data` as 64 lower-case hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()
