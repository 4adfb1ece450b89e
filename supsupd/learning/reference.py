"""A task's own record: what new batches and queries are held against."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from statistics import NormalDist
from typing import Any

import numpy as np

from supsupd.learning.statistics import gamma_quantile

BORROWED_ROWS = 8.0
"""Rows of all classes that a class's own record is eked out with: a class hardly seen has no spread of its own."""
UNSEEN_ROWS = 1.0
"""A row that was denied altogether, shared among the classes (Laplace's rule of succession): of a mask that is hardly
ever wrong the last few hundred rows may show no error, and the next batch still may."""
SMALLEST_SD = 1e-3
"""Evidence that never varied is not taken for certain."""


@dataclass(frozen=True, slots=True)
class Gauge:
    """Running mean and variance of a value, old rows fading: no row counts beyond `memory` rows."""

    count: float = 0.0
    mean: float = 0.0
    variance: float = 0.0

    @property
    def sd(self) -> float:
        return max(math.sqrt(self.variance), SMALLEST_SD)

    def joined(self, other: Gauge, weight: float) -> Gauge:
        """With `weight` more rows like those of `other`."""
        count = self.count + weight
        share = weight / count
        shift = other.mean - self.mean
        variance = (1 - share) * self.variance + share * other.variance + share * (1 - share) * shift**2
        return Gauge(count, self.mean + share * shift, variance)

    def surprise(self, values: np.ndarray) -> np.ndarray:
        """Values in standard deviations above the mean."""
        return (values - self.mean) / self.sd

    def limit(self, rows: int, error: float) -> float:
        """What the mean surprise of `rows` rows exceeds with probability `error`, the record's own spread included."""
        return NormalDist().inv_cdf(1 - error) * math.sqrt(1.0 / rows + 1.0 / max(self.count, 1.0))

    def to_json(self) -> list[float]:
        return [self.count, self.mean, self.variance]

    def updated(self, values: np.ndarray, memory: float) -> Gauge:
        faded = replace(self, count=min(self.count, max(memory - len(values), 0.0)))
        return faded.joined(Gauge(0.0, float(values.mean()), float(values.var())), len(values))


def gauge_columns(gauges: Sequence[Gauge]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each, float32 (k,)."""
    count = len(gauges)
    return (
        np.fromiter((gauge.mean for gauge in gauges), np.float32, count),
        np.fromiter((gauge.sd for gauge in gauges), np.float32, count),
    )


@dataclass(frozen=True, slots=True)
class Reference:
    """A task's own record, what new batches are held against.

    Args:
        errors, hits: prequential counts (each batch before it was trained on), fading.
        denied: prequential probability denied to the label, 1 - p(label), per class index.
        labels: rows seen per class index.
        evidence: by name, of the current mask on rows held out from training.
    """

    errors: float = 0.0
    hits: float = 0.0
    denied: Mapping[int, Gauge] = field(default_factory=dict)
    labels: Mapping[int, int] = field(default_factory=dict)
    evidence: Mapping[str, Gauge] = field(default_factory=dict)

    @property
    def accuracy(self) -> float | None:
        trials = self.errors + self.hits
        return self.hits / trials if trials else None

    def tested(self, labels: np.ndarray, errors: int, denied: np.ndarray, memory: float) -> Reference:
        """After rows (n,) that the mask had not been trained on, `errors` of them wrong."""
        gauges = dict(self.denied)
        present = np.unique(labels).tolist()
        share = memory / max(len(gauges.keys() | set(present)), 1)
        for label in present:
            gauges[label] = gauges.get(label, Gauge()).updated(denied[labels == label], share)
        trials = len(denied)
        fade = min(1.0, max(memory - trials, 0.0) / max(self.errors + self.hits, 1e-9))
        return replace(
            self,
            errors=fade * self.errors + errors,
            hits=fade * self.hits + trials - errors,
            denied=gauges,
        )

    def denied_law(self, labels: np.ndarray, unseen: float = 0.0) -> tuple[float, float]:
        """Expectation and variance of the mean probability denied to these labels (n,) in a batch of the task.

        Each class's own record, eked out by a few rows of all classes and its share of `unseen` denied ones; its spread
        is included.
        """
        everything = reduce(lambda whole, g: whole.joined(g, g.count), self.denied.values(), Gauge())
        mean, variance = 0.0, 0.0
        for label, count in zip(*(v.tolist() for v in np.unique(labels, return_counts=True)), strict=True):
            own = self.denied.get(label, Gauge()).joined(everything, BORROWED_ROWS)
            gauge = own.joined(Gauge(mean=1.0), unseen / max(len(self.denied), 1))
            share = count / len(labels)
            mean += share * gauge.mean
            variance += share**2 * gauge.sd**2 * (1.0 / count + 1.0 / gauge.count)
        return max(mean, SMALLEST_SD), variance

    def denied_ceiling(self, labels: np.ndarray, error: float) -> float:
        """What the mean probability denied to these labels (n,) exceeds with probability `error`."""
        return gamma_quantile(*self.denied_law(labels, UNSEEN_ROWS), error)

    def seen(self, labels: np.ndarray) -> Reference:
        classes, counts = np.unique(labels, return_counts=True)
        merged = dict(self.labels)
        for label, count in zip(classes.tolist(), counts.tolist(), strict=True):
            merged[label] = merged.get(label, 0) + count
        return replace(self, labels=merged)

    def gauged(self, evidence: Mapping[str, np.ndarray], memory: float) -> Reference:
        gauges = {name: self.evidence.get(name, Gauge()).updated(v, memory) for name, v in evidence.items()}
        return replace(self, evidence=gauges)

    def to_json(self) -> dict[str, Any]:
        return {
            "errors": self.errors,
            "hits": self.hits,
            "labels": {str(label): count for label, count in self.labels.items()},
            "denied": {str(label): gauge.to_json() for label, gauge in self.denied.items()},
            "evidence": {name: gauge.to_json() for name, gauge in self.evidence.items()},
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Reference:
        return cls(
            errors=data["errors"],
            hits=data["hits"],
            labels={int(label): count for label, count in data["labels"].items()},
            denied={int(label): Gauge(*values) for label, values in data["denied"].items()},
            evidence={name: Gauge(*values) for name, values in data["evidence"].items()},
        )
