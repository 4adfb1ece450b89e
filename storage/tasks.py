"""The tasks that the daemon found, with what is known about each."""

import re
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import false, func, or_, select
from sqlalchemy.orm import InstrumentedAttribute, Session

from storage.bounds import storable
from storage.models import Json, TaskRow, utc_now

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_DEFAULT_NAME = re.compile(r"task-[0-9]+")
MAX_NAME = 64
MAX_KEY = 255
SHOWN_CHARACTERS = 80
AT_A_TIME = 100
_ID = re.compile(r"[0-9]{1,18}")  # fits in 64 bits


class TaskUnknown(LookupError):
    """There is no such task."""


class NameInvalid(ValueError):
    """A task's name has 1 to 64 letters, digits, `_`, `.` or `-`, its key 1 to 255 characters."""


class NameTaken(ValueError):
    """Another task has this name, or will have it by default."""


class TaskAmbiguous(LookupError):
    """A text means more than one task."""


class TaskConflict(RuntimeError):
    """A task is not in a state that allows this step: it is retired, merged or active."""


@dataclass(frozen=True, slots=True)
class TaskFields:
    """What a learned batch changes of a task.

    version: of its newest mask; batches, samples: learned so far; accuracy, entropy (nats), density: of the
    newest mask; bytes: of its stored mask; reference: what recognition compares with, as JSON.
    """

    version: int
    batches: int
    samples: int
    density: float
    bytes: int
    reference: Json
    accuracy: float | None = None
    entropy: float | None = None


def create(session: Session, fields: TaskFields, last_seen: datetime | None = None) -> int:
    """Record a new task under the name `task-<id>`, seen now or at `last_seen`, and return its id."""
    now = utc_now()
    # The name needs the id, which the database gives.
    row = TaskRow(**asdict(fields), name=uuid.uuid4().hex, created_at=now, last_seen_at=last_seen or now)
    session.add(row)
    session.flush()
    row.name = f"task-{row.id}"
    session.flush()
    return row.id


def update(session: Session, task_id: int, fields: TaskFields, seen: bool = True) -> None:
    """Replace what is known about a task, seen now or, for a correction, not. Raises TaskUnknown."""
    row = load_task(session, task_id)
    for column, value in asdict(fields).items():
        setattr(row, column, value)
    if seen:
        row.last_seen_at = utc_now()
    session.flush()


def rename(session: Session, task_id: int, name: str) -> None:
    """Give a task a name. Raises TaskUnknown, NameInvalid or NameTaken."""
    row = load_task(session, task_id)
    if not _NAME.fullmatch(name):
        raise NameInvalid(f"{name!r} is not a task's name: 1 to 64 letters, digits, '_', '.' or '-'")
    # `create` must always find its default name free.
    if _DEFAULT_NAME.fullmatch(name) and name != f"task-{task_id}":
        raise NameTaken(f"{name!r} is kept for the task of that number")
    if session.scalar(select(TaskRow.id).where(TaskRow.name == name, TaskRow.id != task_id)) is not None:
        raise NameTaken(f"another task is named {name!r}")
    row.name = name
    session.flush()


def name_freely(session: Session, task_id: int, name: str) -> None:
    """Give a task this name, or the first free one of `name-2`, `name-3`…; a default name stays the task's own.

    Raises TaskUnknown, NameInvalid.
    """
    if not _DEFAULT_NAME.fullmatch(name):
        rename(session, task_id, _free(session, TaskRow.name, name, MAX_NAME))


def set_key_freely(session: Session, task_id: int, key: str) -> None:
    """Record this key of a task, or the first free one of `key-2`, `key-3`…. Raises TaskUnknown."""
    set_key(session, task_id, _free(session, TaskRow.key, key, MAX_KEY))


def _free(session: Session, column: InstrumentedAttribute[Any], wanted: str, most: int) -> str:
    """The wanted text, or the first one with a number behind it, that no task has in this column."""
    number = 1
    text = wanted
    while session.scalar(select(TaskRow.id).where(column == text)) is not None:
        number += 1
        text = f"{wanted[: most - len(f'-{number}')]}-{number}"
    return text


def load_task(session: Session, task_id: int) -> TaskRow:
    """One task. Raises TaskUnknown."""
    row = session.get(TaskRow, task_id)
    if row is None:
        raise TaskUnknown(f"there is no task {task_id}")
    return row


def get_task(session: Session, task_id: int) -> TaskRow | None:
    """One task, or None."""
    return session.get(TaskRow, task_id)


def list_tasks(session: Session, retired: bool = False) -> list[TaskRow]:
    """The tasks in the order in which they were found; the retired ones only if asked."""
    query = select(TaskRow).order_by(TaskRow.id)
    return list(session.scalars(query if retired else query.where(TaskRow.retired_at.is_(None))))


def get_inputs(session: Session, task_id: int) -> bytes | None:
    """What is stored of a task's inputs. None if nothing is, or there is no such task."""
    return session.scalar(select(TaskRow.inputs).where(TaskRow.id == task_id))


def save_inputs(session: Session, task_id: int, inputs: bytes | None) -> None:
    """Replace what is stored of a task's inputs, or forget it. Raises TaskUnknown."""
    load_task(session, task_id).inputs = inputs
    session.flush()


def count_retired(session: Session) -> int:
    """How many tasks are retired, the merged ones among them."""
    return session.scalar(select(func.count()).where(TaskRow.retired_at.is_not(None))) or 0


