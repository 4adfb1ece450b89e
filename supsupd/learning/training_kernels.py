"""What a training step does beside forward and backward, one pass over a layer each (Numba, on the CPU).

`optimiser.step_by_torch` and `supermask.select_by_torch` are the slow, obvious equals. The kernels release the GIL and
use one thread, as all of them together take about a tenth of a step.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from supsupd.learning.kernels import compiled

MAGNITUDE = 0x7FFFFFFF
"""Of float32 bits, without the sign: as integers they have the order of the absolute values."""
DIGITS = ((16, 15), (0, 16))
"""(shift, width) of the two parts that these 31 bits are counted by."""


@compiled
def rmsprop(gradient: np.ndarray, layer: Any, step: Any) -> None:
    """One step of RMSProp in place; `gradient` (n,), `layer` of arrays (n,), see `optimiser`."""
    number = layer.scores.dtype.type
    zero, decay, new, epsilon = number(0.0), number(step.decay), number(1.0 - step.decay), number(step.epsilon)
    lr, share = number(step.lr), number(step.share)
    for i in range(layer.scores.size):
        slope = gradient[i] * layer.weight[i]
        score = layer.scores[i]
        if step.signed:
            slope *= number(score > zero) - number(score < zero)
        second = decay * layer.second[i] + new * slope * slope
        layer.second[i] = second
        score -= lr * (slope / (np.sqrt(second) + epsilon))
        layer.scores[i] = score
        layer.average[i] += share * (score - layer.average[i])


@compiled
def adam(gradient: np.ndarray, layer: Any, step: Any) -> None:
    """One step of Adam in place; arguments as of `rmsprop`."""
    number = layer.scores.dtype.type
    zero, decay, new, epsilon = number(0.0), number(step.decay), number(1.0 - step.decay), number(step.epsilon)
    fresh = number(1.0 - step.first_decay)
    lr, share = number(step.lr), number(step.share)
    first_share, second_share = number(step.first_share), number(step.second_share)
    for i in range(layer.scores.size):
        slope = gradient[i] * layer.weight[i]
        score = layer.scores[i]
        if step.signed:
            slope *= number(score > zero) - number(score < zero)
        first = layer.first[i] + fresh * (slope - layer.first[i])
        second = decay * layer.second[i] + new * slope * slope
        layer.first[i] = first
        layer.second[i] = second
        score -= lr * (first / first_share / (np.sqrt(second / second_share) + epsilon))
        layer.scores[i] = score
        layer.average[i] += share * (score - layer.average[i])


@compiled
def keep_positive(scores: np.ndarray, values: np.ndarray, out: np.ndarray) -> None:
    """out = values where scores >= 0, else 0; all (n,)."""
    for i in range(scores.size):
        if scores[i] >= 0:
            out[i] = values[i]
        else:
            out[i] = 0


@compiled
def _last_kept(bits: np.ndarray, keep: int) -> tuple[int, int]:
    """Magnitude and position of the last of the `keep` largest, ties in the order of their positions.

    A radix selection: the magnitudes are counted by their upper bits, then those in the decisive bucket by the rest.
    """
    found, left, digit = 0, keep, 0
    counts = np.zeros(0, dtype=np.int32)
    for shift, width in DIGITS:
        counts = np.zeros(1 << width, dtype=np.int32)
        for i in range(bits.size):
            magnitude = bits[i] & MAGNITUDE
            if magnitude >> (shift + width) == found:
                counts[(magnitude >> shift) & ((1 << width) - 1)] += 1
        digit = (1 << width) - 1
        while counts[digit] < left:
            left -= counts[digit]
            digit -= 1
        found = (found << width) | digit
    if counts[digit] == left:  # all of its kind
        return found, bits.size
    position = -1
    while left > 0:
        position += 1
        left -= bits[position] & MAGNITUDE == found
    return found, position


@compiled
def keep_largest(bits: np.ndarray, keep: int, values: np.ndarray, out: np.ndarray) -> None:
    """out = values where the `keep` largest absolute scores are, ties broken by position, else 0; all (n,).

    `bits`, int32, are those of float32 scores without NaN; 1 <= keep <= n.
    """
    least, last = _last_kept(bits, keep)
    for i in range(bits.size):
        magnitude = bits[i] & MAGNITUDE
        if (magnitude > least) | ((magnitude == least) & (i <= last)):
            out[i] = values[i]
        else:
            out[i] = 0
