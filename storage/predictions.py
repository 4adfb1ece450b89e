"""Predictions that could not be written to their files yet: kept in the store until they are, or given up for room."""

import zlib

from sqlalchemy import delete, func, select
from sqlalchemy.orm import Session

from storage.models import BatchRow, PredictionRow, utc_now


class PredictionCorrupt(RuntimeError):
    """The kept bytes are not what was kept."""


def keep(session: Session, batch_id: int, data: bytes, most: int) -> list[int]:
    """Keeps the bytes of a batch's file; returns the batches whose bytes were given up for them, the oldest first.

    most: bytes that all may take, deflated. What alone takes more is not kept, and is what was given up.
    """
    payload = zlib.compress(data)
    if len(payload) > most:
        return [batch_id]
    session.add(PredictionRow(batch_id=batch_id, payload=payload, created_at=utc_now()))
    session.flush()
    size = func.length(PredictionRow.payload)
    excess = (session.scalar(select(func.sum(size))) or 0) - most
    given_up = []
    for old, freed in session.execute(select(PredictionRow.batch_id, size).order_by(PredictionRow.batch_id)):
        if excess <= 0:
            break
        given_up.append(old)
        excess -= freed
    for old in given_up:
        forget(session, old)
    return given_up


def count(session: Session) -> int:
    """How many are kept."""
    return session.scalar(select(func.count()).select_from(PredictionRow)) or 0


def list_kept(session: Session, most: int, after: int = 0) -> list[BatchRow]:
    """The batches whose predictions are kept, by id: at most so many, above `after`."""
    query = select(BatchRow).join(PredictionRow).where(BatchRow.id > after)
    return list(session.scalars(query.order_by(BatchRow.id).limit(most)))


def load(session: Session, batch_id: int) -> bytes:
    """The bytes of a batch's file. Raises PredictionCorrupt, also where none are kept."""
    payload = session.scalar(select(PredictionRow.payload).where(PredictionRow.batch_id == batch_id))
    try:
        return zlib.decompress(payload or b"")
    except zlib.error as error:
        raise PredictionCorrupt(f"prediction: that of batch {batch_id} is damaged: {error}") from error


def forget(session: Session, batch_id: int) -> None:
    """Its file is written, or it is given up."""
    session.execute(delete(PredictionRow).where(PredictionRow.batch_id == batch_id))


def is_superseded(session: Session, row: BatchRow) -> bool:
    """Whether a later batch of the same name, source and sender was scored: the file is that one's."""
    later = select(BatchRow.id).where(
        BatchRow.id > row.id,
        BatchRow.state == "scored",
        BatchRow.source == row.source,
        BatchRow.name == row.name,
        BatchRow.sender.is_not_distinct_from(row.sender),
    )
    return session.scalar(later.limit(1)) is not None


def list_corrupt(session: Session) -> list[str]:
    """What is not as it was kept, in words; each is inflated once."""
    problems = []
    for batch_id in list(session.scalars(select(PredictionRow.batch_id).order_by(PredictionRow.batch_id))):
        try:
            load(session, batch_id)
        except PredictionCorrupt as error:
            problems.append(str(error))
    return problems