def resolve(session: Session, reference: int | str, follow: bool = True) -> TaskRow:
    """The task that an id, or a text, means; for a merged one, the task that answers for it, unless not to `follow`.

    A text is a key, a name or an id; `key:…`, `name:…` or `id:…` says which.
    Raises TaskUnknown, and TaskAmbiguous when a text means several tasks.
    """
    meant = _meant(session, reference)
    found = {row.id: row for row in (_answering(session, row) if follow else row for row in meant)}
    if not found:
        raise TaskUnknown(f"there is no task {str(reference)[:SHOWN_CHARACTERS]}")
    if len(found) > 1:
        ids = " and ".join(str(task_id) for task_id in sorted(found))
        raise TaskAmbiguous(f"{str(reference)[:SHOWN_CHARACTERS]!r} means tasks {ids}: say id:…, name:… or key:…")
    return next(iter(found.values()))


def find_key(session: Session, key: str) -> TaskRow | None:
    """The task of the user's own `key`, retired or not; of a merged one, the task that answers for it."""
    row = session.scalar(select(TaskRow).where(TaskRow.key == key))
    return None if row is None else _answering(session, row)


def set_key(session: Session, task_id: int, key: str) -> None:
    """Record what the user calls a task. Raises TaskUnknown, NameInvalid, and NameTaken when another task has it."""
    row = load_task(session, task_id)
    if not 1 <= len(key) <= MAX_KEY:
        raise NameInvalid(f"{len(key)} characters are not a task's key: 1 to {MAX_KEY} expected")
    if session.scalar(select(TaskRow.id).where(TaskRow.key == key, TaskRow.id != task_id)) is not None:
        raise NameTaken(f"another task has the key {key!r}")
    row.key = key
    session.flush()


def retire(session: Session, task_id: int) -> None:
    """Take a task out of use; all that is recorded stays. Raises TaskUnknown or TaskConflict."""
    row = load_active(session, task_id)
    row.retired_at = utc_now()
    session.flush()


def reopen(session: Session, task_id: int) -> TaskRow:
    """Take a retired task into use again. Raises TaskUnknown or TaskConflict."""
    row = load_task(session, task_id)
    if row.merged_into is not None:
        raise TaskConflict(f"task {task_id} was merged into task {row.merged_into} and cannot be reopened")
    if row.retired_at is None:
        raise TaskConflict(f"task {task_id} is not retired")
    row.retired_at = None
    session.flush()
    return row


def merge(session: Session, task_id: int, other_id: int) -> TaskRow:
    """Let a task answer for another one, which is retired; its counts are added up. Returns the task.

    Raises TaskUnknown or TaskConflict. No cycle can come about: a merged task is retired, and a retired one neither
    merges nor is merged.
    """
    if task_id == other_id:
        raise TaskConflict(f"task {task_id} cannot be merged with itself")
    row, other = load_active(session, task_id), load_active(session, other_id)
    other.retired_at, other.merged_into = utc_now(), task_id
    row.batches, row.samples = row.batches + other.batches, row.samples + other.samples
    row.last_seen_at = max(row.last_seen_at, other.last_seen_at)
    session.flush()
    return row


def iter_tasks(session: Session, retired: bool = False) -> Iterator[TaskRow]:
    """As `list_tasks`, a few in memory at a time."""
    query = select(TaskRow).order_by(TaskRow.id).execution_options(yield_per=AT_A_TIME)
    yield from session.scalars(query if retired else query.where(TaskRow.retired_at.is_(None)))


def load_merges(session: Session) -> dict[int, int]:
    """The task that each merged task was merged into."""
    query = select(TaskRow.id, TaskRow.merged_into).where(TaskRow.merged_into.is_not(None)).order_by(TaskRow.id)
    return {row.id: row.merged_into for row in session.execute(query)}


def list_merged(session: Session, task_id: int) -> list[TaskRow]:
    """The tasks that a task answers for, at any remove, by id."""
    found: dict[int, TaskRow] = {}
    front: Iterable[int] = [task_id]
    while front:
        rows = session.scalars(select(TaskRow).where(TaskRow.merged_into.in_(front))).all()
        found |= (front := {row.id: row for row in rows})
    return [found[merged] for merged in sorted(found)]


def load_active(session: Session, task_id: int) -> TaskRow:
    """A task that is in use. Raises TaskUnknown, and TaskConflict when it is retired or was merged."""
    row = load_task(session, task_id)
    if row.merged_into is not None:
        raise TaskConflict(f"task {task_id} was merged into task {row.merged_into}")
    if row.retired_at is not None:
        raise TaskConflict(f"task {task_id} is retired")
    return row


def _meant(session: Session, reference: int | str) -> list[TaskRow]:
    """All tasks that a reference can mean, as `resolve` reads it."""
    prefix, _, rest = str(reference).partition(":")
    kind, text = (prefix, rest) if prefix in ("id", "name", "key") else (None, str(reference))
    if storable(text) != text:
        return []
    if isinstance(reference, int):
        kind = "id"
    ways = {"name": TaskRow.name == text, "key": TaskRow.key == text}
    if _ID.fullmatch(text):
        ways["id"] = TaskRow.id == int(text)
    wanted = [way for name, way in ways.items() if kind in (None, name)]
    return list(session.scalars(select(TaskRow).where(or_(false(), *wanted))))


def _answering(session: Session, row: TaskRow) -> TaskRow:
    while row.merged_into is not None:
        row = load_task(session, row.merged_into)
    return row
