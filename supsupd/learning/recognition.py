"""Recognition: does a labelled batch come from a known task, and if only a part of it, which rows?

Nothing here knows the true task. The evidence is what each mask makes of the batch *before* training on it, against
that mask's own record:

- consistent: the probability that the mask denies to the labels, on average over the rows, is no more than on the
  task's own past rows of the same classes (gamma law of the mean, exceeded by a batch of the task with chance
  `false_alarm`). Unlike an error count it sees the hesitation of a mask that is right by luck, and a batch of one
  hard class does not look foreign;
- better than chance: betting that the mask knows the labels wins more than k / `false_alarm` against a null that
  only knows how often each label occurs (Ville's inequality), which rejects masks that are right by luck.

A stream does not cut its batches at the change of a task, so a batch may also be explained by one task up to some row
and by another, or by none, after it (one change point, by likelihood).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import reduce
from statistics import NormalDist
from typing import Any

import numpy as np

from supsupd.learning.inference import MaskScores
from supsupd.learning.statistics import gamma_quantile, log_wealth, mixed

FLOOR_SHARE = 0.1
BORROWED_ROWS = 8.0
"""Rows of all classes that a class's own record is eked out with: a class hardly seen has no spread of its own."""
SMALLEST_SD = 1e-3
"""Evidence that never varied is not taken for certain."""


@dataclass(frozen=True)
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


@dataclass(frozen=True)
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

    def denied_ceiling(self, labels: np.ndarray, error: float) -> float:
        """What the mean probability denied to these labels (n,) exceeds with probability `error`.

        Each class's own record, eked out by a few rows of all classes; its spread is included.
        """
        everything = reduce(lambda whole, g: whole.joined(g, g.count), self.denied.values(), Gauge())
        mean, variance = 0.0, 0.0
        for label, count in zip(*(v.tolist() for v in np.unique(labels, return_counts=True)), strict=True):
            gauge = self.denied.get(label, Gauge()).joined(everything, BORROWED_ROWS)
            share = count / len(labels)
            mean += share * gauge.mean
            variance += share**2 * gauge.sd**2 * (1.0 / count + 1.0 / gauge.count)
        return gamma_quantile(max(mean, SMALLEST_SD), variance, error)

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


@dataclass(frozen=True)
class Candidate:
    """One task's evidence on rows start:stop of a batch; `task` is its place among the references, or its id.

    Args:
        errors: rows that the mask has wrong.
        denied: mean probability (n,) denied to the labels, and what it may be: `denied_limit`.
        wealth: log wealth of betting on the mask, and what it has to reach: `wealth_needed`.
    """

    task: int
    start: int
    stop: int
    errors: int
    denied: np.ndarray
    denied_limit: float
    wealth: float
    wealth_needed: float

    @property
    def consistent(self) -> bool:
        return float(self.denied.mean()) <= self.denied_limit

    @property
    def better_than_chance(self) -> bool:
        return self.wealth >= self.wealth_needed

    @property
    def known(self) -> bool:
        return self.consistent and self.better_than_chance

    def to_json(self) -> dict[str, Any]:
        return {
            "task": self.task,
            "errors": self.errors,
            "denied": round(float(self.denied.mean()), 4),
            "denied_limit": round(self.denied_limit, 4),
            "log_wealth": round(self.wealth, 3),
            "log_wealth_needed": round(self.wealth_needed, 3),
            "consistent": self.consistent,
            "better_than_chance": self.better_than_chance,
        }


@dataclass(frozen=True)
class Verdict:
    """What the known tasks make of a batch.

    Args:
        candidates: the evidence of every task on the rows that decide, best first.
        start, stop: the rows that decide: the whole batch, or the longer side of a change point.
        count: rows of the batch.
    """

    candidates: list[Candidate]
    start: int
    stop: int
    count: int

    @property
    def known(self) -> Candidate | None:
        return next((c for c in self.candidates if c.known), None)


@dataclass(frozen=True)
class Recogniser:
    """The rule, with its error rates.

    Args:
        false_alarm: how often a batch of a known task may be taken for something else.
        memory: rows that a task's record remembers; the fewer, the more it may drift.
    """

    false_alarm: float
    memory: float

    def recognise(
        self, labels: np.ndarray, scores: MaskScores, references: list[Reference], classes: int, whole: bool = False
    ) -> Verdict:
        """Weighs a batch, labels int64 (n,), under k masks; `scores` of shape (k, n), `classes` known so far.

        No change inside the batch is looked for if it is taken as a `whole`.
        """
        if not references:
            return Verdict([], 0, len(labels), len(labels))
        null = np.stack([null_probability(labels, r, classes) for r in references])
        verdict = self._weigh(labels, scores, references, null, (0, len(labels)))
        if whole:
            return verdict
        rows, rest_explained = self._change_point(scores.label_probability, null)
        if rows == (0, len(labels)) or (verdict.known and not rest_explained):
            return verdict  # a part that no other task explains belongs to the task that explains the batch
        return self._weigh(labels, scores, references, null, rows)

    def _weigh(
        self,
        labels: np.ndarray,
        scores: MaskScores,
        references: list[Reference],
        null: np.ndarray,
        rows: tuple[int, int],
    ) -> Verdict:
        part = slice(*rows)
        wealth_needed = math.log(len(references) / self.false_alarm)
        candidates = [
            Candidate(
                task=index,
                start=rows[0],
                stop=rows[1],
                errors=int((scores.predicted[index, part] != labels[part]).sum()),
                denied=1.0 - scores.label_probability[index, part],
                denied_limit=reference.denied_ceiling(labels[part], self.false_alarm),
                wealth=mixed(log_wealth(scores.label_probability[index, part] / null[index, part])),
                wealth_needed=wealth_needed,
            )
            for index, reference in enumerate(references)
        ]
        candidates.sort(key=lambda c: (not c.known, -c.wealth))
        return Verdict(candidates, *rows, len(labels))

    def _change_point(self, probability: np.ndarray, null: np.ndarray) -> tuple[tuple[int, int], bool]:
        """The rows that decide: all, or the longer side of the best single change of explanation; and whether a mask
        explains the shorter side.

        Explanations are the k masks and "none of them". Two sides are believed only if their likelihood beats that
        of one by the price of choosing among k + 1 explanations and n cuts at `false_alarm`.
        """
        log_mask = np.log((1 - FLOOR_SHARE) * probability + FLOOR_SHARE * null)
        log_none = np.log(null.max(axis=0, keepdims=True))
        prefix = np.cumsum(np.pad(np.concatenate([log_mask, log_none]), ((0, 0), (1, 0))), axis=1)
        suffix = prefix[:, -1:] - prefix
        both = prefix.max(axis=0) + suffix.max(axis=0)
        cut, rows = int(both.argmax()), probability.shape[1]
        price = math.log(len(prefix) * rows / self.false_alarm)
        if both[cut] - both[0] <= price:
            return (0, rows), False
        left, right = int(prefix[:, cut].argmax()), int(suffix[:, cut].argmax())
        none = len(prefix) - 1
        return ((0, cut), right != none) if cut >= rows - cut else ((cut, rows), left != none)


def null_probability(labels: np.ndarray, reference: Reference, classes: int) -> np.ndarray:
    """Probability (n,) of each label for one who knows only how often the task's labels occur.

    Half the task's own frequencies, half uniform over the known classes, so that no label is a surprise that pays.
    """
    total = max(sum(reference.labels.values()), 1)
    own = np.array([reference.labels.get(label, 0) / total for label in range(classes)])
    return (0.5 * own + 0.5 / classes)[labels]
