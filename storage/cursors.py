"""How far each source has been read, in the transaction that makes what was read durable."""

from collections.abc import Collection, Mapping

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from storage.bounds import storable
from storage.models import CursorRow, digest_key


def advance(session: Session, source: str, key: str, position: str) -> None:
    """Record that `source` is read up to `position` for `key`."""
    advance_all(session, source, {key: position})


def advance_all(session: Session, source: str, positions: Mapping[str, str]) -> None:
    """Record that `source` is read up to these positions, by their keys."""
    digests = {key: digest_key(source, key) for key in positions}
    found = session.scalars(select(CursorRow).where(CursorRow.digest.in_(digests.values())))
    known = {row.digest: row for row in found}
    for key, position in positions.items():
        if digests[key] in known:
            known[digests[key]].position = position
        else:
            session.add(CursorRow(digest=digests[key], source=source, key=storable(key), position=position))
    session.flush()


def load_cursors(session: Session, source: str) -> dict[str, str]:
    """The recorded position for every key of a source."""
    query = select(CursorRow.key, CursorRow.position).where(CursorRow.source == source)
    return {row.key: row.position for row in session.execute(query)}


def find_positions(session: Session, source: str, keys: Collection[str]) -> dict[str, str]:
    """How far `source` is read for these keys; those that it never was are missing."""
    wanted = {digest_key(source, key): key for key in keys}
    query = select(CursorRow.digest, CursorRow.position).where(CursorRow.digest.in_(wanted))
    return {wanted[row.digest]: row.position for row in session.execute(query)}


def forget(session: Session, source: str, key: str) -> None:
    """Nothing is known of `key` any more: the source may hand it over again."""
    session.execute(delete(CursorRow).where(CursorRow.digest == digest_key(source, key)))
