"""Which few of very many tasks some inputs may belong to, by what each task's inputs look like.

A task's inputs are taken for independent normal variables, each with its mean and variance over the rows learned. The
log likelihood of a row is then a sum Σ a x² + b x + c, linear in what can be added up over rows: one pass over the
coefficients of all tasks, whatever the number of rows. It sees what inputs look like, not what labels mean, so it
proposes and the masks decide.

Coefficients are kept in bfloat16, 4 bytes for each input of a task; c belongs to the rounded ones, so that what a task
has is a proper density with a slightly different mean and variance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from safetensors.numpy import load, save

from supsupd.learning.kernels import Kernels, padded
from supsupd.learning.statistics import far_outside, iter_slices

VARIANCE_SHARE = 0.05
"""Of the task's mean variance, added to each input's: a pixel that was always black may be grey in the next row."""
LEAST_VARIANCE = 1e-3
MEMORY_ROWS = 16384.0
"""Rows that the statistics remember: they follow a drifting task."""


@dataclass(frozen=True)
class InputMoments:
    """Rows seen, and mean and mean square of each normalised input over them, float32 (d,) each."""

    count: float
    mean: np.ndarray
    square: np.ndarray

    @classmethod
    def of(cls, x: np.ndarray) -> InputMoments:
        """Of rows x (n, d), n >= 1."""
        mean = sum(part.sum(axis=0) for part in iter_slices(x)) / len(x)
        square = sum((part**2).sum(axis=0) for part in iter_slices(x)) / len(x)
        return cls(float(len(x)), mean.astype(np.float32), square.astype(np.float32))

    def joined(self, other: InputMoments) -> InputMoments:
        """With the rows of another one more."""
        count = min(self.count, MEMORY_ROWS) + other.count
        share = np.float32(other.count / count)
        return InputMoments(
            count, self.mean + share * (other.mean - self.mean), self.square + share * (other.square - self.square)
        )

    def to_bytes(self) -> bytes:
        return save({"count": np.array([self.count]), "mean": self.mean, "square": self.square})

    @classmethod
    def from_bytes(cls, data: bytes) -> InputMoments:
        """Raises safetensors' SafetensorError or KeyError when `data` is not what `to_bytes` made."""
        found = load(data)
        return cls(float(found["count"][0]), found["mean"], found["square"])


def smoothed_variance(moments: InputMoments) -> np.ndarray:
    """Of each input, float64 (d,)."""
    variance = np.maximum(moments.square.astype(np.float64) - moments.mean.astype(np.float64) ** 2, 0.0)
    smoothed: np.ndarray = variance + VARIANCE_SHARE * variance.mean() + LEAST_VARIANCE
    return smoothed


@dataclass(frozen=True, slots=True)
class InputDensity:
    """One task's coefficients: uint16 (2 padded(d),), the upper halves of float32 a and b; their address; and c."""

    coefficients: np.ndarray
    address: int
    constant: float

    @classmethod
    def of(cls, moments: InputMoments) -> InputDensity:
        mean, variance = moments.mean.astype(np.float64), smoothed_variance(moments)
        size = padded(len(mean))
        both = np.zeros(2 * size, np.float32)
        both[: len(mean)] = -0.5 / variance
        both[size : size + len(mean)] = mean / variance
        rounded = (both.view(np.uint32) + 0x8000) >> 16
        a, b = ((rounded << 16).astype(np.uint32).view(np.float32).astype(np.float64)).reshape(2, size)[:, : len(mean)]
        constant = float((b**2 / (4.0 * a) + 0.5 * np.log(-2.0 * a)).sum())
        coefficients = rounded.astype(np.uint16)
        return cls(coefficients, coefficients.__array_interface__["data"][0], constant)

    def far_outside(self, x: np.ndarray, error: float) -> np.ndarray:
        """Which of the rows x (n, d) lie far outside what the task has seen, bool (n,): `statistics.far_outside`."""
        halves = (self.coefficients.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
        a, b = halves.reshape(2, -1)[:, : x.shape[1]]
        return far_outside(x, -b / (2.0 * a), -0.5 / a, error)


class TaskIndex:
    """The densities of some tasks, in order; immutable. A task whose inputs are not known is always proposed.

    Args:
        densities: of each task, or None.
    """

    def __init__(self, densities: Sequence[InputDensity | None]) -> None:
        self._densities = densities  # keeps the addresses valid
        count = len(densities)
        self._addresses = np.fromiter((0 if d is None else d.address for d in densities), np.int64, count)
        self._constants = np.fromiter((np.inf if d is None else d.constant for d in densities), np.float64, count)

    def log_likelihoods(self, x: np.ndarray, kernels: Kernels) -> np.ndarray:
        """Of rows x, float32 (n, d), together under each task (k,), but for a term that all share; inf if unknown."""
        size = padded(x.shape[1])
        sums = np.zeros(2 * size, np.float32)
        sums[: x.shape[1]] = np.square(x, dtype=np.float64).sum(axis=0)
        sums[size : size + x.shape[1]] = x.sum(axis=0, dtype=np.float64)
        return kernels.halves_dots(self._addresses, sums) + len(x) * self._constants

    def shortlist(self, x: np.ndarray, count: int, kernels: Kernels) -> np.ndarray:
        """The places (m,), ascending, of the `count` most likely tasks for rows x (n, d) together, and of those whose
        inputs are not known."""
        likely = self.log_likelihoods(x, kernels)
        unknown = np.isinf(likely)
        if count >= len(likely) - int(unknown.sum()):
            return np.arange(len(likely))
        likely[unknown] = -np.inf
        best = np.argpartition(-likely, count - 1)[:count]
        return np.union1d(best, np.flatnonzero(unknown))


def reference_log_likelihood(moments: InputMoments, x: np.ndarray) -> float:
    """The same for one task, from its mean and variance, float64: slow and obvious, to test the fast."""
    rows, mean = x.astype(np.float64), moments.mean.astype(np.float64)
    variance = smoothed_variance(moments)
    return float((-0.5 * (rows - mean) ** 2 / variance - 0.5 * np.log(variance)).sum())
