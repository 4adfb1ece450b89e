"""Why batches went where they went, with the evidence. Written once and kept."""

from collections.abc import Collection
from dataclasses import dataclass

from sqlalchemy import select
from sqlalchemy.orm import Session

from storage.models import DecisionRow, Json, Kind, utc_now


@dataclass(frozen=True, slots=True)
class Decision:
    """What is decided about a batch. evidence: strict JSON, no NaN, no infinity; reason: one line for people."""

    kind: Kind
    task_id: int | None
    evidence: Json
    reason: str | None = None


def record(session: Session, batch_id: int, decision: Decision) -> int:
    """Record a decision about a batch and return its id."""
    row = DecisionRow(
        batch_id=batch_id,
        kind=decision.kind,
        task_id=decision.task_id,
        evidence=decision.evidence,
        reason=decision.reason,
        created_at=utc_now(),
    )
    session.add(row)
    session.flush()
    return row.id


def list_for_task(session: Session, task_ids: int | Collection[int], limit: int | None = None) -> list[DecisionRow]:
    """The newest `limit` decisions for a task, or for any of several, newest first."""
    ids = [task_ids] if isinstance(task_ids, int) else task_ids
    query = select(DecisionRow).where(DecisionRow.task_id.in_(ids))
    return list(session.scalars(query.order_by(DecisionRow.id.desc()).limit(limit)))


def list_for_batch(session: Session, batch_id: int) -> list[DecisionRow]:
    """The decisions about a batch, oldest first: an unsure one may have several."""
    query = select(DecisionRow).where(DecisionRow.batch_id == batch_id)
    return list(session.scalars(query.order_by(DecisionRow.id)))
