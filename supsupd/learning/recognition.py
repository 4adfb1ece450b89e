"""Recognition: does a labelled batch come from a known task, and if only a part of it, which rows?

Nothing here knows the true task. The evidence is what each mask makes of the batch *before* training on it, against
that mask's own record:

- consistent: the errors are no more than the task's own past predicts (beta-binomial tail >= `false_alarm`);
- better than chance: betting that the mask knows the labels wins more than k / `false_alarm` against a null that
  only knows how often each label occurs (Ville's inequality), which rejects masks that are right by luck.

A stream does not cut its batches at the change of a task, so a batch may also be explained by one task up to some row
and by another, or by none, after it (one change point, by likelihood).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from supsupd.learning.inference import MaskScores
from supsupd.learning.statistics import beta_binomial_tail, log_wealth, mixed

FLOOR_SHARE = 0.1
FOREIGN = -1


@dataclass(frozen=True)
class Gauge:
    """Running mean and variance of a value, old rows fading: no row counts beyond `memory` rows."""

    count: float = 0.0
    mean: float = 0.0
    variance: float = 0.0

    @property
    def sd(self) -> float:
        return math.sqrt(self.variance)

    def updated(self, values: np.ndarray, memory: float) -> Gauge:
        old = min(self.count, max(memory - len(values), 0.0))
        count = old + len(values)
        share = len(values) / count
        shift = float(values.mean()) - self.mean
        variance = (1 - share) * self.variance + share * float(values.var()) + share * (1 - share) * shift**2
        return Gauge(count, self.mean + share * shift, variance)


@dataclass(frozen=True)
class Reference:
    """A task's own record, what new batches are held against.

    Args:
        errors, hits: prequential counts (each batch before it was trained on), fading.
        labels: rows seen per class index.
        evidence: of the current mask on rows held out from training.
        entropy: the same in nats.
    """

    errors: float = 0.0
    hits: float = 0.0
    labels: Mapping[int, int] = field(default_factory=dict)
    evidence: Gauge = Gauge()
    entropy: Gauge = Gauge()

    @property
    def accuracy(self) -> float | None:
        trials = self.errors + self.hits
        return self.hits / trials if trials else None

    def tested(self, errors: int, trials: int, memory: float) -> Reference:
        """After `errors` in `trials` rows that the mask had not been trained on."""
        fade = min(1.0, max(memory - trials, 0.0) / max(self.errors + self.hits, 1e-9))
        return replace(self, errors=fade * self.errors + errors, hits=fade * self.hits + trials - errors)

    def seen(self, labels: np.ndarray) -> Reference:
        classes, counts = np.unique(labels, return_counts=True)
        merged = dict(self.labels)
        for label, count in zip(classes.tolist(), counts.tolist(), strict=True):
            merged[label] = merged.get(label, 0) + count
        return replace(self, labels=merged)

    def gauged(self, evidence: np.ndarray, entropy: np.ndarray, memory: float) -> Reference:
        return replace(
            self,
            evidence=self.evidence.updated(evidence, memory),
            entropy=self.entropy.updated(entropy, memory),
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "errors": self.errors,
            "hits": self.hits,
            "labels": {str(label): count for label, count in self.labels.items()},
            "evidence": [self.evidence.count, self.evidence.mean, self.evidence.variance],
            "entropy": [self.entropy.count, self.entropy.mean, self.entropy.variance],
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Reference:
        return cls(
            errors=data["errors"],
            hits=data["hits"],
            labels={int(label): count for label, count in data["labels"].items()},
            evidence=Gauge(*data["evidence"]),
            entropy=Gauge(*data["entropy"]),
        )


@dataclass(frozen=True)
class Candidate:
    """One task's evidence on rows start:stop of a batch; `task` is its place among the references, or its id."""

    task: int
    start: int
    stop: int
    errors: int
    tail: float
    wealth: float
    consistent: bool
    better_than_chance: bool

    @property
    def known(self) -> bool:
        return self.consistent and self.better_than_chance

    def to_json(self) -> dict[str, Any]:
        return {
            "task": self.task,
            "errors": self.errors,
            "tail": round(self.tail, 6),
            "log_wealth": round(self.wealth, 3),
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
        limit: what a candidate's log wealth had to reach.
    """

    candidates: list[Candidate]
    start: int
    stop: int
    count: int
    limit: float

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

    def recognise(self, labels: np.ndarray, scores: MaskScores, references: list[Reference], classes: int) -> Verdict:
        """Weighs a batch, labels int64 (n,), under k masks; `scores` of shape (k, n), `classes` known so far."""
        if not references:
            return Verdict([], 0, len(labels), len(labels), -math.log(self.false_alarm))
        null = np.stack([null_probability(labels, r, classes) for r in references])
        whole = self._weigh(labels, scores, references, null, (0, len(labels)))
        rows, rest_explained = self._change_point(scores.label_probability, null)
        if rows == (0, len(labels)) or (whole.known and not rest_explained):
            return whole  # a part that no other task explains belongs to the task that explains the batch
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
        limit = math.log(len(references) / self.false_alarm)
        wrong = (scores.predicted[:, part] != labels[None, part]).sum(axis=1)
        ratios = scores.label_probability[:, part] / null[:, part]
        candidates = [
            self._candidate(index, rows, int(wrong[index]), mixed(log_wealth(ratios[index])), reference, limit)
            for index, reference in enumerate(references)
        ]
        candidates.sort(key=lambda c: (not c.known, -c.wealth))
        return Verdict(candidates, *rows, len(labels), limit)

    def _candidate(
        self,
        index: int,
        rows: tuple[int, int],
        errors: int,
        wealth: float,
        reference: Reference,
        limit: float,
    ) -> Candidate:
        tail = beta_binomial_tail(errors, rows[1] - rows[0], reference.errors + 0.5, reference.hits + 0.5)
        return Candidate(index, *rows, errors, tail, wealth, tail >= self.false_alarm, wealth >= limit)

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
