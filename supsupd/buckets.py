"""Counts of values by size, cheap to add to one by one and many at once."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

import numpy as np


class Buckets:
    """How many values were at most each bound, and their sum. One thread adds; any may read.

    Args:
        bounds: ascending; what is above the last is counted too.
    """

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self._edges = np.array(bounds, np.float32)
        self._counts = np.zeros(len(bounds) + 1, np.int64)
        self._sum = 0.0

    def add(self, value: float) -> None:
        self._counts[bisect_left(self.bounds, value)] += 1
        self._sum += value

    def add_all(self, values: np.ndarray) -> None:
        """values: (n,) float32."""
        self._counts += np.bincount(self._edges.searchsorted(values), minlength=len(self._counts))
        self._sum += float(values.sum())

    @property
    def total(self) -> float:
        """The sum of all values."""
        return self._sum

    def cumulative(self) -> list[tuple[str, float]]:
        """(bound, how many values are at most that), the last bound +Inf: as Prometheus wants it."""
        names = [*(f"{bound:g}" for bound in self.bounds), "+Inf"]
        return list(zip(names, self._counts.cumsum().tolist(), strict=True))
