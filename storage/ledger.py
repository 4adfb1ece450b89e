"""The batch ledger: every batch ever seen, its state, and the few ways from one state to the next.

                      ┌──────────────→ committed | scored | quarantined
    staged → training ┤                 ↓   ↑
       ↑         │    └──────→ unsure ──┴───┘
       └─────────┴ (restart) ────┘

`duplicate` and `quarantined` also come straight from the door, and are final like `scored`. Only `recall` takes a
committed batch back, and only `reassign` gives it to another task.
"""

from dataclasses import dataclass
from typing import Any, Literal, cast

from sqlalchemy import CursorResult, func, select, update
from sqlalchemy.orm import Session

from storage.models import STATES, BatchRow, Kind, utc_now

Result = Literal["unsure", "scored", "committed", "quarantined"]
OPEN = ("training", "unsure")  # what can still be finished
SPOOLED = ("staged", "training", "unsure")  # whose bytes are still needed


class LedgerConflict(RuntimeError):
    """A batch is not in a state that allows this step: someone else took it, or it is finished."""


class BatchUnknown(LookupError):
    """There is no such batch."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A batch at the door, its bytes already in the spool.

    size: bytes; samples: rows of x; given_task: the task that came with it, as the user named it.
    """

    source: str
    name: str
    sha256: str
    size: int
    samples: int
    labelled: bool
    given_task: str | None = None


