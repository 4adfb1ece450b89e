"""Why batches went where they went, with the evidence. Written once and kept."""

from collections.abc import Collection
from dataclasses import dataclass

from sqlalchemy import func, select
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


def count_since(session: Session, decision_id: int) -> tuple[dict[Kind, int], int]:
    """How many of each kind came after this one, and the id of the newest, which may be this one."""
    columns = DecisionRow.kind, func.count().label("total"), func.max(DecisionRow.id).label("newest")
    rows = session.execute(select(*columns).where(DecisionRow.id > decision_id).group_by(DecisionRow.kind)).all()
    return {row.kind: row.total for row in rows}, max((row.newest for row in rows), default=decision_id)


def newest(session: Session) -> int:
    """The id of the newest; 0 where there is none."""
    return session.scalar(select(func.max(DecisionRow.id))) or 0


def list_for_task(session: Session, task_ids: int | Collection[int], limit: int | None = None) -> list[DecisionRow]:
    """The newest `limit` decisions for a task, or for any of several, newest first."""
    ids = [task_ids] if isinstance(task_ids, int) else task_ids
    query = select(DecisionRow).where(DecisionRow.task_id.in_(ids))
    return list(session.scalars(query.order_by(DecisionRow.id.desc()).limit(limit)))


def list_for_batch(session: Session, batch_id: int) -> list[DecisionRow]:
    """The decisions about a batch, oldest first: an unsure one may have several."""
    query = select(DecisionRow).where(DecisionRow.batch_id == batch_id)
    return list(session.scalars(query.order_by(DecisionRow.id)))
