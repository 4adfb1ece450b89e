"""The mask store: every version of every task's supermask, written once and verified at every load."""

from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, Row, func, select, tuple_
from sqlalchemy.orm import Session, load_only

from storage import codec, packing
from storage.models import DecisionRow, Json, MaskVersionRow, TaskRow, utc_now

BULK = tuple(column for column in MaskVersionRow.__table__.columns if column.name not in ("reference", "created_at"))
"""What a mask is read and verified from; its record is longer to parse than its bits to hash."""
AT_A_TIME = 16


class MaskUnknown(LookupError):
    """The task has no such mask version."""


class MaskCorrupt(RuntimeError):
    """Stored bits are not the bits that were stored: those of this version of the task's mask."""

    def __init__(self, task_id: int, version: int, problem: str) -> None:
        super().__init__(f"mask of task {task_id}, version {version}: {problem}")
        self.task_id = task_id
        self.version = version


@dataclass(frozen=True, slots=True)
class MaskRow:
    """A version of a task's mask, whatever it is coded as in the store.

    bits: of `nbits` weights, packed; every row of a layer begins at a byte of its own, so that there may be more
    bits than weights, and those are zero. statistics: float32 of the mask's own normalisation, or None. batch_id: the
    batch that made the version; reason: why it exists when none did. reference: the task's record at that time.
    made_by: who asked for it, None for the daemon itself.
    """

    task_id: int
    version: int
    batch_id: int | None
    bits: bytes
    nbits: int
    statistics: bytes | None = None
    reason: str | None = None
    reference: Json | None = None
    made_by: str | None = None

    @property
    def density(self) -> float:
        """The fraction of weights kept."""
        return packing.popcount(self.bits) / self.nbits if self.nbits else 0.0

    @property
    def packed(self) -> bytes:
        """Everything that runs the network: the bits, then the statistics."""
        return self.bits + (self.statistics or b"")

    @property
    def sha256(self) -> str:
        return packing.sha256(self.packed)


@dataclass(frozen=True, slots=True)
class Version:
    """That there is a version, without its bits."""

    task_id: int
    version: int
    batch_id: int | None
    density: float
    reason: str | None


@dataclass(frozen=True, slots=True)
class Origin:
    """When, by whom and why a version was made, and what it takes.

    reason: that of the batch that made it, where none is stored with it. made_by: None for the daemon itself.
    nbytes: of the stored bits and statistics. sha256: of the raw ones.
    """

    task_id: int
    version: int
    created_at: datetime
    made_by: str | None
    reason: str | None
    batch_id: int | None
    density: float
    nbytes: int
    sha256: str


def append_mask(session: Session, mask: MaskRow) -> None:
    """Store a new version.

    Raises ValueError when the bits cannot be those of `nbits` weights or the statistics are not float32, and
    sqlalchemy's IntegrityError when the version exists or the task does not.
    """
    density = _checked(mask)
    stored, coding = codec.encode(mask.bits)
    session.add(
        MaskVersionRow(
            task_id=mask.task_id,
            version=mask.version,
            batch_id=mask.batch_id,
            bits=stored,
            coding=coding,
            nbits=mask.nbits,
            statistics=mask.statistics,
            reason=mask.reason,
            reference=mask.reference,
            made_by=mask.made_by,
            sha256=mask.sha256,
            density=density,
            created_at=utc_now(),
        )
    )
    session.flush()


def load_mask(session: Session, task_id: int, version: int | None = None) -> MaskRow:
    """A version of a task's mask, or the newest one. Raises MaskUnknown or MaskCorrupt."""
    query = select(MaskVersionRow).where(MaskVersionRow.task_id == task_id)
    if version is not None:
        query = query.where(MaskVersionRow.version == version)
    row = session.scalar(query.order_by(MaskVersionRow.version.desc()).limit(1))
    if row is None:
        raise _unknown(task_id, version)
    return _verified(row, row.reference)


