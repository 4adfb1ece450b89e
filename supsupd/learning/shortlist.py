"""Which tasks a labelled batch is compared with, where there are too many to ask each of them every time.

First those used last, which a steady stream goes on with, and those whose inputs look most like the batch's. Only what
none of these explains is shown to every task, a few rows of it: a batch is never called foreign unheard.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from supsupd.learning.index import TaskIndex
from supsupd.learning.learner import Samples
from supsupd.learning.records import TaskRecord
from supsupd.learning.workshop import Workshop

HEARD_ROWS = 8
"""Rows of a batch that every task sees."""


def likely(tasks: Sequence[TaskRecord], samples: Samples, count: int, workshop: Workshop) -> list[TaskRecord]:
    """About `count` of the tasks, in their order (the one used last at the end); all if there are no more.

    A quarter are those used last. The others have the most likely inputs: half for the first rows, half for the last
    ones, since two tasks may share a batch. Tasks whose inputs are not known come on top.
    """
    if len(tasks) <= count:
        return list(tasks)
    recent = count // 4
    index, kernels = TaskIndex([task.inputs for task in tasks]), workshop.scorer.kernels
    x = samples.x.cpu().numpy()
    places = {*range(len(tasks) - recent, len(tasks))}
    for half in _halves(x):
        places |= {*index.shortlist(half, (count - recent) // 2, kernels).tolist()}
    return [tasks[place] for place in sorted(places)]


def heard(tasks: Sequence[TaskRecord], samples: Samples, count: int, workshop: Workshop, classes: int) -> set[int]:
    """Ids of about `count` tasks whose masks know the labels of a few rows best, again half for either end."""
    rows = np.unique(np.linspace(0, len(samples) - 1, HEARD_ROWS).astype(np.int64))
    scores = workshop.score(samples.take(rows), [task.mask for task in tasks], classes)
    known = np.log(np.maximum(scores.label_probability, np.finfo(np.float32).tiny)).T
    best = [np.argsort(-half.sum(axis=0), kind="stable")[: max(1, count // 2)] for half in _halves(known)]
    return {tasks[place].task_id for place in np.concatenate(best).tolist()}


def _halves(rows: np.ndarray) -> Iterator[np.ndarray]:
    """The first and the last rows (n, ...), each at least one."""
    middle = (len(rows) + 1) // 2
    yield rows[:middle]
    yield rows[len(rows) - middle :]
