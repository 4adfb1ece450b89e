"""A stream that mixes a known task and a new one row by row: what does the new one consist of?

The batches that a guard took back may hold rows of the task that had learned them. Two explanations compete by what
they predicted of each batch before they were trained on it: one new mask for all rows, or the known mask for the rows
that it has right and a new mask for the rest, held in one mixture over all rows, so that nothing is gained by the
choice of the rows.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace

import numpy as np

from supsupd.learning.explanations import floored
from supsupd.learning.provisional import Nursery, Provisional
from supsupd.learning.recognition import null_probability
from supsupd.learning.records import Member, TaskRecord
from supsupd.learning.statistics import BETS, mixed, split_rows
from supsupd.learning.workshop import Workshop


def suspected_companion(provisional: Provisional) -> int | None:
    """The task that most of the members were taken back from, if they are half of all or more."""
    counts = Counter(m.recalled_from for m in provisional.members if m.recalled_from is not None)
    task_id, count = counts.most_common(1)[0] if counts else (None, 0)
    return task_id if 2 * count >= len(provisional.members) else None


@dataclass(frozen=True)
class Evidence:
    """Log likelihoods of the newer tested members' labels, each batch before it was trained on.

    Args:
        alone: of the new mask trained on all rows.
        together: of the mixture of the known mask and the one trained on the other rows.
        without: of the mixture of the known mask and mere label frequencies, its share the best in hindsight.
    """

    alone: float
    together: float
    without: float

    def speaks_for_both(self, false_alarm: float, promote_error: float) -> bool:
        """Whether two sources are proved, and clearly better than one."""
        better = self.together - self.alone >= -math.log(false_alarm)
        return better and self.together - self.without >= -math.log(promote_error)


class Separation:
    """Takes the rows of a known task out of a provisional one."""

    def __init__(self, workshop: Workshop, nursery: Nursery, classes: int) -> None:
        self._workshop = workshop
        self._nursery = nursery
        self._classes = classes

    def separated(self, provisional: Provisional, task: TaskRecord) -> Provisional | None:
        """The provisional task without the rows that the known task's mask has right; None unless two sources are
        proved."""
        members = tuple(m for m in (self._left(member, task) for member in provisional.members) if m is not None)
        if len(members) < 2:
            return None
        other = self._nursery.rebuilt(provisional.provisional_id, members, self._classes)
        settings = self._workshop.settings
        proved = other.wealth() >= -math.log(settings.promote_error)
        evidence = self._evidence(provisional, other, task)
        return other if proved and evidence.speaks_for_both(settings.false_alarm, settings.promote_error) else None

    def _left(self, member: Member, task: TaskRecord) -> Member | None:
        """The member without the rows that the task's mask has right; None if nothing is left."""
        scores = self._workshop.score(member.part, [task.mask], self._classes)
        right = np.flatnonzero(scores.predicted[0] == member.part.y.cpu().numpy()) + member.start
        left_out = np.union1d(right, member.left_out).astype(np.int64)
        return replace(member, left_out=tuple(left_out.tolist())) if len(left_out) < len(member.part) else None

    def _evidence(self, whole: Provisional, other: Provisional, task: TaskRecord) -> Evidence:
        tested = {m.batch.batch_id: p for m, p in zip(whole.members[1:], whole.tested, strict=True)}
        pairs = [(m, p) for m, p in zip(other.members[1:], other.tested, strict=True) if m.batch.batch_id in tested]
        alone = together = without = 0.0
        for member, probability in pairs[len(pairs) // 2 :]:
            labels = member.part.y.cpu().numpy()
            null = null_probability(labels, task.reference, self._classes)
            known = self._workshop.score(member.part, [task.mask], self._classes).label_probability[0]
            known, foreign = floored(known, null), floored(probability, null)
            alone += _best_share(null, tested[member.batch.batch_id])
            together += _best_share(known, foreign)
            without += split_rows(known, null)[1]
        return Evidence(alone, together, without)


def _best_share(first: np.ndarray, second: np.ndarray) -> float:
    """Log likelihood of a mixture of two sources, averaged over shares."""
    shares = BETS[:, None]
    return mixed(np.log((1.0 - shares) * first + shares * second).sum(axis=1))
