"""A late alarm: batches that each passed as a task's own, but together cannot be.

A guard keeps the task as it was before the first suspicious batch (the snapshot) and watches what its mask denies to
the labels of the batches since then, against its record: an e-detector with restarts (Shin, Ramdas, Rinaldo 2022).
While nothing is wrong the wealth of the bet "they are foreign" is soon at most 1, and the snapshot moves on. When it
reaches 1 / `false_alarm`, the task goes back to the snapshot and its window is taken back. While the stream does not
change, that happens once in 1 / `false_alarm` batches of the task or less often, on average.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from supsupd.learning.records import Member, TaskRecord
from supsupd.learning.statistics import gamma_score, log_shift_wealth

WINDOW_BATCHES = 32
WINDOW_ROWS = 4096
"""A window ends there in any case: its batches stay in memory and in the spool."""


@dataclass(frozen=True)
class Guard:
    """The snapshot of a task and the batches that the task has learned since.

    Args:
        members: the batches of the window, in order.
        labels, denied: of their rows, the class index and what the snapshot's mask denied to it (n,).
        log_wealth: of the bet that the window is foreign.
    """

    snapshot: TaskRecord
    members: tuple[Member, ...] = ()
    labels: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    denied: np.ndarray = field(default_factory=lambda: np.empty(0))
    log_wealth: float = 0.0

    def with_batch(self, member: Member, labels: np.ndarray, denied: np.ndarray) -> Guard:
        """After one batch more; denied (n,) by the snapshot's mask."""
        labels, denied = np.concatenate([self.labels, labels]), np.concatenate([self.denied, denied])
        mean, variance = self.snapshot.reference.denied_law(labels)
        wealth = log_shift_wealth(gamma_score(float(denied.mean()), mean, variance), variance)
        return Guard(self.snapshot, (*self.members, member), labels, denied, wealth)

    def alarmed(self, false_alarm: float) -> bool:
        """Whether the window is taken for foreign."""
        return self.log_wealth >= -math.log(false_alarm)

    def settled(self, learned: TaskRecord) -> Guard:
        """After the task has learned the newest batch: goes on, or starts anew where there is no suspicion left."""
        full = len(self.members) >= WINDOW_BATCHES or len(self.labels) >= WINDOW_ROWS
        return Guard(learned) if self.log_wealth <= 0.0 or full else self