def load_masks(session: Session, wanted: Sequence[tuple[int, int]]) -> list[MaskRow]:
    """These (task, version), in this order, each read once and without its `reference`: a few dozen in one query.

    Raises MaskCorrupt, also where one is missing: who asks for many knows that there are such.
    """
    chosen = tuple_(MaskVersionRow.task_id, MaskVersionRow.version).in_(wanted)
    # For pairs of values alone, SQLite would not use the index.
    led = MaskVersionRow.task_id.in_({task_id for task_id, _ in wanted})
    query = select(*BULK).where(led, chosen)
    found = {(row.task_id, row.version): _verified(row) for row in session.execute(query)}
    if missing := [place for place in wanted if place not in found]:
        raise MaskCorrupt(*missing[0], "it is missing")
    return [found[place] for place in wanted]


def find_before(session: Session, task_id: int, batch_id: int) -> int | None:
    """The last version of a task's mask that no batch from `batch_id` on had a part in; None when there is none."""
    versions = select(func.min(MaskVersionRow.version)).where(MaskVersionRow.task_id == task_id)
    touched = session.scalar(versions.where(MaskVersionRow.batch_id >= batch_id))
    if touched is None:
        return session.scalar(select(func.max(MaskVersionRow.version)).where(MaskVersionRow.task_id == task_id))
    return session.scalar(
        select(func.max(MaskVersionRow.version)).where(
            MaskVersionRow.task_id == task_id, MaskVersionRow.version < touched
        )
    )


def iter_heads(session: Session) -> Iterator[MaskRow]:
    """The newest version of every task's mask, by task, a few in memory at a time and without their `reference`.

    Raises MaskCorrupt.
    """
    # Led by the task, SQLite finds the rows in order, and need not sort what it read.
    query = select(*BULK).select_from(TaskRow).join(MaskVersionRow, _is_newest()).order_by(TaskRow.id)
    for row in session.execute(query.execution_options(yield_per=AT_A_TIME)):
        yield _verified(row)


def load_heads(session: Session) -> dict[int, MaskRow]:
    """What `iter_heads` gives, by task. Raises MaskCorrupt."""
    return {mask.task_id: mask for mask in iter_heads(session)}


def list_versions(session: Session, task_id: int) -> list[int]:
    """The versions of a task's mask, oldest first."""
    query = select(MaskVersionRow.version).where(MaskVersionRow.task_id == task_id)
    return list(session.scalars(query.order_by(MaskVersionRow.version)))


def list_all_versions(session: Session) -> dict[int, list[int]]:
    """The versions of every task's mask, oldest first."""
    row, found = MaskVersionRow, defaultdict[int, list[int]](list)
    for task_id, version in session.execute(select(row.task_id, row.version).order_by(row.task_id, row.version)):
        found[task_id].append(version)
    return found


def list_made_by(session: Session, batch_ids: Collection[int]) -> list[Version]:
    """The versions that these batches made, in order."""
    row = MaskVersionRow
    query = select(row.task_id, row.version, row.batch_id, row.density, row.reason).where(row.batch_id.in_(batch_ids))
    return [Version(*found) for found in session.execute(query.order_by(row.task_id, row.version))]


def list_history(session: Session, task_id: int) -> list[Origin]:
    """The origin of every version of a task's mask, oldest first."""
    row = MaskVersionRow
    nbytes = func.length(row.bits) + func.coalesce(func.length(row.statistics), 0)
    columns = (row.version, row.created_at, row.made_by, row.reason, row.batch_id, row.density, nbytes, row.sha256)
    query = select(*columns).where(row.task_id == task_id).order_by(row.version)
    found = [Origin(task_id, *values) for values in session.execute(query)]
    decided = _decisions_of_makers(session, task_id)
    return [
        origin if origin.reason is not None else replace(origin, reason=_reason_of(origin, decided)) for origin in found
    ]


def list_undone(session: Session, task_id: int, version: int) -> list[int]:
    """The batches that had a part in a task's versions after `version`, by id."""
    makers = select(MaskVersionRow.batch_id).where(MaskVersionRow.task_id == task_id, MaskVersionRow.version > version)
    decider = DecisionRow.evidence["decided_with"].as_integer()
    together = select(DecisionRow.batch_id).where(DecisionRow.task_id == task_id, decider.in_(makers))
    return sorted({*session.scalars(makers.where(MaskVersionRow.batch_id.is_not(None))), *session.scalars(together)})


