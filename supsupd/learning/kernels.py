"""What is computed straight from packed bits on the CPU: no dense mask exists for it (Numba over `lanes`).

The kernels release the GIL and are spread over plain threads: Numba's own parallel layer may not be entered from two
threads at once where only its workqueue is available. What a mask gives depends neither on the number of threads nor
on its neighbours. References: `inference.reference_logits`, and NumPy's `unpackbits` in the tests.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar, cast

import numba
import numpy as np

from supsupd.learning.lanes import (
    LANES,
    dot,
    exp_sums,
    halves_dot,
    largest,
    mask_dots,
    masked_add,
    masked_copy,
    masked_sum,
    row_dots,
)

BLOCK = 16
"""Masks that go through a layer together: they share its weights while these are in the first-level cache."""
GROUP = 8
"""Samples that go through a block together, for the same reason."""
CHUNK = 64
"""Masks per thread task: about a millisecond of work on LeNet 300-100."""
DENSITY_CHUNK = 2048
EVIDENCE_KINDS = ("entropy", "g", "energy", "max-logit")
FILLING = LANES
"""Values behind a row of logits: its last lanes are read whole, whichever output they begin at."""
FAR_BELOW = np.float32(-1e30)
"""What lanes are filled up with: no logit is as small, and nothing overflows."""
CHUNK_BYTES = 512
"""Bytes of each mask that one pass over all masks looks at, where they share a long vector."""


Function = TypeVar("Function", bound=Callable[..., Any])


def compiled(function: Function, *, any_order: bool = False) -> Function:
    """Compiled at the first call, and kept on disk where there is a place for it.

    A division by 0 gives an infinity and no exception: a loop that might raise is not vectorised.

    any_order: whether sums may be taken in another order than they are written in, which vectorises them.
    """
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy"}
    if any_order:
        options["fastmath"] = {"reassoc"}
    try:
        return cast(Function, numba.njit(cache=True, **options)(function))
    except RuntimeError:  # neither this folder nor the user's cache can be written
        return cast(Function, numba.njit(**options)(function))


@compiled
def _layer_rows(
    addresses: np.ndarray,
    layer: np.ndarray,
    weights: np.ndarray,
    x: np.ndarray,
    out: np.ndarray,
) -> None:
    """One layer of a block of masks: x (m or 1, n, padded) to out (m, n, ...), rows by masks by samples."""
    rows, row_bytes, offset, padded, first = layer[0], layer[1], layer[2], layer[3], layer[4]
    masks, samples = addresses.shape[0], x.shape[1]
    whole = samples // 4 * 4
    shared = 0 if x.shape[0] == 1 else 1  # the inputs are those of all masks, or each mask's own
    x_mask, x_row, out_mask, out_row = x.strides[0] * shared, x.strides[1], out.strides[0], out.strides[1]
    for row in range(rows):
        weight = weights.ctypes.data + 4 * (first + row * padded)
        bits = offset + row * row_bytes
        source, target = x.ctypes.data, out.ctypes.data + 4 * row
        for index in range(masks):
            for sample in range(0, whole, 4):
                row_dots(
                    addresses[index], bits, row_bytes, weight, source + index * x_mask + sample * x_row, x_row,
                    target + index * out_mask + sample * out_row, out_row,
                )  # fmt: skip
        for sample in range(whole, samples):
            for index in range(0, masks // 4 * 4, 4):
                mask_dots(
                    addresses.ctypes.data + 8 * index, bits, row_bytes, weight,
                    source + index * x_mask + sample * x_row, x_mask,
                    target + index * out_mask + sample * out_row, out_mask,
                )  # fmt: skip
            for index in range(masks // 4 * 4, masks):
                dot(
                    addresses[index], bits, row_bytes, weight, source + index * x_mask + sample * x_row, 0,
                    target + index * out_mask + sample * out_row, 0,
                )  # fmt: skip


@compiled
def _forward(addresses: np.ndarray, layers: np.ndarray, weights: np.ndarray, x: np.ndarray, out: np.ndarray) -> None:
    """Runs the layers of every mask at `addresses` (k,) on x (n, padded), ReLU between them: out (k, n, outputs)."""
    width = x.shape[1]
    for layer in range(layers.shape[0]):
        width = max(width, layers[layer, 3], (layers[layer, 0] + LANES - 1) // LANES * LANES)
    space = np.zeros(2 * BLOCK * GROUP * width + LANES, np.float32)
    start = -space.ctypes.data % (4 * LANES) // 4
    hidden = space[start : start + 2 * BLOCK * GROUP * width].reshape(2, BLOCK, GROUP, width)
    last = layers.shape[0] - 1
    for start in range(0, addresses.shape[0], BLOCK):
        block = addresses[start : start + BLOCK]
        masks = block.shape[0]
        for sample in range(0, x.shape[0], GROUP):
            count = min(GROUP, x.shape[0] - sample)
            inputs = x[sample : sample + count].reshape(1, count, x.shape[1])
            for layer in range(layers.shape[0]):
                if layer == last:
                    outputs = out[start : start + masks, sample : sample + count]
                else:
                    outputs = hidden[layer % 2, :masks, :count]
                _layer_rows(block, layers[layer], weights, inputs, outputs)
                if layer < last:
                    for mask in range(masks):
                        for row in range(count):
                            for unit in range(layers[layer, 0]):
                                outputs[mask, row, unit] = max(outputs[mask, row, unit], np.float32(0.0))
                inputs = outputs


@compiled
def _evidence(logits: np.ndarray, outputs: int, kind: int, classes: int, out: np.ndarray) -> None:
    """What each row of logits says by EVIDENCE_KINDS[kind], lower is more at home: out (m, n).

    logits: (m, n, outputs and FILLING more), which are overwritten.
    """
    first = classes if kind == 1 else 0
    sums = np.empty(2, np.float32)
    for mask in range(logits.shape[0]):
        for row in range(logits.shape[1]):
            for index in range(outputs, logits.shape[2]):
                logits[mask, row, index] = FAR_BELOW
            values = logits.ctypes.data + mask * logits.strides[0] + row * logits.strides[1] + 4 * first
            count = (outputs - first + LANES - 1) // LANES * LANES
            most = largest(values, count)
            if kind != 3:
                exp_sums(values, count, most, sums.ctypes.data)
            if kind == 0:
                out[mask, row] = np.log(sums[0]) - sums[1] / sums[0]
            elif kind == 1:
                out[mask, row] = most + np.log(sums[0])
            elif kind == 2:
                out[mask, row] = -(most + np.log(sums[0]))
            else:
                out[mask, row] = -most


@compiled
def _outcomes(logits: np.ndarray, allowed: np.ndarray, probabilities: np.ndarray, entropies: np.ndarray) -> None:
    """Arrays as of `outcomes`."""
    outputs, classes = logits.shape[1], allowed.shape[0]
    values = np.full((outputs + LANES - 1) // LANES * LANES, FAR_BELOW)
    sums = np.empty(2, np.float32)
    for row in range(logits.shape[0]):
        values[:outputs] = logits[row]
        address = values.ctypes.data
        exp_sums(address, values.size, largest(address, values.size), sums.ctypes.data)
        entropies[row] = np.log(sums[0]) - sums[1] / sums[0]
        most = np.float32(-np.inf)
        for index in range(classes):
            if allowed[index]:
                most = max(most, values[index])
        total = np.float32(0.0)
        for index in range(classes):
            share = np.exp(values[index] - most) if allowed[index] else np.float32(0.0)
            probabilities[row, index] = share
            total += share
        for index in range(classes):
            probabilities[row, index] /= total


def outcomes(logits: np.ndarray, allowed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What rows of logits, float32 (n, outputs), say: probabilities (n, classes) of the `allowed` ones of the first
    outputs, bool (classes,), and the entropy (n,) in nats over all outputs."""
    probabilities = np.empty((len(logits), len(allowed)), np.float32)
    entropies = np.empty(len(logits), np.float32)
    _outcomes(logits, allowed, probabilities, entropies)
    return probabilities, entropies


