"""The tasks that the daemon found, with what is known about each."""

import re
import uuid
from dataclasses import asdict, dataclass

from sqlalchemy import select
from sqlalchemy.orm import Session

from storage.models import Blob, Json, TaskRow, utc_now

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_DEFAULT_NAME = re.compile(r"task-[0-9]+")


class TaskUnknown(LookupError):
    """There is no such task."""


class NameInvalid(ValueError):
    """A task's name has 1 to 64 letters, digits, `_`, `.` or `-`."""


class NameTaken(ValueError):
    """Another task has this name, or will have it by default."""


@dataclass(frozen=True, slots=True)
class TaskFields:
    """What a learned batch changes of a task.

    version: of its newest mask; batches, samples: learned so far; accuracy, entropy (nats), density: of the
    newest mask; bytes: of its stored mask; reference: what recognition compares with, as JSON; statistics:
    the same as an opaque payload.
    """

    version: int
    batches: int
    samples: int
    density: float
    bytes: int
    reference: Json
    accuracy: float | None = None
    entropy: float | None = None
    statistics: Blob | None = None


def create(session: Session, fields: TaskFields) -> int:
    """Record a new task under the name `task-<id>`, and return its id."""
    now = utc_now()
    # The name needs the id, which the database gives.
    row = TaskRow(**asdict(fields), name=uuid.uuid4().hex, created_at=now, last_seen_at=now)
    session.add(row)
    session.flush()
    row.name = f"task-{row.id}"
    session.flush()
    return row.id


def update(session: Session, task_id: int, fields: TaskFields) -> None:
    """Replace what is known about a task, seen now. Raises TaskUnknown."""
    row = _load(session, task_id)
    for column, value in asdict(fields).items():
        setattr(row, column, value)
    row.last_seen_at = utc_now()
    session.flush()


def rename(session: Session, task_id: int, name: str) -> None:
    """Give a task a name. Raises TaskUnknown, NameInvalid or NameTaken."""
    row = _load(session, task_id)
    if not _NAME.fullmatch(name):
        raise NameInvalid(f"{name!r} is not a task's name: 1 to 64 letters, digits, '_', '.' or '-'")
    # `create` must always find its default name free.
    if _DEFAULT_NAME.fullmatch(name) and name != f"task-{task_id}":
        raise NameTaken(f"{name!r} is kept for the task of that number")
    if session.scalar(select(TaskRow.id).where(TaskRow.name == name, TaskRow.id != task_id)) is not None:
        raise NameTaken(f"another task is named {name!r}")
    row.name = name
    session.flush()


def get_task(session: Session, task_id: int) -> TaskRow | None:
    """One task, or None."""
    return session.get(TaskRow, task_id)


def list_tasks(session: Session) -> list[TaskRow]:
    """All tasks in the order in which they were found."""
    return list(session.scalars(select(TaskRow).order_by(TaskRow.id)))


def _load(session: Session, task_id: int) -> TaskRow:
    row = session.get(TaskRow, task_id)
    if row is None:
        raise TaskUnknown(f"there is no task {task_id}")
    return row
