"""The snapshot that serves: all masks and what is needed to answer a query. Immutable; a new one replaces it whole."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch

from supsupd.choices import Method, Objective
from supsupd.learning.bank import Masks
from supsupd.learning.features import FeatureModel
from supsupd.learning.index import TaskIndex
from supsupd.learning.inference import (
    MethodUnavailable,
    NoSuperfluousNeurons,
    ObjectiveUnavailable,
    Scorer,
    Slopes,
    Superposition,
    halving,
    halving_work,
)
from supsupd.learning.joint import answer_together
from supsupd.learning.labels import ClassList
from supsupd.learning.normalise import Normaliser
from supsupd.learning.queries import ROUTING_ROWS, Answer, Query, ServedTask, Shortlist
from supsupd.learning.reference import Gauge, gauge_columns
from supsupd.learning.reservoir import Recovery, pattern_hash

HALVING_ROWS = 8
"""Rows that all masks see before the worse half of them is dropped."""
PASS_ROWS = 32
"""Rows routed one by one in one pass over the masks."""
SHORTLIST_ROWS = 8
"""The same where each of them has a shortlist."""


@dataclass(frozen=True)
class Predictor:
    """Answers queries from a fixed set of masks.

    Args:
        scorer: runs samples under masks.
        normaliser, classes: what inputs and labels mean.
        method, objective: how the task is inferred unless a query says otherwise.
        false_alarm: how rarely a known task is called unknown.
        tasks: in the order of their ids.
        merged: the id of each task that was merged, with that of the task that answers for it.
        labels_shared: whether a task may answer with classes that it has never seen.
        features: what is known of the tasks' inputs, for objective features; None where it is not kept.
        recovery: finds the masks that the reservoir holds, for method recover; None without a reservoir.
        shortlist: how many tasks are scored exactly where there are more, those of the most likely inputs; None: all.
    """

    scorer: Scorer
    normaliser: Normaliser
    classes: ClassList
    method: Method
    objective: Objective
    false_alarm: float
    tasks: tuple[ServedTask, ...] = ()
    merged: Mapping[int, int] = field(default_factory=dict)
    labels_shared: bool = True
    features: FeatureModel | None = None
    recovery: Recovery | None = None
    shortlist: Shortlist | None = None

    def with_mask(self, task: ServedTask, classes: ClassList) -> Predictor:
        """A new snapshot in which `task` replaces its older version or is added."""
        place, there = self._found(task.task_id)
        tasks = (*self.tasks[:place], task, *self.tasks[place + there :])
        return replace(self, tasks=tasks, classes=classes)

    def with_masks(self, tasks: Sequence[ServedTask], classes: ClassList) -> Predictor:
        """The same for several tasks."""
        if len(tasks) == 1:
            return self.with_mask(tasks[0], classes)
        found = {task.task_id: task for task in (*self.tasks, *tasks)}
        return replace(self, tasks=tuple(found[task_id] for task_id in sorted(found)), classes=classes)

    def without_task(self, task_id: int, into: int | None = None) -> Predictor:
        """A new snapshot that does not serve a task; the task `into` answers for it, if there is one."""
        others = tuple(t for t in self.tasks if t.task_id != task_id)
        merged = self.merged if into is None else {**self.merged, task_id: into}
        return replace(self, tasks=others, merged=merged)

    def _found(self, task_id: int) -> tuple[int, bool]:
        """Where a task is among those served, or would be, and whether it is there."""
        place = bisect_left(self.tasks, task_id, key=lambda task: task.task_id)
        return place, place < len(self.tasks) and self.tasks[place].task_id == task_id

    @cached_property
    def masks(self) -> Masks:
        return Masks([task.mask for task in self.tasks])

    @cached_property
    def _index(self) -> TaskIndex:
        return TaskIndex([task.inputs for task in self.tasks])

    @cached_property
    def _superposed(self) -> Superposition:
        """All masks at once, for one-shot and binary; made at the first query that wants it."""
        return self._slopes(self.objective, None).superposed(np.arange(len(self.tasks)))

    def _slopes(self, objective: Objective, everything: Superposition | None) -> Slopes:
        return Slopes(self.scorer, self.masks, objective, len(self.classes), everything)

    def version_of(self, task_id: int) -> int | None:
        """The version of the mask that is served for a task itself; None where none is."""
        place, there = self._found(task_id)
        return self.tasks[place].version if there else None

    def place_of(self, task_id: int) -> int | None:
        """Where the mask is that answers for a task; None when none is served."""
        while task_id in self.merged:
            task_id = self.merged[task_id]
        place, there = self._found(task_id)
        return place if there else None

    def predict(
        self,
        x: np.ndarray,
        place: int | None,
        per_sample: bool,
        method: Method | None = None,
        objective: Objective | None = None,
    ) -> Answer:
        """Answers for raw rows x (n, ...), n >= 1, under the mask at `place` or under inferred ones.

        `method` and `objective` are the predictor's own unless given. Raises ShapeMismatch, ObjectiveUnavailable.
        """
        (answer,) = answer_together(self, [(x, self.query(place, per_sample, method, objective))])
        if isinstance(answer, Exception):
            raise answer
        return answer

    def query(
        self, place: int | None, per_sample: bool, method: Method | None = None, objective: Objective | None = None
    ) -> Query:
        """A query, in the predictor's own way unless another is given. Raises ObjectiveUnavailable."""
        query = Query(place, per_sample, method or self.method, objective or self.objective)
        if query.objective == "g" and len(self.classes) >= self.scorer.network.architecture.outputs:
            raise NoSuperfluousNeurons(f"objective g needs more outputs than the {len(self.classes)} classes")
        return query

    def is_light(self, asked: Sequence[tuple[int, Query]]) -> bool:
        """Whether answers to queries of so many rows take two milliseconds or so together, and wait for nothing."""
        inferred = [query for _, query in asked if query.place is None]
        if any(query.method != "exact" or query.objective == "features" for query in inferred):
            return False
        if inferred and self._shortened:
            return False
        masks = [self.tasks[query.place].mask for _, query in asked if query.place is not None]
        masks += self.masks if inferred else ()
        return self.scorer.is_light(sum(rows + self._scored(rows, query) for rows, query in asked), masks)

    def _scored(self, rows: int, query: Query) -> int:
        """How many rows times masks are scored at most to name the tasks of so many rows."""
        if query.place is not None:
            return 0
        if query.per_sample:
            return rows * len(self.tasks)
        return halving_work(len(self.tasks), min(rows, ROUTING_ROWS), HALVING_ROWS)

    def infer(self, rows: np.ndarray, query: Query) -> np.ndarray:
        """The place of each normalised row's mask (n,): given, or inferred for each row or for all together."""
        if query.place is not None:
            return np.full(len(rows), query.place)
        if query.method == "exact":
            return self._exact(rows, query.objective, query.per_sample)
        slopes = self._slopes(query.objective, self._superposed)
        infer = slopes.one_shot if query.method == "one-shot" else slopes.binary
        if query.per_sample:
            return np.array([infer(rows[i : i + 1]) for i in range(len(rows))])
        return np.full(len(rows), infer(rows[:ROUTING_ROWS]))

    def _exact(self, rows: np.ndarray, objective: Objective, per_sample: bool) -> np.ndarray:
        if per_sample:
            parts = range(0, len(rows), self._shared_rows)
            return np.concatenate([self._each(rows[i : i + self._shared_rows], objective) for i in parts])
        seen = min(len(rows), ROUTING_ROWS)
        places = self._candidates(rows[:seen], objective)

        def surprise(part: slice, among: np.ndarray) -> np.ndarray:
            return self._surprise(rows[part], places[among], objective)

        return np.full(len(rows), places[halving(surprise, len(places), seen, HALVING_ROWS)])

    @property
    def _shared_rows(self) -> int:
        """Rows that are routed one by one but share a pass over the masks: all of them, or those of one shortlist."""
        return SHORTLIST_ROWS if self._shortened else PASS_ROWS

    @property
    def _shortened(self) -> bool:
        return self.shortlist is not None and len(self.tasks) > self.shortlist.above

    def _each(self, rows: np.ndarray, objective: Objective) -> np.ndarray:
        """The place of each row's task by itself (n,): every row is scored under what any of them may be."""
        found = [self._candidates(row[None], objective) for row in rows] if self._shortened else []
        places = np.unique(np.concatenate(found)) if found else np.arange(len(self.tasks))
        best: np.ndarray = places[self._surprise(rows, places, objective).argmin(axis=0)]
        return best

    def _candidates(self, rows: np.ndarray, objective: Objective) -> np.ndarray:
        """The places of the masks that are scored for rows (n, inputs) of one task."""
        if not self._shortened or objective == "features":
            return np.arange(len(self.tasks))
        assert self.shortlist is not None
        return self._index.shortlist(rows, self.shortlist.queried, self.scorer.kernels)

    def _surprise(self, rows: np.ndarray, places: np.ndarray, objective: Objective) -> np.ndarray:
        """How far the rows are from being at home under the masks at `places`, in their own sd: (places, n)."""
        if objective == "features":
            return self._feature_surprise(rows, places)
        raw = self.scorer.evidence(objective, rows, self.masks.take(places), len(self.classes))
        means, sds = self._gauges(objective, places)
        return (raw - means[:, None]) / sds[:, None]

    def _gauges(self, objective: Objective, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation (places,) of an evidence under each mask on its own task."""
        if len(places) < len(self.tasks):
            return gauge_columns([self.gauge(place, objective) for place in places.tolist()])
        if objective not in self._columns:
            self._columns[objective] = gauge_columns([self.gauge(place, objective) for place in places.tolist()])
        return self._columns[objective]

    @cached_property
    def _columns(self) -> dict[Objective, tuple[np.ndarray, np.ndarray]]:
        return {}

    @cached_property
    def _hashes(self) -> tuple[str, ...]:
        """SHA-256 of each mask, in the order of the places."""
        return tuple(pattern_hash(task.packed) for task in self.tasks)

    def recovered(self, rows: np.ndarray, query: Query) -> tuple[np.ndarray, np.ndarray]:
        """The place of each row's mask (n,), and whether it was found by descent (n,)."""
        if self.recovery is None:
            raise MethodUnavailable("method recover needs a reservoir (reservoir.enabled = true)")
        if query.per_sample:
            found = [self._retrieve(rows[i : i + 1], query) for i in range(len(rows))]
        else:
            found = [self._retrieve(rows[:ROUTING_ROWS], query)] * len(rows)
        return np.array([place for place, _ in found]), np.array([recovered for _, recovered in found])

    def _retrieve(self, rows: np.ndarray, query: Query) -> tuple[int, bool]:
        """The place of one mask for all rows, and whether it was found by descent.

        What is found has to be at home with the rows, and more so than any mask that is not finished and therefore
        not in the reservoir. Otherwise all masks are compared.
        """
        assert self.recovery is not None
        held = self.recovery.reservoir.patterns
        found = None
        if held:
            match = self.recovery.run(torch.from_numpy(rows).to(self.scorer.network.device)).match
            found = held[match] if match is not None else None
        places = np.array([i for i, digest in enumerate(self._hashes) if digest == found or digest not in held], int)
        if len(places):
            surprises = self._surprise(rows, places, query.judged).mean(axis=1)
            best = int(places[surprises.argmin()])
            if surprises.min() <= self.gauge(best, query.judged).limit(len(rows), self.false_alarm):
                return best, self._hashes[best] == found
        return int(self._exact(rows, query.objective, per_sample=False)[0]), False

    def allowed(self, place: int) -> np.ndarray:
        """What the mask at `place` may answer with, bool (classes,): all, or the classes that its task has seen."""
        if self.labels_shared:
            return self._every_class
        allowed = np.zeros(len(self.classes), np.bool_)
        allowed[list(self.tasks[place].labels)] = True
        return allowed

    @cached_property
    def _every_class(self) -> np.ndarray:
        return np.ones(len(self.classes), np.bool_)

    def _feature_surprise(self, rows: np.ndarray, places: np.ndarray) -> np.ndarray:
        if self.features is None:
            raise ObjectiveUnavailable("objective features needs recognition.features = true")
        x = torch.from_numpy(rows).to(self.scorer.network.device)
        return self.features.surprise(x, [self.tasks[place].task_id for place in places.tolist()])

    def gauge(self, place: int, objective: Objective) -> Gauge:
        """A mask's record of an evidence; one that was never measured leaves values as they are."""
        return self.tasks[place].evidence.get(objective, Gauge(variance=1.0))
