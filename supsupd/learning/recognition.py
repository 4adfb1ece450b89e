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
and by another, or by none, after it (one change point, by likelihood), or by two tasks row by row (a mixture).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from supsupd.learning.explanations import change_point, mixture
from supsupd.learning.inference import MaskScores
from supsupd.learning.reference import Reference
from supsupd.learning.statistics import log_wealth, mixed


@dataclass(frozen=True)
class Candidate:
    """One task's evidence on rows start:stop of a batch; `task` is its place among the references, or its id.

    Args:
        errors: rows that the mask has wrong.
        denied: mean probability (n,) denied to the labels, and what it may be: `denied_limit`.
        wealth: log wealth of betting on the mask, and what it has to reach: `wealth_needed`.
        foreign: rows of the batch, of those that decide, that lie far outside what the task has seen.
    """

    task: int
    start: int
    stop: int
    errors: int
    denied: np.ndarray
    denied_limit: float
    wealth: float
    wealth_needed: float
    foreign: tuple[int, ...] = ()

    @property
    def consistent(self) -> bool:
        return float(self.denied.mean()) <= self.denied_limit

    @property
    def better_than_chance(self) -> bool:
        return self.wealth >= self.wealth_needed

    @property
    def known(self) -> bool:
        return self.consistent and self.better_than_chance and not self.mostly_foreign

    @property
    def mostly_foreign(self) -> bool:
        return 2 * len(self.foreign) > len(self.denied)

    def to_json(self) -> dict[str, Any]:
        foreign = {"foreign": len(self.foreign)} if self.foreign else {}
        return foreign | {
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
        start, stop: the rows that decide: the whole batch, or the longer side of a change point,
        left_out: but of these the rows that another task explains, or that are foreign to the known one,
        count: of the rows of the batch.
    """

    candidates: list[Candidate]
    start: int
    stop: int
    count: int
    left_out: tuple[int, ...] = ()

    @property
    def known(self) -> Candidate | None:
        return next((c for c in self.candidates if c.known), None)


@dataclass(frozen=True)
class Part:
    """Rows start:stop of a batch without those left out."""

    start: int
    stop: int
    left_out: tuple[int, ...] = ()


@dataclass(frozen=True)
class Recogniser:
    """The rule, with its error rates.

    Args:
        false_alarm: how often a batch of a known task may be taken for something else.
        among: tasks that those compared were picked from, if there are more: what chance may find among them counts.
    """

    false_alarm: float
    among: int = 0

    def recognise(
        self, labels: np.ndarray, scores: MaskScores, references: list[Reference], classes: int, whole: bool = False
    ) -> Verdict:
        """Weighs a batch, labels int64 (n,), under k masks; `scores` of shape (k, n), `classes` known so far.

        No change inside the batch is looked for if it is taken as a `whole`.
        """
        if not references:
            return Verdict([], 0, len(labels), len(labels))
        null = _null(labels, references, classes)
        verdict = self._weigh(labels, scores, references, null, Part(0, len(labels)))
        if whole:
            return verdict
        cut = change_point(scores.label_probability, null, self.false_alarm)
        if cut is not None and verdict.known and not cut.rest_explained:
            cut = None  # a part that no other task explains belongs to the task that explains the batch
        found = [two for two in (cut, mixture(scores.label_probability, null, self.false_alarm)) if two is not None]
        if not found:
            return verdict
        best = max(found, key=lambda two: two.log_likelihood)
        return self._weigh(labels, scores, references, null, Part(best.start, best.stop, best.left_out))

    def weigh_part(
        self, labels: np.ndarray, scores: MaskScores, reference: Reference, classes: int, rows: Part
    ) -> Candidate:
        """One task's evidence on some rows of a batch; `scores` of shape (1, n)."""
        (candidate,) = self._weigh(labels, scores, [reference], _null(labels, [reference], classes), rows).candidates
        return candidate

    def _weigh(
        self,
        labels: np.ndarray,
        scores: MaskScores,
        references: list[Reference],
        null: np.ndarray,
        rows: Part,
    ) -> Verdict:
        part = np.setdiff1d(np.arange(rows.start, rows.stop), rows.left_out)
        wealth_needed = math.log(max(len(references), self.among) / self.false_alarm)
        candidates = [
            Candidate(
                task=index,
                start=rows.start,
                stop=rows.stop,
                errors=int((scores.predicted[index, part] != labels[part]).sum()),
                denied=1.0 - scores.label_probability[index, part],
                denied_limit=reference.denied_ceiling(labels[part], self.false_alarm),
                wealth=mixed(log_wealth(scores.label_probability[index, part] / null[index, part])),
                wealth_needed=wealth_needed,
            )
            for index, reference in enumerate(references)
        ]
        candidates.sort(key=lambda c: (not c.known, -c.wealth))
        return Verdict(candidates, rows.start, rows.stop, len(labels), rows.left_out)


def _null(labels: np.ndarray, references: list[Reference], classes: int) -> np.ndarray:
    return np.stack([null_probability(labels, reference, classes) for reference in references])


def null_probability(labels: np.ndarray, reference: Reference, classes: int) -> np.ndarray:
    """Probability (n,) of each label for one who knows only how often the task's labels occur.

    Half the task's own frequencies, half uniform over the known classes, so that no label is a surprise that pays.
    """
    total = max(sum(reference.labels.values()), 1)
    own = np.array([reference.labels.get(label, 0) / total for label in range(classes)])
    return (0.5 * own + 0.5 / classes)[labels]
