"""Scores and optimiser state of the recently active tasks, so that one that returns goes on where it was."""

from collections.abc import Iterator
from typing import Any

from sqlalchemy import Select, delete, func, select, update
from sqlalchemy.orm import Session

from storage.models import TaskRow, TrainingStateRow, utc_now

StateRow = TrainingStateRow


def save(session: Session, task_id: int, version: int, payload: bytes) -> None:
    """Store the state that belongs to a version of a task's mask; the task becomes the most recent."""
    turn = (session.scalar(select(func.max(TrainingStateRow.turn))) or 0) + 1
    values = {"version": version, "turn": turn, "payload": payload, "updated_at": utc_now()}
    # Not `merge`: it would read megabytes to overwrite them.
    found = session.execute(update(TrainingStateRow).where(TrainingStateRow.task_id == task_id).values(**values))
    if not found.rowcount:  # type: ignore[attr-defined]  # an update has it
        session.add(TrainingStateRow(task_id=task_id, **values))
    session.flush()


def get_payload(session: Session, task_id: int) -> bytes | None:
    """A task's state, or None."""
    row = session.get(TrainingStateRow, task_id)
    return None if row is None else row.payload


def load_states(session: Session, count: int | None = None) -> list[StateRow]:
    """The stored states of tasks in use, the most recent task first; at most `count`."""
    return list(session.scalars(_recent(select(TrainingStateRow)).limit(count)))


def iter_states(session: Session) -> Iterator[StateRow]:
    """All stored states, those of retired tasks too, one at a time."""
    yield from session.scalars(select(TrainingStateRow).order_by(TrainingStateRow.turn).execution_options(yield_per=1))


def keep_recent(session: Session, count: int) -> None:
    """Drop all but the `count` most recent states of tasks in use; those of retired tasks wait for a reopening."""
    stale = list(session.scalars(_recent(select(TrainingStateRow.task_id)).offset(count)))
    session.execute(delete(TrainingStateRow).where(TrainingStateRow.task_id.in_(stale)))


def _recent(query: Select[Any]) -> Select[Any]:
    """Of tasks in use, the most recent first."""
    in_use = query.join(TaskRow, TaskRow.id == TrainingStateRow.task_id).where(TaskRow.retired_at.is_(None))
    return in_use.order_by(TrainingStateRow.turn.desc())


def touch(session: Session, task_id: int) -> None:
    """Make a task's state, if there is one, the most recent."""
    row = session.get(TrainingStateRow, task_id)
    if row is not None:
        save(session, task_id, row.version, row.payload)


def forget(session: Session, task_id: int) -> None:
    """Drop a task's state, if there is one."""
    session.execute(delete(TrainingStateRow).where(TrainingStateRow.task_id == task_id))
