"""The Hopfield reservoir: one matrix for each layer, and which mask versions it holds. Opaque bytes, verified."""

from dataclasses import dataclass

from sqlalchemy import delete, func, select
from sqlalchemy.orm import Session

from storage import packing
from storage.models import ReservoirPatternRow, ReservoirRow, utc_now


class ReservoirCorrupt(RuntimeError):
    """A stored matrix is not what was stored."""


@dataclass(frozen=True, slots=True)
class Matrix:
    """One layer's matrix between `size` neurons, with how many patterns are in it; the payload is opaque here."""

    layer: int
    size: int
    patterns: int
    payload: bytes


@dataclass(frozen=True, slots=True)
class Pattern:
    """A mask version that is an attractor; patterns come in the order in which they were stored."""

    task_id: int
    version: int


def save_matrix(session: Session, matrix: Matrix) -> None:
    """Store a layer's matrix in place of its last one."""
    session.merge(
        ReservoirRow(
            layer=matrix.layer,
            size=matrix.size,
            patterns=matrix.patterns,
            matrix=matrix.payload,
            sha256=packing.sha256(matrix.payload),
            updated_at=utc_now(),
        )
    )
    session.flush()


def load_matrices(session: Session) -> list[Matrix]:
    """All matrices, by layer. Raises ReservoirCorrupt."""
    return [_verified(row) for row in session.scalars(select(ReservoirRow).order_by(ReservoirRow.layer))]


def list_corrupt(session: Session) -> list[str]:
    """Every stored matrix that is not what was stored, in words."""
    problems = []
    for row in session.scalars(select(ReservoirRow).order_by(ReservoirRow.layer)):
        try:
            _verified(row)
        except ReservoirCorrupt as error:
            problems.append(str(error))
    return problems


def add_pattern(session: Session, task_id: int, version: int) -> None:
    """Record that a task's version is an attractor now; it becomes the newest."""
    turn = (session.scalar(select(func.max(ReservoirPatternRow.turn))) or 0) + 1
    session.merge(ReservoirPatternRow(task_id=task_id, version=version, turn=turn))
    session.flush()


def remove_pattern(session: Session, task_id: int) -> None:
    """Forget a task's pattern, if there is one."""
    session.execute(delete(ReservoirPatternRow).where(ReservoirPatternRow.task_id == task_id))


def list_patterns(session: Session) -> list[Pattern]:
    """All patterns, the oldest first."""
    rows = session.scalars(select(ReservoirPatternRow).order_by(ReservoirPatternRow.turn))
    return [Pattern(row.task_id, row.version) for row in rows]


def _verified(row: ReservoirRow) -> Matrix:
    if packing.sha256(row.matrix) != row.sha256:
        raise ReservoirCorrupt(f"reservoir, layer {row.layer}: the matrix has another SHA-256 than when it was stored")
    return Matrix(row.layer, row.size, row.patterns, row.matrix)
