"""What an operator does to tasks: retire, reopen, merge, split.

Each is one transaction; only after it the engine and the served snapshot take it over. All run in the learning thread
(`Worker.call`). No history is lost: mask versions and decisions are only added to, ledger rows only change hands.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import structlog

from storage import decisions, ledger, masks, tasks, training_states
from storage.models import BatchRow, Kind
from storage.tasks import TaskConflict, TaskUnknown
from supsupd import persistence
from supsupd.learning.bank import Mask
from supsupd.learning.network import Network
from supsupd.learning.records import TaskRecord
from supsupd.learning.reference import Reference
from supsupd.worker import Engine, Worker

if TYPE_CHECKING:
    from storage.db import Session

log = structlog.get_logger("supsupd.learning")


@dataclass(frozen=True)
class Move:
    """Batches that change hands; `operation` and `batch` (where a split begins) say why, in their decisions."""

    operation: str
    source: int
    target: int
    batch: int | None = None

    @property
    def reason(self) -> str:
        if self.batch is None:
            return f"task {self.source} was merged into task {self.target}"
        return f"split from task {self.source} at batch {self.batch}"


def retire(worker: Worker, task_id: int) -> None:
    """A task is no longer served, recognised or trained. Raises TaskUnknown, TaskConflict, StoreError."""
    engine = _engine(worker, task_id)
    with worker.database.write() as session:
        tasks.retire(session, task_id)
    engine.learner.forget_task(task_id)
    engine.withdraw(task_id)
    log.info("task_retired", task=task_id)


def reopen(worker: Worker, task_id: int) -> None:
    """A retired task goes on as it was. Raises TaskUnknown, TaskConflict, MaskCorrupt, StoreError."""
    engine = _engine(worker, task_id)
    with worker.database.write() as session:
        tasks.reopen(session, task_id)
        record = persistence.load_task(session, task_id, engine.network)
        # The latest used, here as in the engine: both drop the same states.
        training_states.touch(session, task_id)
        training_states.keep_recent(session, worker.settings.learning.active_tasks)
    engine.learner.restore_task(record)
    engine.serve(record)
    log.info("task_reopened", task=task_id)


def merge(worker: Worker, task_id: int, other_id: int) -> None:
    """`other_id` goes into `task_id`, which keeps its mask and answers for both.

    Raises TaskUnknown, TaskConflict, StoreError.
    """
    engine = _engine(worker, task_id)
    with worker.database.write() as session:
        row = tasks.merge(session, task_id, other_id)
        training_states.forget(session, other_id)
        _move(session, ledger.list_committed(session, other_id), Move("merge", other_id, task_id))
        merged = replace(engine.learner.tasks[task_id], batches=row.batches, samples=row.samples)
        merged = replace(merged, inputs=persistence.merge_inputs(session, task_id, other_id))
    engine.learner.forget_task(other_id)
    engine.learner.tasks[task_id] = merged  # in its place: a merge is no use of the task
    engine.serve(merged)
    engine.withdraw(other_id, task_id)
    log.info("tasks_merged", task=task_id, merged=other_id)


def split(worker: Worker, task_id: int, batch_id: int) -> int:
    """The batches of a task from `batch_id` on become a new task, with its newest mask; the old one gets, as a new
    version, the bits and the record that it had before. Returns the new task's id.

    Raises TaskUnknown, TaskConflict (nothing would be left, or nothing would go), MaskCorrupt, StoreError.
    """
    engine = _engine(worker, task_id)
    with worker.database.write() as session:
        tasks.load_active(session, task_id)
        whole = persistence.load_task(session, task_id, engine.network)
        moved, before = _parts(session, task_id, batch_id)
        rows = sum(len(persistence.taken_rows(session, row)) for row in moved)
        old = _earlier(whole, before, len(moved), rows)
        new = _store_new(session, replace(whole, batches=len(moved), samples=rows), batch_id, engine.network)
        reason = f"split at batch {batch_id}: the bits of version {before.version}"
        masks.append_mask(session, persistence.mask_row(old, engine.network.architecture, None, reason))
        tasks.update(session, task_id, persistence.task_fields(old), seen=False)
        training_states.forget(session, task_id)
        _move(session, moved, Move("split", task_id, new.task_id, batch_id))
    engine.learner.forget_task(task_id)
    for record in (old, new):
        engine.learner.restore_task(record)
        engine.serve(record)
    log.info("task_split", task=task_id, batch=batch_id, new=new.task_id, batches=len(moved))
    return new.task_id


def _engine(worker: Worker, task_id: int) -> Engine:
    if worker.engine is None:
        raise TaskUnknown(f"there is no task {task_id}")
    return worker.engine


def _parts(session: Session, task_id: int, batch_id: int) -> tuple[list[BatchRow], masks.MaskRow]:
    """The batches that go, and the mask that stays."""
    moved = ledger.list_committed(session, task_id, batch_id)
    if not moved:
        raise TaskConflict(f"task {task_id} has learned no batch from {batch_id} on")
    version = masks.find_before(session, task_id, batch_id)
    if version is None:
        raise TaskConflict(f"task {task_id} had no mask before batch {batch_id}: nothing would be left of it")
    return moved, masks.load_mask(session, task_id, version)


def _earlier(task: TaskRecord, mask: masks.MaskRow, batches: int, samples: int) -> TaskRecord:
    """A task as it was at an earlier version, as its newest one, without the batches that it loses."""
    return replace(
        task,
        version=task.version + 1,
        mask=Mask(np.frombuffer(mask.packed, np.uint8)),
        density=mask.density,
        # Version 0.1 kept no record with a mask.
        reference=task.reference if mask.reference is None else Reference.from_json(mask.reference),
        batches=task.batches - batches,
        samples=task.samples - samples,
        state=None,
    )


def _store_new(session: Session, task: TaskRecord, batch_id: int, network: Network) -> TaskRecord:
    """Stores `task` as a new one, whose mask was made by the same batch."""
    source, maker = task.task_id, masks.load_mask(session, task.task_id).batch_id
    task = replace(task, version=1, key=None)
    last_seen = tasks.load_task(session, source).last_seen_at
    task = replace(task, task_id=tasks.create(session, persistence.task_fields(task), last_seen))
    reason = Move("split", source, task.task_id, batch_id).reason
    masks.append_mask(session, persistence.mask_row(task, network.architecture, maker, reason))
    if task.state is not None:
        training_states.save(session, task.task_id, task.version, task.state.to_bytes())
    return task


def _move(session: Session, rows: Iterable[BatchRow], move: Move) -> None:
    """Ledger rows change hands; a decision is added to each, which keeps what rows were taken of it."""
    for row in rows:
        taken = persistence.taken_rows(session, row)
        evidence: dict[str, Any] = {"operation": move.operation, "from_task": move.source, "to_task": move.target}
        evidence |= taken.to_json() | {"batch_rows": row.samples}
        if move.batch is not None:
            evidence["batch"] = move.batch
        ledger.reassign(session, row.id, move.target, move.reason)
        kind: Kind = "new" if row.decision == "new" else "known"
        decisions.record(session, row.id, decisions.Decision(kind, move.target, evidence, move.reason))
