"""Scores and optimiser state of the recently active tasks, so that one that returns goes on where it was."""

from sqlalchemy import delete, func, select
from sqlalchemy.orm import Session

from storage.models import TrainingStateRow, utc_now

StateRow = TrainingStateRow


def save(session: Session, task_id: int, version: int, payload: bytes) -> None:
    """Store the state that belongs to a version of a task's mask; the task becomes the most recent."""
    turn = (session.scalar(select(func.max(TrainingStateRow.turn))) or 0) + 1
    session.merge(TrainingStateRow(task_id=task_id, version=version, turn=turn, payload=payload, updated_at=utc_now()))
    session.flush()


def load_states(session: Session) -> list[StateRow]:
    """All stored states, the most recent task first."""
    return list(session.scalars(select(TrainingStateRow).order_by(TrainingStateRow.turn.desc())))


def keep_recent(session: Session, count: int) -> None:
    """Drop all but the `count` most recent states."""
    kept = select(TrainingStateRow.task_id).order_by(TrainingStateRow.turn.desc()).limit(count)
    recent = list(session.scalars(kept))
    session.execute(delete(TrainingStateRow).where(TrainingStateRow.task_id.not_in(recent)))
