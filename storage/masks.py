"""The mask store: every version of every task's supermask, written once and verified at every load."""

from dataclasses import dataclass

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from storage import packing
from storage.models import MaskVersionRow, utc_now


class MaskUnknown(LookupError):
    """The task has no such mask version."""


class MaskCorrupt(RuntimeError):
    """Stored bits are not the bits that were stored."""


@dataclass(frozen=True, slots=True)
class MaskRow:
    """A version of a task's mask. bits: `nbits` weights, packed; batch_id: the batch that made it."""

    task_id: int
    version: int
    batch_id: int | None
    bits: bytes
    nbits: int

    @property
    def density(self) -> float:
        """The fraction of weights kept."""
        return packing.popcount(self.bits) / self.nbits if self.nbits else 0.0

    @property
    def sha256(self) -> str:
        return packing.sha256(self.bits)


def append_mask(session: Session, mask: MaskRow) -> None:
    """Store a new version.

    Raises ValueError when the bits are not `nbits` packed bits, and sqlalchemy's IntegrityError
    when the version exists or the task does not.
    """
    packing.check_packed(mask.bits, mask.nbits)
    session.add(
        MaskVersionRow(
            task_id=mask.task_id,
            version=mask.version,
            batch_id=mask.batch_id,
            bits=mask.bits,
            nbits=mask.nbits,
            sha256=mask.sha256,
            density=mask.density,
            created_at=utc_now(),
        )
    )
    session.flush()


def load_mask(session: Session, task_id: int, version: int | None = None) -> bytes:
    """The packed bits of a version, or of the newest one. Raises MaskUnknown or MaskCorrupt."""
    query = select(MaskVersionRow).where(MaskVersionRow.task_id == task_id)
    if version is not None:
        query = query.where(MaskVersionRow.version == version)
    row = session.scalar(query.order_by(MaskVersionRow.version.desc()).limit(1))
    if row is None:
        wanted = "mask" if version is None else f"mask version {version}"
        raise MaskUnknown(f"task {task_id} has no {wanted}")
    return _verified(row).bits


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


def _verified(row: MaskVersionRow) -> MaskRow:
    mask = MaskRow(row.task_id, row.version, row.batch_id, row.bits, row.nbits)
    where = f"mask of task {row.task_id}, version {row.version}"
    try:
        packing.check_packed(mask.bits, mask.nbits)
    except ValueError as error:
        raise MaskCorrupt(f"{where}: {error}") from error
    if mask.sha256 != row.sha256:
        raise MaskCorrupt(f"{where}: the bits have another SHA-256 than when they were stored")
    if mask.density != row.density:
        raise MaskCorrupt(f"{where}: density {mask.density}, recorded {row.density}")
    return mask
