"""Why batches went where they went, with the evidence. Written once and kept."""

from sqlalchemy import select
from sqlalchemy.orm import Session

from storage.models import DecisionRow, Json, Kind, utc_now


def record(session: Session, batch_id: int, kind: Kind, task_id: int | None, evidence: Json) -> int:
    """Record a decision about a batch and return its id. `evidence` is strict JSON: no NaN, no infinity."""
    row = DecisionRow(batch_id=batch_id, kind=kind, task_id=task_id, evidence=evidence, created_at=utc_now())
    session.add(row)
    session.flush()
    return row.id


def list_for_task(session: Session, task_id: int, limit: int | None = None) -> list[DecisionRow]:
    """The newest `limit` decisions for a task, newest first."""
    query = select(DecisionRow).where(DecisionRow.task_id == task_id)
    return list(session.scalars(query.order_by(DecisionRow.id.desc()).limit(limit)))


def list_for_batch(session: Session, batch_id: int) -> list[DecisionRow]:
    """The decisions about a batch, oldest first: an unsure one may have several."""
    query = select(DecisionRow).where(DecisionRow.batch_id == batch_id)
    return list(session.scalars(query.order_by(DecisionRow.id)))
