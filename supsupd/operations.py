"""What an operator does to tasks: retire, reopen, merge, split, roll back.

Each is one transaction; only after it the engine and the served snapshot take it over. All run in the learning thread
(`Worker.call`). No history is lost: mask versions and decisions are only added to, ledger rows only change hands.
Where an operation takes `by`, that is who asked for it: it is kept with what the operation adds.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import structlog

from storage import decisions, ledger, masks, tasks, training_states
from storage.models import BatchRow, Kind
from storage.tasks import TaskConflict, TaskUnknown
from supsupd import persistence
from supsupd.learning.network import Network
from supsupd.learning.records import TaskRecord
from supsupd.worker import Engine, Worker

if TYPE_CHECKING:
    from storage.db import Session

SHOWN_UNDONE = 20
"""Batches whose training was undone that are named."""

log = structlog.get_logger("supsupd.learning")


@dataclass(frozen=True)
class Move:
    """Batches that change hands; `operation` and `batch` (where a split begins) say why, in their decisions."""

    operation: str
    source: int
    target: int
    batch: int | None = None
    by: str | None = None

    @property
    def reason(self) -> str:
        if self.batch is None:
            return f"task {self.source} was merged into task {self.target}"
        return f"split from task {self.source} at batch {self.batch}"


def retire(worker: Worker, task_id: int, by: str | None = None) -> None:
    """A task is no longer served, recognised or trained. Raises TaskUnknown, TaskConflict, StoreError."""
    engine = _engine(worker, task_id)
    with worker.database.write() as session:
        tasks.retire(session, task_id)
    engine.learner.forget_task(task_id)
    engine.withdraw(task_id)
    log.info("task_retired", task=task_id, by=by)


def reopen(worker: Worker, task_id: int, by: str | None = None) -> None:
    """A retired task goes on as it was. Raises TaskUnknown, TaskConflict, MaskCorrupt, StoreError."""
    engine = _engine(worker, task_id)
    with worker.database.write() as session:
        tasks.reopen(session, task_id)
        record = persistence.load_task(session, task_id, engine.network)
        # The latest used, here as in the engine: both drop the same states.
        training_states.touch(session, task_id)
        training_states.keep_recent(session, engine.learner.learner.active_tasks)
    engine.learner.restore_task(record)
    engine.serve(record)
    log.info("task_reopened", task=task_id, by=by)


def merge(worker: Worker, task_id: int, other_id: int, by: str | None = None) -> None:
    """`other_id` goes into `task_id`, which keeps its mask and answers for both.

    Raises TaskUnknown, TaskConflict (one of them is retired, or the first out of service), StoreError.
    """
    engine = _engine(worker, task_id)
    if (problem := engine.out_of_service.get(task_id)) is not None:
        raise TaskConflict(f"task {task_id} is out of service: {problem}")
    with worker.database.write() as session:
        row = tasks.merge(session, task_id, other_id)
        training_states.forget(session, other_id)
        _move(session, ledger.list_committed(session, other_id), Move("merge", other_id, task_id, by=by))
        merged = replace(engine.learner.tasks[task_id], batches=row.batches, samples=row.samples)
        merged = replace(merged, inputs=persistence.merge_inputs(session, task_id, other_id))
    engine.learner.forget_task(other_id)
    engine.learner.tasks[task_id] = merged  # in its place: a merge is no use of the task
    engine.serve(merged)
    engine.withdraw(other_id, task_id)
    log.info("tasks_merged", task=task_id, merged=other_id, by=by)


def split(worker: Worker, task_id: int, batch_id: int, by: str | None = None) -> int:
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
        old = replace(whole, batches=whole.batches - len(moved), samples=whole.samples - rows)
        old = persistence.earlier(old, before)
        new = _store_new(session, replace(whole, batches=len(moved), samples=rows), batch_id, engine.network, by)
        reason = f"split at batch {batch_id}: the bits of version {before.version}"
        _set_back(session, old, engine.network, reason, by)
        _move(session, moved, Move("split", task_id, new.task_id, batch_id, by))
    engine.learner.forget_task(task_id)
    for record in (old, new):
        engine.learner.restore_task(record)
        engine.serve(record)
    log.info("task_split", task=task_id, batch=batch_id, new=new.task_id, batches=len(moved), by=by)
    return new.task_id


def rollback(worker: Worker, task_id: int, version: int, by: str | None = None) -> None:
    """A task gets, as a new version, the bits and the record that it had at `version`, and goes on from there.

    The batches that it has learned since stay its own in the ledger; what they taught is no longer in the mask. A task
    that was out of service is in service again, and what waited for it is decided.

    Raises TaskUnknown, MaskUnknown, TaskConflict (it is retired, or at this version), MaskCorrupt, StoreError.
    """
    engine = _engine(worker, task_id)
    with worker.database.write() as session:
        if tasks.load_active(session, task_id).version == version:
            raise TaskConflict(f"version {version} is the newest of task {task_id}")
        task = persistence.load_task(session, task_id, engine.network, version)
        _set_back(session, task, engine.network, _why_back(session, task_id, version), by)
        mended = task_id in engine.out_of_service
        if mended:
            ledger.release_waiting(session, labelled=True)
            ledger.release_waiting(session, labelled=False)
    engine.learner.restore_task(task)
    engine.serve(task)
    log.info("task_rolled_back", task=task_id, to=version, version=task.version, by=by)
    if mended:
        worker.reconsider()
        worker.notify()


def _set_back(session: Session, task: TaskRecord, network: Network, reason: str, by: str | None) -> None:
    """Stores a task with the bits of an earlier version as its new one; nobody has used it thereby."""
    masks.append_mask(session, persistence.mask_row(task, network.architecture, None, reason, by))
    tasks.update(session, task.task_id, persistence.task_fields(task), seen=False)
    training_states.forget(session, task.task_id)


def _why_back(session: Session, task_id: int, version: int) -> str:
    """Whose training a return to this version leaves out, in words."""
    undone = masks.list_undone(session, task_id, version)
    if not undone:
        return f"rolled back to version {version}"
    rest = f" and {len(undone) - SHOWN_UNDONE} more" if len(undone) > SHOWN_UNDONE else ""
    shown = ", ".join(map(str, undone[:SHOWN_UNDONE]))
    return f"rolled back to version {version}: the training by batches {shown}{rest} is undone"


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


def _store_new(session: Session, task: TaskRecord, batch_id: int, network: Network, by: str | None) -> TaskRecord:
    """Stores `task` as a new one, whose mask was made by the same batch."""
    source, maker = task.task_id, masks.load_mask(session, task.task_id).batch_id
    task = replace(task, version=1, key=None)
    last_seen = tasks.load_task(session, source).last_seen_at
    task = replace(task, task_id=tasks.create(session, persistence.task_fields(task), last_seen))
    reason = Move("split", source, task.task_id, batch_id).reason
    masks.append_mask(session, persistence.mask_row(task, network.architecture, maker, reason, by))
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
        if move.by is not None:
            evidence["by"] = move.by
        ledger.reassign(session, row.id, move.target, move.reason)
        kind: Kind = "new" if row.decision == "new" else "known"
        decisions.record(session, row.id, decisions.Decision(kind, move.target, evidence, move.reason))
