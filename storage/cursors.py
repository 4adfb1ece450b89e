"""How far each source has been read, in the transaction that makes what was read durable."""

from collections.abc import Collection, Mapping

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from storage.models import CursorRow


def advance(session: Session, source: str, key: str, position: str) -> None:
    """Record that `source` is read up to `position` for `key`."""
    advance_all(session, source, {key: position})


def advance_all(session: Session, source: str, positions: Mapping[str, str]) -> None:
    """Record that `source` is read up to these positions, by their keys."""
    where = (CursorRow.source == source, CursorRow.key.in_(positions))
    known = {row.key: row for row in session.scalars(select(CursorRow).where(*where))}
    for key, position in positions.items():
        if key in known:
            known[key].position = position
        else:
            session.add(CursorRow(source=source, key=key, position=position))
    session.flush()


def load_cursors(session: Session, source: str) -> dict[str, str]:
    """The recorded position for every key of a source."""
    query = select(CursorRow.key, CursorRow.position).where(CursorRow.source == source)
    return {row.key: row.position for row in session.execute(query)}


def find_positions(session: Session, source: str, keys: Collection[str]) -> dict[str, str]:
    """How far `source` is read for these keys; those that it never was are missing."""
    query = select(CursorRow.key, CursorRow.position).where(CursorRow.source == source, CursorRow.key.in_(keys))
    return {row.key: row.position for row in session.execute(query)}


def forget(session: Session, source: str, key: str) -> None:
    """Nothing is known of `key` any more: the source may hand it over again."""
    session.execute(delete(CursorRow).where(CursorRow.source == source, CursorRow.key == key))