def list_head_hashes(session: Session) -> set[str]:
    """What the newest version of every task's mask should hash to; no bits are read."""
    return set(session.scalars(select(MaskVersionRow.sha256).select_from(TaskRow).join(MaskVersionRow, _is_newest())))


def find_newest(session: Session, sha256: str) -> int | None:
    """A task whose newest mask is the one of this hash; None when there is none."""
    query = select(TaskRow.id).join(MaskVersionRow, _is_newest()).where(MaskVersionRow.sha256 == sha256)
    return session.scalar(query.order_by(TaskRow.id).limit(1))


def is_corrupt(session: Session, task_id: int) -> bool:
    """Whether a task's newest mask is not what was stored."""
    try:
        load_mask(session, task_id)
    except MaskCorrupt:
        return True
    return False


def list_corrupt(session: Session) -> list[str]:
    """Every stored mask that is not what was stored, in words."""
    query = select(*BULK).order_by(MaskVersionRow.task_id, MaskVersionRow.version)
    problems = []
    for row in session.execute(query.execution_options(yield_per=AT_A_TIME)):
        try:
            _verified(row)
        except MaskCorrupt as error:
            problems.append(str(error))
    return problems


def _is_newest() -> ColumnElement[bool]:
    """Of a version: it is the newest one of the task's mask."""
    last = select(func.max(MaskVersionRow.version)).where(MaskVersionRow.task_id == TaskRow.id).correlate(TaskRow)
    return (MaskVersionRow.task_id == TaskRow.id) & (MaskVersionRow.version == last.scalar_subquery())


def _decisions_of_makers(session: Session, task_id: int) -> dict[int, list[DecisionRow]]:
    """What was decided for the task about the batches that made its versions, oldest first, by batch."""
    row = DecisionRow
    makers = select(MaskVersionRow.batch_id).where(MaskVersionRow.task_id == task_id)
    query = select(row).options(load_only(row.batch_id, row.created_at, row.reason))
    found: dict[int, list[DecisionRow]] = {}
    for decision in session.scalars(query.where(row.task_id == task_id, row.batch_id.in_(makers)).order_by(row.id)):
        found.setdefault(decision.batch_id, []).append(decision)
    return found


def _reason_of(origin: Origin, decided: dict[int, list[DecisionRow]]) -> str | None:
    """That of the decision which the version was stored with: the first one that is not older."""
    mine = decided.get(origin.batch_id or 0, [])
    decision = next((d for d in mine if d.created_at >= origin.created_at), mine[-1] if mine else None)
    return None if decision is None else decision.reason


def _unknown(task_id: int, version: int | None) -> MaskUnknown:
    return MaskUnknown(f"task {task_id} has no mask" + (f" version {version}" if version is not None else ""))


def _checked(mask: MaskRow) -> float:
    """The row's density. Raises ValueError unless it can be a mask of `nbits` weights."""
    if not (mask.nbits + 7) // 8 <= len(mask.bits) <= mask.nbits:  # no byte without a weight
        raise ValueError(f"{len(mask.bits)} bytes cannot be the bits of {mask.nbits} weights")
    if (kept := packing.popcount(mask.bits)) > mask.nbits:
        raise ValueError(f"{kept} bits are set, more than the {mask.nbits} weights")
    if mask.statistics is not None and len(mask.statistics) % 4:
        raise ValueError(f"{len(mask.statistics)} bytes are not float32 statistics")
    return kept / mask.nbits if mask.nbits else 0.0


def _verified(row: MaskVersionRow | Row[Any], reference: Json | None = None) -> MaskRow:
    place = row.task_id, row.version
    try:
        bits = codec.decode(row.bits, row.coding, most=row.nbits)
        mask = MaskRow(*place, row.batch_id, bits, row.nbits, row.statistics, row.reason, reference, row.made_by)
        density = _checked(mask)
    except ValueError as error:
        raise MaskCorrupt(*place, str(error)) from error
    if mask.sha256 != row.sha256:
        raise MaskCorrupt(*place, "the bits have another SHA-256 than when they were stored")
    if density != row.density:
        raise MaskCorrupt(*place, f"density {density}, recorded {row.density}")
    return mask
