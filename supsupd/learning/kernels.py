"""Logits of few samples under every mask, straight from the packed bits (Numba, no dense weights anywhere).

For each group of 8 inputs a table holds the sums of all 256 subsets. A row's masked sum is then one look-up per byte
for the kept positive weights and one for the kept negative ones. The tables are shared by all rows of all masks, so
a mask costs two look-ups per byte of it. `inference.reference_logits` is the slow, obvious equal.

The kernels release the GIL and are spread over plain threads: Numba's own parallel layer may not be entered from two
threads at once where only its workqueue is available.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import cast

import numba
import numpy as np

CHUNK = 64  # masks per thread task: about 5 ms of work on LeNet 300-100


def _compiled(function: Callable[..., None]) -> Callable[..., None]:
    """Compiled at the first call, and kept on disk where there is a place for it."""
    try:
        return cast(Callable[..., None], numba.njit(nogil=True, cache=True)(function))
    except RuntimeError:  # neither this folder nor the user's cache can be written
        return cast(Callable[..., None], numba.njit(nogil=True)(function))


@_compiled
def _fill_tables(values: np.ndarray, table: np.ndarray) -> None:
    """table[g, b] = sum of values[8 g + i] over the set bits i of b."""
    for group in range(table.shape[0]):
        table[group, 0] = 0.0
        for bit in range(8):
            index = 8 * group + bit
            value = values[index] if index < values.shape[0] else np.float32(0.0)
            step = 1 << bit
            for subset in range(step):
                table[group, step + subset] = table[group, subset] + value


@_compiled
def _masked_rows(table: np.ndarray, mask: np.ndarray, signs: np.ndarray, constant: float, out: np.ndarray) -> None:
    """out[r] = constant · Σ ±value over the kept weights of row r; mask and signs (rows · row_bytes,)."""
    row_bytes = table.shape[0]
    for row in range(out.shape[0]):
        total = np.float32(0.0)
        start = row * row_bytes
        for byte in range(row_bytes):
            kept = mask[start + byte]
            positive = kept & signs[start + byte]
            total += table[byte, positive] - table[byte, kept ^ positive]
        out[row] = total * np.float32(constant)


@_compiled
def _score_masks(
    first: np.ndarray,
    bank: np.ndarray,
    signs: np.ndarray,
    rows: np.ndarray,
    offsets: np.ndarray,
    constants: np.ndarray,
    out: np.ndarray,
) -> None:
    """Runs the layers of every mask in `bank` (k, mask_bytes) on one sample; `first` is the input's table."""
    layers = rows.shape[0]
    for index in range(bank.shape[0]):
        mask = bank[index]
        table = first
        for layer in range(layers):
            stop = offsets[layer] + rows[layer] * table.shape[0]
            hidden = np.empty(rows[layer], dtype=np.float32)
            _masked_rows(table, mask[offsets[layer] : stop], signs[offsets[layer] : stop], constants[layer], hidden)
            if layer == layers - 1:
                out[index, :] = hidden
            else:
                for unit in range(hidden.shape[0]):
                    hidden[unit] = max(hidden[unit], np.float32(0.0))
                table = np.empty(((hidden.shape[0] + 7) // 8, 256), dtype=np.float32)
                _fill_tables(hidden, table)


@_compiled
def _products(bank: np.ndarray, vector: np.ndarray, out: np.ndarray) -> None:
    """out[i] = sum of `vector` over the set bits of bank[i]; partial sums in float64, byte by byte."""
    tables = np.empty((vector.shape[0] // 4, 16), dtype=np.float32)
    for group in range(tables.shape[0]):
        tables[group, 0] = 0.0
        for bit in range(4):
            step = 1 << bit
            for subset in range(step):
                tables[group, step + subset] = tables[group, subset] + vector[4 * group + bit]
    for index in range(bank.shape[0]):
        mask = bank[index]
        total = 0.0
        for byte in range(vector.shape[0] // 8):
            total += tables[2 * byte, mask[byte] & 15] + tables[2 * byte + 1, mask[byte] >> 4]
        out[index] = total


def bank_times_vector(bank: np.ndarray, vector: np.ndarray) -> np.ndarray:
    """For each mask the sum of `vector`, float32 (8 b,), over the set bits of its first b bytes, float32 (k,).

    Half a byte indexes a table of the 16 subset sums of its values: a table for all masks that fits the cache.
    """
    out = np.empty(len(bank), dtype=np.float32)
    _products(bank, vector, out)
    return out


class TableKernel:
    """Exact scoring of few samples under many masks on the CPU.

    Args:
        layers: (rows, columns, offset, constant) of each layer.
        signs: the network's packed sign bits, uint8 (mask_bytes,).
        threads: how many run side by side; results do not depend on it.
    """

    def __init__(self, layers: list[tuple[int, int, int, float]], signs: np.ndarray, threads: int) -> None:
        rows, columns, offsets, constants = zip(*layers, strict=True)
        self._signs = signs
        self._rows = np.array(rows, dtype=np.int64)
        self._offsets = np.array(offsets, dtype=np.int64)
        self._constants = np.array(constants, dtype=np.float64)
        self._groups = (columns[0] + 7) // 8
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="kernel")

    def logits(self, x: np.ndarray, bank: np.ndarray) -> np.ndarray:
        """Logits, float32 (k, n, outputs), of x, float32 (n, inputs), under bank, uint8 (k, mask_bytes)."""
        out = np.empty((len(x), len(bank), int(self._rows[-1])), dtype=np.float32)
        for sample, logits in zip(x, out, strict=True):
            self._sample(np.ascontiguousarray(sample), bank, logits)
        return out.transpose(1, 0, 2)

    def _sample(self, sample: np.ndarray, bank: np.ndarray, out: np.ndarray) -> None:
        table = np.empty((self._groups, 256), dtype=np.float32)
        _fill_tables(sample, table)

        def score(start: int) -> None:
            part = slice(start, start + CHUNK)
            _score_masks(table, bank[part], self._signs, self._rows, self._offsets, self._constants, out[part])

        starts = range(0, len(bank), CHUNK)
        if len(starts) == 1:
            score(0)
        else:
            list(self._pool.map(score, starts))
