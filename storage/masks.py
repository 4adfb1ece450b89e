"""The mask store: every version of every task's supermask, written once and verified at every load."""

from collections.abc import Collection
from dataclasses import dataclass

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from storage import packing
from storage.models import Json, MaskVersionRow, utc_now


class MaskUnknown(LookupError):
    """The task has no such mask version."""


class MaskCorrupt(RuntimeError):
    """Stored bits are not the bits that were stored."""


@dataclass(frozen=True, slots=True)
class MaskRow:
    """A version of a task's mask.

    bits: of `nbits` weights, packed; every row of a layer begins at a byte of its own, so that there may be more
    bits than weights, and those are zero. statistics: float32 of the mask's own normalisation, or None. batch_id: the
    batch that made the version; reason: why it exists when none did. reference: the task's record at that time.
    """

    task_id: int
    version: int
    batch_id: int | None
    bits: bytes
    nbits: int
    statistics: bytes | None = None
    reason: str | None = None
    reference: Json | None = None

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


def append_mask(session: Session, mask: MaskRow) -> None:
    """Store a new version.

    Raises ValueError when the bits cannot be those of `nbits` weights or the statistics are not float32, and
    sqlalchemy's IntegrityError when the version exists or the task does not.
    """
    _check(mask)
    session.add(
        MaskVersionRow(
            task_id=mask.task_id,
            version=mask.version,
            batch_id=mask.batch_id,
            bits=mask.bits,
            nbits=mask.nbits,
            statistics=mask.statistics,
            reason=mask.reason,
            reference=mask.reference,
            sha256=mask.sha256,
            density=mask.density,
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
        wanted = "mask" if version is None else f"mask version {version}"
        raise MaskUnknown(f"task {task_id} has no {wanted}")
    return _verified(row)


def find_before(session: Session, task_id: int, batch_id: int) -> int | None:
    """The last version of a task's mask that no batch from `batch_id` on had a part in; None when there is none."""
    versions = select(func.min(MaskVersionRow.version)).where(MaskVersionRow.task_id == task_id)
    touched = session.scalar(versions.where(MaskVersionRow.batch_id >= batch_id))
    if touched is None:
        return session.scalar(select(func.max(MaskVersionRow.version)).where(MaskVersionRow.task_id == task_id))
    return touched - 1 if touched > 1 else None


def load_heads(session: Session) -> dict[int, MaskRow]:
    """The newest version of every task's mask, by task. Raises MaskCorrupt."""
    newest = (
        select(MaskVersionRow.task_id, func.max(MaskVersionRow.version).label("version"))
        .group_by(MaskVersionRow.task_id)
        .subquery()
    )
    query = (
        select(MaskVersionRow)
        .join(
            newest,
            (MaskVersionRow.task_id == newest.c.task_id) & (MaskVersionRow.version == newest.c.version),
        )
        .order_by(MaskVersionRow.task_id)
    )
    return {row.task_id: _verified(row) for row in session.scalars(query)}


def list_versions(session: Session, task_id: int) -> list[int]:
    """The versions of a task's mask, oldest first."""
    query = select(MaskVersionRow.version).where(MaskVersionRow.task_id == task_id)
    return list(session.scalars(query.order_by(MaskVersionRow.version)))


def list_made_by(session: Session, batch_ids: Collection[int]) -> list[Version]:
    """The versions that these batches made, in order."""
    row = MaskVersionRow
    query = select(row.task_id, row.version, row.batch_id, row.density, row.reason).where(row.batch_id.in_(batch_ids))
    return [Version(*found) for found in session.execute(query.order_by(row.task_id, row.version))]


def list_corrupt(session: Session) -> list[str]:
    """Every stored mask that is not what was stored, in words."""
    query = select(MaskVersionRow).order_by(MaskVersionRow.task_id, MaskVersionRow.version)
    problems = []
    for row in session.scalars(query.execution_options(yield_per=16)):
        try:
            _verified(row)
        except MaskCorrupt as error:
            problems.append(str(error))
    return problems


def _check(mask: MaskRow) -> None:
    """Raises ValueError unless the row can be a mask of `nbits` weights."""
    if not 0 <= mask.nbits <= 8 * len(mask.bits):
        raise ValueError(f"{len(mask.bits)} bytes cannot hold the bits of {mask.nbits} weights")
    if (kept := packing.popcount(mask.bits)) > mask.nbits:
        raise ValueError(f"{kept} bits are set, more than the {mask.nbits} weights")
    if mask.statistics is not None and len(mask.statistics) % 4:
        raise ValueError(f"{len(mask.statistics)} bytes are not float32 statistics")


def _verified(row: MaskVersionRow) -> MaskRow:
    mask = MaskRow(
        row.task_id, row.version, row.batch_id, row.bits, row.nbits, row.statistics, row.reason, row.reference
    )
    where = f"mask of task {row.task_id}, version {row.version}"
    try:
        _check(mask)
    except ValueError as error:
        raise MaskCorrupt(f"{where}: {error}") from error
    if mask.sha256 != row.sha256:
        raise MaskCorrupt(f"{where}: the bits have another SHA-256 than when they were stored")
    if mask.density != row.density:
        raise MaskCorrupt(f"{where}: density {mask.density}, recorded {row.density}")
    return mask
