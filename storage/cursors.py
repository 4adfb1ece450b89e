"""How far each source has been read, in the transaction that makes what was read durable."""

from sqlalchemy import select
from sqlalchemy.orm import Session

from storage.models import CursorRow


def advance(session: Session, source: str, key: str, position: str) -> None:
    """Record that `source` is read up to `position` for `key`."""
    session.merge(CursorRow(source=source, key=key, position=position))
    session.flush()


def load_cursors(session: Session, source: str) -> dict[str, str]:
    """The recorded position for every key of a source."""
    query = select(CursorRow.key, CursorRow.position).where(CursorRow.source == source)
    return {row.key: row.position for row in session.execute(query)}
