"""What recognition speaks of: batches, tasks as they stand, batches on their way to one, and what one step did."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from supsupd.learning.bank import Mask
from supsupd.learning.index import InputDensity
from supsupd.learning.learner import Samples, TrainingState
from supsupd.learning.reference import Reference

if TYPE_CHECKING:
    from supsupd.learning.guard import Guard
    from supsupd.learning.provisional import Provisional


@dataclass(frozen=True)
class LabelledBatch:
    """A batch ready to learn: its ledger id, its content hash (the seed of its training) and its samples.

    Args:
        given: the user's key of the task it belongs to, in the scenarios where that comes with it (`given`).
        given_id: the task that answers for this key, where it is known; else it is looked for among the tasks' keys.
        content: hash of its samples and labels alone, if `sha256` covers more.
        origin: who sent it: a source, and in it a sender.
        came: rows that it came with, if only some of them are learned.
        size: bytes that are kept of it while it waits.
    """

    batch_id: int
    sha256: str
    samples: Samples
    given: str | None = None
    given_id: int | None = None
    content: str | None = None
    origin: str = ""
    came: int | None = None
    size: int = 0

    @property
    def seed(self) -> str:
        """What seeds its training: nothing that may come with the samples changes a bit of a mask."""
        return self.content or self.sha256


@dataclass(frozen=True, slots=True)
class TaskRecord:
    """A task as it stands: its newest mask and its record.

    `state` is None when only the bits are kept, `key` where the user has not given one, `inputs` where it is not known
    what its inputs look like.
    """

    task_id: int
    version: int
    mask: Mask
    density: float
    reference: Reference
    batches: int
    samples: int
    state: TrainingState | None = None
    key: str | None = None
    inputs: InputDensity | None = None

    @property
    def packed(self) -> np.ndarray:
        """The mask's bits, uint8 (mask_bytes,)."""
        return self.mask.packed


@dataclass(frozen=True)
class Member:
    """A batch on its way to a task; of its rows start:stop those that are not `left_out` are taken.

    Args:
        left_out: row numbers of the batch between start and stop, ascending, that something else explains.
        recalled_from: the task that had learned the batch before its guard took it back.
    """

    batch: LabelledBatch
    start: int
    stop: int
    left_out: tuple[int, ...] = ()
    recalled_from: int | None = None

    @property
    def part(self) -> Samples:
        """Rows start:stop, those left out included."""
        return self.batch.samples.rows(self.start, self.stop)

    @property
    def samples(self) -> Samples:
        """The rows taken."""
        if not self.left_out:
            return self.part
        return self.batch.samples.take(np.setdiff1d(np.arange(self.start, self.stop), self.left_out))

    def to_json(self) -> dict[str, Any]:
        """Which rows are taken, as evidence."""
        rows = {"rows": [self.start, self.stop], "batch_rows": len(self.batch.samples)}
        left_out = {"left_out": list(self.left_out)} if self.left_out else {}
        recalled = {} if self.recalled_from is None else {"recalled_from": self.recalled_from}
        return rows | left_out | recalled


@dataclass(frozen=True)
class Change:
    """What one step did; everything of it is stored together.

    Args:
        task: the task that learned, or was set back, as it is now; task_id 0 when it is new.
        trained: whether the task's mask is a new version; False when the held-out rows refused the update.
        assigned: the batches that the task got, in order; the last one decided.
        kind: known, new or unsure.
        evidence: why, as JSON.
        provisional: the provisional task that took the batch, when it stays unsure, or what is left of one.
        closed: provisional tasks that are no more: promoted, absorbed or given up.
        given_up: batches of provisional tasks that were given up undecided.
        released: those that others had sent into these tasks: they have another turn.
        recalled: batches that a late alarm took back from the task, in order, and last the one that raised it; all
            are members of `provisional` now.
        guard: what watches the task from now on.
    """

    kind: Literal["known", "new", "unsure"]
    evidence: dict[str, Any]
    task: TaskRecord | None = None
    trained: bool = False
    assigned: tuple[Member, ...] = ()
    provisional: Provisional | None = None
    closed: tuple[int, ...] = ()
    given_up: tuple[LabelledBatch, ...] = ()
    released: tuple[LabelledBatch, ...] = ()
    recalled: tuple[Member, ...] = ()
    guard: Guard | None = None

    @property
    def may_explain_more(self) -> bool:
        """Whether batches that are unsure are to be asked again: a task was found, or set back."""
        return self.kind == "new" or bool(self.recalled)


def pooled(members: tuple[Member, ...]) -> Samples:
    """The rows taken of all members, in order."""
    return Samples.joined([m.samples for m in members])