@compiled
def _products(addresses: np.ndarray, count: int, vector: np.ndarray, out: np.ndarray) -> None:
    """out[i] = Σ vector over the set bits of the first `count` bytes at addresses[i]; chunks summed in float64."""
    for start in range(0, count, CHUNK_BYTES):
        part = min(CHUNK_BYTES, count - start)
        values = vector.ctypes.data + 4 * 8 * start
        for index in range(addresses.shape[0]):
            out[index] += masked_sum(addresses[index] + start, part, values)


@compiled
def _counts(addresses: np.ndarray, start: int, part: int, ones: np.ndarray, out: np.ndarray) -> None:
    """out[i] += 1 for each mask that has bit i of bytes start : start + part set."""
    for index in range(addresses.shape[0]):
        masked_add(addresses[index] + start, part, ones.ctypes.data, out.ctypes.data)


@compiled
def _halves_dots(addresses: np.ndarray, size: int, vector: np.ndarray, out: np.ndarray) -> None:
    """out[i] = inner product of the `size` bfloat16 numbers at addresses[i] with the vector; at 0 there are none."""
    for index in range(addresses.shape[0]):
        if addresses[index]:
            out[index] = halves_dot(addresses[index], size, vector.ctypes.data)


@compiled
def _unpack(bits: np.ndarray, weights: np.ndarray, out: np.ndarray) -> None:
    """out = weights where a bit of bits (rows, row_bytes) is set, else 0; both (rows, columns)."""
    rows, columns = weights.shape
    whole = columns // LANES * LANES
    for row in range(rows):
        first = row * columns * 4
        masked_copy(
            bits.ctypes.data + row * bits.strides[0], whole // 8, weights.ctypes.data + first, out.ctypes.data + first
        )
        for column in range(whole, columns):
            kept = (bits[row, column >> 3] >> (column & 7)) & 1
            out[row, column] = weights[row, column] if kept else np.float32(0.0)


