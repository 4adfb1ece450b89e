"""The snapshot that serves: all masks and what is needed to answer a query. Immutable; a new one replaces it whole."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch

from supsupd.learning.inference import EvidenceName, Method, Scorer, entropy, one_shot
from supsupd.learning.labels import ClassList
from supsupd.learning.normalise import Normaliser
from supsupd.learning.recognition import Gauge

ROUTING_ROWS = 128
"""Rows of a pooled query that name its task; more would cost time and no longer change the answer."""


@dataclass(frozen=True)
class ServedTask:
    """One task's newest mask, uint8 (mask_bytes,), and the record of the evidence that routes to it."""

    task_id: int
    version: int
    packed: np.ndarray
    evidence: Gauge


@dataclass(frozen=True)
class Answer:
    """For n rows: class indices (n,), probabilities (n, classes), task ids (n,), entropy in nats (n,), known (n,).

    `surprise` is the mean standardised evidence and `limit` what it may be for a known task.
    """

    predicted: np.ndarray
    probabilities: np.ndarray
    task: np.ndarray
    entropy: np.ndarray
    known: np.ndarray
    surprise: float
    limit: float


@dataclass(frozen=True)
class Inference:
    """The task of n rows: its place (n,), and its standardised evidence (n,), each the mean of `averaged` rows."""

    place: np.ndarray
    surprise: np.ndarray
    averaged: int


@dataclass(frozen=True)
class Predictor:
    """Answers queries from a fixed set of masks.

    Args:
        scorer: runs samples under masks.
        normaliser, classes: what inputs and labels mean.
        method, evidence, false_alarm: how the task is inferred, and how rarely a known one is called unknown.
        tasks: in the order of their ids.
    """

    scorer: Scorer
    normaliser: Normaliser
    classes: ClassList
    method: Method
    evidence: EvidenceName
    false_alarm: float
    tasks: tuple[ServedTask, ...] = ()

    def with_mask(self, task: ServedTask, classes: ClassList) -> Predictor:
        """A new snapshot in which `task` replaces its older version or is added."""
        others = [t for t in self.tasks if t.task_id != task.task_id]
        ordered = tuple(sorted([*others, task], key=lambda t: t.task_id))
        return replace(self, tasks=ordered, classes=classes)

    @cached_property
    def bank(self) -> np.ndarray:
        """All masks, uint8 (k, mask_bytes)."""
        return np.stack([task.packed for task in self.tasks])

    def place_of(self, task_id: int) -> int | None:
        return next((place for place, task in enumerate(self.tasks) if task.task_id == task_id), None)

    def predict(self, x: np.ndarray, place: int | None, per_sample: bool) -> Answer:
        """Answers for raw rows x (n, ...), n >= 1, under the mask at `place` or under inferred ones.

        Raises ShapeMismatch.
        """
        rows = self.normaliser(x)
        if place is not None:
            inferred = self._given(np.full(len(rows), place), rows, pooled=not per_sample)
        else:
            inferred = self.infer_task(rows, per_sample)
        return self._answer(rows, inferred)

    def infer_task(self, rows: np.ndarray, per_sample: bool) -> Inference:
        """The task of normalised rows (n, inputs): of each by itself, or of all together."""
        if self.method == "one-shot":
            groups = [rows[i : i + 1] for i in range(len(rows))] if per_sample else [rows[:ROUTING_ROWS]]
            places = np.array([int(np.argmax(one_shot(self.scorer.network, self.bank, g))) for g in groups])
            return self._given(np.broadcast_to(places, len(rows)), rows, pooled=not per_sample)
        seen = rows if per_sample else rows[:ROUTING_ROWS]
        raw = self.scorer.score(seen, self.bank, len(self.classes)).evidence[self.evidence]
        surprise = self._standardised(raw, np.arange(len(self.tasks)))
        if not per_sample:
            surprise = np.broadcast_to(surprise.mean(axis=1, keepdims=True), (len(self.tasks), len(rows)))
        places = surprise.argmin(axis=0)
        return Inference(places, surprise[places, np.arange(len(rows))], 1 if per_sample else len(seen))

    def _given(self, places: np.ndarray, rows: np.ndarray, pooled: bool) -> Inference:
        """The standardised evidence of rows under masks that are given."""
        surprise = np.empty(len(rows))
        for place in np.unique(places):
            mine = places == place
            scores = self.scorer.score(rows[mine], self.bank[place : place + 1], len(self.classes))
            raw = scores.evidence[self.evidence]
            surprise[mine] = self._standardised(raw, np.array([place]))[0]
        if pooled:
            return Inference(places, np.full(len(rows), surprise.mean()), len(rows))
        return Inference(places, surprise, 1)

    def _standardised(self, raw: np.ndarray, places: np.ndarray) -> np.ndarray:
        """Evidence (k, n) in standard deviations above each mask's own mean."""
        gauges = [self.tasks[place].evidence for place in places.tolist()]
        return np.stack([gauge.surprise(values) for gauge, values in zip(gauges, raw, strict=True)])

    def _answer(self, rows: np.ndarray, inferred: Inference) -> Answer:
        count, classes = len(rows), len(self.classes)
        probabilities = np.empty((count, classes), np.float32)
        entropies = np.empty(count, np.float32)
        for place in np.unique(inferred.place):
            mine = inferred.place == place
            logits = next(iter(self.scorer.iter_logits(rows[mine], self.bank[place : place + 1])))
            probabilities[mine] = torch.softmax(logits[:, :classes], dim=-1).cpu().numpy()
            entropies[mine] = entropy(logits).cpu().numpy()
        limits = self._limits(inferred.place, inferred.averaged)
        return Answer(
            predicted=probabilities.argmax(axis=1),
            probabilities=probabilities,
            task=np.array([self.tasks[place].task_id for place in inferred.place.tolist()], dtype=np.int64),
            entropy=entropies,
            known=inferred.surprise <= limits,
            surprise=float(inferred.surprise.mean()),
            limit=float(limits.mean()),
        )

    def _limits(self, places: np.ndarray, rows: int) -> np.ndarray:
        """How surprised each mask may be by `rows` rows of its own task."""
        limits = np.array([task.evidence.limit(rows, self.false_alarm) for task in self.tasks])
        return limits[places]
