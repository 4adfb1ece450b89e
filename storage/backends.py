"""Which backend a target means, and reading through one without being its writer."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy.orm import Session

from storage.backend import REFUSALS, Backend, Target, new_session
from storage.postgresql import PostgresBackend
from storage.sqlite import SqliteBackend

PATIENCE = 4.0
"""Seconds to wait for a lock that someone else holds, or for a connection."""


def backend_of(target: Target, patience: float = PATIENCE) -> Backend:
    """What a path or a URL means; nothing is opened. Raises ValueError for a URL of neither kind."""
    if isinstance(target, Path):
        return SqliteBackend(target, patience)
    kind, separator, place = target.partition(":///")
    if separator and kind == "sqlite" and place:
        return SqliteBackend(Path(place), patience)
    if target.startswith(("postgresql://", "postgres://")):
        return PostgresBackend(target.replace("postgres://", "postgresql://", 1), patience)
    raise ValueError("database: expected sqlite:///FILE or postgresql://USER:PASSWORD@HOST:PORT/NAME")


@contextmanager
def reading(target: Target, patience: float = PATIENCE) -> Iterator[Session]:
    """A read-only session on one snapshot of a database of any schema, beside whoever writes it. Raises StoreError."""
    backend = backend_of(target, patience)
    readers = backend.readers()
    try:
        with translated(backend), new_session(readers) as session:
            yield session
    finally:
        readers.dispose()


@contextmanager
def translated(backend: Backend) -> Iterator[None]:
    """SQLAlchemy's errors stay in this package."""
    try:
        yield
    except REFUSALS as error:
        raise backend.explain(error, committing=False) from error