class Located(NamedTuple):
    """Packed masks where they lie: the arrays, uint8 (mask_bytes,) each, and their addresses, int64 (k,).

    Whoever holds this keeps the arrays alive, and with them the addresses valid.
    """

    arrays: Sequence[np.ndarray]
    addresses: np.ndarray

    @classmethod
    def of(cls, arrays: Sequence[np.ndarray]) -> Located:
        found = (array.__array_interface__["data"][0] for array in arrays)
        return cls(arrays, np.fromiter(found, np.int64, len(arrays)))

    def part(self, start: int, stop: int) -> Located:
        return Located(self.arrays[start:stop], self.addresses[start:stop])


class LayerBits(NamedTuple):
    """Where a layer's bits lie in a packed mask: `rows` of `row_bytes` each, from byte `offset` on."""

    rows: int
    row_bytes: int
    offset: int


def padded(columns: int) -> int:
    """Columns filled up to whole lanes."""
    return (columns + LANES - 1) // LANES * LANES


def aligned(*shape: int) -> np.ndarray:
    """Zeros, float32, from the beginning of a cache line on: lanes that cross two lines take twice as long."""
    space = np.zeros(math.prod(shape) + LANES, np.float32)
    start = -space.__array_interface__["data"][0] % (4 * LANES) // 4
    return space[start : start + math.prod(shape)].reshape(shape)


