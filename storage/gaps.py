"""What sources lost before it was read. A source stands still at a gap until an operator accepts the loss."""

from sqlalchemy import select
from sqlalchemy.orm import Session

from storage import cursors
from storage.models import GapRow, utc_now


class GapUnknown(LookupError):
    """No gap of this source waits for anybody."""


def report(session: Session, source: str, key: str, position: str, reason: str) -> GapRow:
    """Record a gap, once for as long as it is open."""
    found = get_open(session, source)
    if found is not None and (found.key, found.position) == (key, position):
        return found
    row = GapRow(source=source, key=key, position=position, reason=reason, created_at=utc_now())
    session.add(row)
    session.flush()
    return row


def accept(session: Session, source: str) -> GapRow:
    """The loss is accepted: the source is read from behind the gap. Raises GapUnknown."""
    row = get_open(session, source)
    if row is None:
        raise GapUnknown(f"source {source} has no gap to accept")
    row.accepted_at = utc_now()
    cursors.advance(session, source, row.key, row.position)
    return row


def get_open(session: Session, source: str) -> GapRow | None:
    """The newest gap of a source that is not accepted."""
    query = select(GapRow).where(GapRow.source == source, GapRow.accepted_at.is_(None))
    return session.scalar(query.order_by(GapRow.id.desc()).limit(1))


def list_gaps(session: Session) -> list[GapRow]:
    """All gaps ever seen, oldest first."""
    return list(session.scalars(select(GapRow).order_by(GapRow.id)))