@dataclass(frozen=True, slots=True)
class Staged:
    id: int
    duplicate: bool


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a batch. `committed` needs a task, `quarantined` a reason."""

    state: Result
    task_id: int | None = None
    provisional: int | None = None
    decision: Kind | None = None
    reason: str | None = None


def stage(session: Session, entry: Entry) -> Staged:
    """Record a batch: `staged`, or `duplicate` when its content is already in the ledger."""
    first = find_content(session, entry.sha256)
    row = _add(
        session,
        source=entry.source,
        name=entry.name,
        sha256=entry.sha256,
        dedupe_key=None if first else entry.sha256,
        size=entry.size,
        samples=entry.samples,
        labelled=entry.labelled,
        given_task=entry.given_task,
        state="duplicate" if first else "staged",
        reason=_why_duplicate(first) if first else None,
    )
    return Staged(row.id, duplicate=first is not None)


def quarantine_arrival(session: Session, source: str, name: str, sha256: str | None, reason: str) -> int:
    """Record a bad file that never got in, and return its batch id.

    It does not count as the first of its content: under other limits the same bytes may come in.
    """
    row = _add(session, source=source, name=name, sha256=sha256, size=0, state="quarantined", reason=reason)
    return row.id


def claim(session: Session) -> BatchRow | None:
    """Move the oldest staged batch to `training` and return it; None when nothing is staged."""
    row = session.scalar(select(BatchRow).where(BatchRow.state == "staged").order_by(BatchRow.id).limit(1))
    if row is not None:
        row.state, row.attempts, row.updated_at = "training", row.attempts + 1, utc_now()
        session.flush()
    return row


def release_claims(session: Session) -> int:
    """Put every batch in `training` back to `staged`, as at the start after a crash; returns how many."""
    change = update(BatchRow).where(BatchRow.state == "training").values(state="staged", updated_at=utc_now())
    return _changed(session, change)


def release_waiting(session: Session, labelled: bool) -> int:
    """Put every unsure batch that no provisional task holds back to `staged`; returns how many.

    The labelled ones waited for a network, the others for a task. Once there is one, only a crash can have kept
    them from being taken up.
    """
    waiting = (BatchRow.state == "unsure", BatchRow.provisional.is_(None), BatchRow.labelled.is_(labelled))
    return _changed(session, update(BatchRow).where(*waiting).values(state="staged", updated_at=utc_now()))


def newest_learned(session: Session) -> BatchRow | None:
    """The labelled batch that was recognised last, decided or not; None when there is none."""
    query = select(BatchRow).where(BatchRow.labelled.is_(True), BatchRow.state.in_(("committed", "unsure")))
    return session.scalar(query.order_by(BatchRow.id.desc()).limit(1))


def finish(session: Session, batch_id: int, outcome: Outcome) -> None:
    """Record what became of a claimed or unsure batch.

    Raises LedgerConflict when the batch is in any other state; then nothing is changed.
    """
    change = (
        update(BatchRow)
        .where(BatchRow.id == batch_id, BatchRow.state.in_(OPEN))
        .values(
            state=outcome.state,
            task_id=outcome.task_id,
            provisional=outcome.provisional,
            decision=outcome.decision,
            reason=outcome.reason,
            updated_at=utc_now(),
        )
    )
    if _changed(session, change) != 1:
        row = session.get(BatchRow, batch_id)
        state = "missing" if row is None else row.state
        raise LedgerConflict(f"batch {batch_id} is {state}: it cannot become {outcome.state}")


def recall(session: Session, batch_id: int, provisional: int | None, reason: str | None = None) -> None:
    """Take a committed batch back: it is unsure again, in a provisional task or in none. Record a decision too.

    Raises LedgerConflict when the batch is not committed; then nothing is changed.
    """
    values = {"state": "unsure", "task_id": None, "provisional": provisional, "decision": "unsure", "reason": reason}
    _change_committed(session, batch_id, values, "be recalled")


def reassign(session: Session, batch_id: int, task_id: int, reason: str | None = None) -> None:
    """Give a committed batch to another task. Record a decision too. `reason`: None keeps the one it has.

    Raises LedgerConflict when the batch is not committed; then nothing is changed.
    """
    values: dict[str, Any] = {"task_id": task_id}
    _change_committed(session, batch_id, values if reason is None else values | {"reason": reason}, "be reassigned")


def list_committed(session: Session, task_id: int, start: int = 0) -> list[BatchRow]:
    """The batches that a task has learned, in order of arrival, from the id `start` on."""
    query = select(BatchRow).where(BatchRow.task_id == task_id, BatchRow.state == "committed", BatchRow.id >= start)
    return list(session.scalars(query.order_by(BatchRow.id)))


def find_content(session: Session, sha256: str) -> BatchRow | None:
    """The first batch with this content, in whatever state; None when it is new."""
    return session.scalar(select(BatchRow).where(BatchRow.dedupe_key == sha256))


def load_batch(session: Session, batch_id: int) -> BatchRow:
    """One batch. Raises BatchUnknown."""
    row = session.get(BatchRow, batch_id)
    if row is None:
        raise BatchUnknown(f"there is no batch {batch_id}")
    return row


def list_batches(
    session: Session, state: str | None = None, limit: int | None = None, after: int | None = None
) -> list[BatchRow]:
    """Batches in order of arrival: those in `state`, with an id above `after`, at most `limit`."""
    query = select(BatchRow).order_by(BatchRow.id).limit(limit)
    if state is not None:
        query = query.where(BatchRow.state == state)
    if after is not None:
        query = query.where(BatchRow.id > after)
    return list(session.scalars(query))


def list_unsure(session: Session) -> list[BatchRow]:
    """The batches that wait for more data to decide them, in order of arrival."""
    return list_batches(session, "unsure")


def list_spooled(session: Session) -> set[str]:
    """The hashes of all content whose bytes are still needed."""
    query = select(BatchRow.sha256).where(BatchRow.state.in_(SPOOLED), BatchRow.sha256.is_not(None))
    return {sha256 for sha256 in session.scalars(query) if sha256 is not None}


def count_by_state(session: Session) -> dict[str, int]:
    """The number of batches in each state, the empty states too."""
    query = select(BatchRow.state, func.count().label("total")).group_by(BatchRow.state)
    return dict.fromkeys(STATES, 0) | {row.state: row.total for row in session.execute(query)}


def count_staged(session: Session) -> int:
    """How many batches wait to be claimed."""
    return session.scalar(select(func.count()).where(BatchRow.state == "staged")) or 0


def _add(session: Session, **columns: Any) -> BatchRow:
    now = utc_now()
    row = BatchRow(**columns, created_at=now, updated_at=now)
    session.add(row)
    session.flush()
    return row


def _change_committed(session: Session, batch_id: int, values: dict[str, Any], step: str) -> None:
    change = update(BatchRow).where(BatchRow.id == batch_id, BatchRow.state == "committed")
    if _changed(session, change.values(**values, updated_at=utc_now())) != 1:
        row = session.get(BatchRow, batch_id)
        raise LedgerConflict(f"batch {batch_id} is {'missing' if row is None else row.state}: it cannot {step}")


def _changed(session: Session, change: Any) -> int:
    return cast(CursorResult[Any], session.execute(change)).rowcount


def _why_duplicate(first: BatchRow) -> str:
    tail = f" (quarantined: {first.reason})" if first.state == "quarantined" else ""
    return f"duplicate of batch {first.id}{tail}"