def unpack(bits: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """weights, float32 (rows, columns), where a bit of bits, uint8 (rows, row_bytes), is set, 0 elsewhere."""
    out = np.empty(weights.shape, np.float32)
    _unpack(bits, weights, out)
    return out


class Kernels:
    """The kernels that need no network, and the threads that all of them share."""

    def __init__(self, threads: int) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="kernel")

    def spread(self, task: Callable[[int], None], starts: range) -> None:
        """task(start) for each of the starts, side by side."""
        if len(starts) > 1:
            list(self._pool.map(task, starts))
        elif starts:
            task(starts[0])

    def products(self, masks: Located, vector: np.ndarray) -> np.ndarray:
        """For each mask the sum of `vector`, float32 (8 b,), over the set bits of its first b bytes, float32 (k,)."""
        out = np.zeros(len(masks.addresses))
        values = np.zeros(padded(len(vector)), np.float32)
        values[: len(vector)] = vector

        def run(start: int) -> None:
            part = slice(start, start + CHUNK)
            _products(masks.addresses[part], len(vector) // 8, values, out[part])

        self.spread(run, range(0, len(out), CHUNK))
        return out.astype(np.float32)

    def counts(self, masks: Located, count: int) -> np.ndarray:
        """How many masks have each bit of their first `count` bytes set, float32 (8 count,)."""
        out = np.zeros(padded(8 * count), np.float32)
        ones = np.ones(8 * CHUNK_BYTES, np.float32)

        def run(start: int) -> None:
            _counts(masks.addresses, start, min(CHUNK_BYTES, count - start), ones, out[8 * start :])

        self.spread(run, range(0, count, CHUNK_BYTES))
        return out[: 8 * count]

    def halves_dots(self, addresses: np.ndarray, vector: np.ndarray) -> np.ndarray:
        """Inner products, float32 (k,), of a vector, float32 (m,), with the bfloat16 arrays at `addresses` (k,); 0
        where there is none. m is a multiple of LANES."""
        out = np.zeros(len(addresses), np.float32)

        def run(start: int) -> None:
            part = slice(start, start + DENSITY_CHUNK)
            _halves_dots(addresses[part], len(vector), vector, out[part])

        self.spread(run, range(0, len(out), DENSITY_CHUNK))
        return out


class LinearKernel:
    """Logits of few samples under many masks of a network of linear layers with ReLU between them.

    Args:
        layers: where the bits of each layer lie.
        weights: float32 (rows, columns) of each layer.
        kernels: whose threads it uses; results do not depend on their number.
    """

    def __init__(self, layers: Sequence[LayerBits], weights: Sequence[np.ndarray], kernels: Kernels) -> None:
        filled = [np.pad(w, ((0, 0), (0, padded(w.shape[1]) - w.shape[1]))) for w in weights]
        starts = np.cumsum([0, *(w.size for w in filled)])[:-1]
        self._weights = aligned(sum(w.size for w in filled))
        self._weights[:] = np.concatenate([w.reshape(-1) for w in filled])
        self._layers = np.array(
            [(*bits, w.shape[1], start) for bits, w, start in zip(layers, filled, starts, strict=True)], np.int64
        )
        self._kernels = kernels

    def logits(self, x: np.ndarray, masks: Located) -> np.ndarray:
        """Logits, float32 (k, n, outputs), of x, float32 (n, inputs)."""
        out = np.empty((len(masks.addresses), len(x), self._outputs), np.float32)
        inputs = self._padded(x)

        def run(start: int) -> None:
            part = slice(start, start + CHUNK)
            _forward(masks.addresses[part], self._layers, self._weights, inputs, out[part])

        self._kernels.spread(run, range(0, len(masks.addresses), CHUNK))
        return out

    def evidence(self, x: np.ndarray, masks: Located, kind: str, classes: int) -> np.ndarray:
        """One of EVIDENCE_KINDS, float32 (k, n), whose logits nobody keeps; `g` needs more outputs than classes."""
        out = np.empty((len(masks.addresses), len(x)), np.float32)
        inputs, which = self._padded(x), EVIDENCE_KINDS.index(kind)

        def run(start: int) -> None:
            addresses = masks.addresses[start : start + CHUNK]
            logits = np.empty((len(addresses), len(x), self._outputs + FILLING), np.float32)
            _forward(addresses, self._layers, self._weights, inputs, logits)
            _evidence(logits, self._outputs, which, classes, out[start : start + CHUNK])

        self._kernels.spread(run, range(0, len(masks.addresses), CHUNK))
        return out

    @property
    def _outputs(self) -> int:
        return int(self._layers[-1, 0])

    def _padded(self, x: np.ndarray) -> np.ndarray:
        inputs = aligned(len(x), int(self._layers[0, 3]))
        inputs[:, : x.shape[1]] = x
        return inputs
