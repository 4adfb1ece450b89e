"""Masks as an entropy coder stores them: what a mask costs on a disk or a wire, not what it costs in memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import constriction
import numpy as np

WORD = np.dtype("<u4")


def encode(masks: Sequence[np.ndarray]) -> bytes:
    """Bool arrays of any shape: how many bits of each are set, as 32-bit words, then the bits by an ANS coder (Duda
    2009) with each array's own share of set bits as its model."""
    coder = constriction.stream.stack.AnsCoder()
    for mask in reversed(masks):
        bits = mask.reshape(-1)
        if (model := _model(int(bits.sum()), bits.size)) is not None:
            coder.encode_reverse(bits.astype(np.int32), model)
    counts = np.array([int(mask.sum()) for mask in masks], WORD)
    return counts.tobytes() + coder.get_compressed().astype(WORD).tobytes()


def decode(data: bytes, shapes: Sequence[tuple[int, ...]]) -> list[np.ndarray]:
    """The arrays that `encode` took."""
    words = np.frombuffer(data, WORD)
    coder = constriction.stream.stack.AnsCoder(words[len(shapes) :].astype(np.uint32))
    masks = []
    for shape, count in zip(shapes, words[: len(shapes)].tolist(), strict=True):
        size = int(np.prod(shape))
        model = _model(count, size)
        bits = np.full(size, count > 0) if model is None else coder.decode(model, size).astype(bool)
        masks.append(bits.reshape(shape))
    return masks


def _model(count: int, size: int) -> Any:
    """None where all bits are alike: they cost nothing."""
    return constriction.stream.model.Bernoulli(count / size, perfect=False) if 0 < count < size else None
