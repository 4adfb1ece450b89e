"""The store: one connection that writes, many that read, whole transactions or none. SQLite or PostgreSQL."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

import structlog
from alembic import command
from sqlalchemy import Connection, Engine
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from storage import schema
from storage.backend import REFUSALS, Backend, Target, new_session
from storage.backends import PATIENCE, backend_of, reading, translated
from storage.backup import back_up_before
from storage.errors import (
    CommitUnknown,
    DiskFull,
    SchemaMismatch,
    StoreError,
    StoreFailed,
    StoreTaken,
    StoreUnavailable,
    TransactionLost,
    ValueRefused,
)
from storage.sqlite import SqliteBackend
from storage.verification import find_differences, verify

__all__ = [
    "CommitUnknown",
    "Database",
    "DiskFull",
    "SchemaMismatch",
    "StoreError",
    "StoreFailed",
    "StoreTaken",
    "StoreUnavailable",
    "Target",
    "TransactionLost",
    "ValueRefused",
    "backend_of",
    "downgrade",
    "migrating",
    "reading",
    "refuse_older",
    "upgrade",
    "verify",
]

log = structlog.get_logger("supsupd.storage")


class Database:
    """A migrated database. Use `open`; one object per process."""

    def __init__(self, backend: Backend, readers: Engine) -> None:
        self._lock = threading.RLock()
        self._backend = backend
        self._readers = readers
        self._writers = backend.writer()
        self._writer: Connection | None = self._writers.connect()

    @property
    def backend(self) -> Backend:
        return self._backend

    @classmethod
    def open(cls, target: Target, patience: float = PATIENCE) -> Self:
        """Open a database that `upgrade` made, and be its only writer.

        patience: seconds to wait for a lock or a connection before StoreUnavailable or StoreTaken is raised.
        Raises SchemaMismatch when it is missing, not migrated, or newer than this program, StoreError when
        it cannot be used, ValueError for a URL of neither kind.
        """
        backend = backend_of(target, patience)
        if not backend.exists():
            raise SchemaMismatch(f"{backend.name} does not exist: run `supsupd db upgrade`")
        backend.refuse_unsafe()
        readers = backend.readers()
        try:
            with translated(backend):
                with readers.connect() as connection:
                    if schema.pending_revisions(connection, schema.migration_config()):
                        raise SchemaMismatch(f"{backend.name} has an older schema: run `supsupd db upgrade`")
                    # What is there besides, such as an index of the operator's own, does no harm.
                    if lacking := [
                        line for line in find_differences(backend, connection) if line.startswith("missing")
                    ]:
                        raise SchemaMismatch(f"{backend.name}: the schema is damaged: {lacking[0]}")
                backend.create()  # private, whatever it was
                return cls(backend, readers)
        except BaseException:
            readers.dispose()
            raise

    @contextmanager
    def write(self) -> Iterator[Session]:
        """One transaction on the one writing connection: all of it is committed at the end, or none of it.

        Other threads wait. A lost connection is replaced by a new one, which claims the store before anything else.
        Raises StoreError, as the subclass that says what to do; an error that was caught inside never leads to half
        a commit. Raises RuntimeError inside another `write` of the same thread.
        """
        committing = False
        with self._lock:
            if self._writer is not None and self._writer.in_transaction():
                raise RuntimeError("write() inside write(): pass the session on instead")
            try:
                with new_session(self._connected()) as session, session.begin() as transaction:
                    session.connection()  # takes the write lock now: what is read next cannot be stale
                    yield session
                    if not transaction.is_active:  # an error was swallowed, or the block ended it
                        raise TransactionLost("the transaction was over before the end of its block")
                    session.flush()
                    committing = True
            except REFUSALS as error:
                raise self._backend.explain(error, committing) from error
            finally:
                self._clear()

    @contextmanager
    def read(self) -> Iterator[Session]:
        """A read-only session on one snapshot, taken at its first query; it never waits for the writer."""
        with translated(self._backend), new_session(self._readers) as session:
            yield session

    def size(self, session: Session) -> int:
        """What the database takes, in bytes."""
        return self._backend.size(session.connection())

    def close(self) -> None:
        """Tidy up and close every connection. May be called twice."""
        with self._lock:
            self._readers.dispose()
            if self._writer is not None and not self._writer.invalidated:
                self._backend.fold(self._writer)
            self._drop()
            self._writers.dispose()

    def _connected(self) -> Connection:
        """The writing connection, alive a moment ago. Raises SQLAlchemyError, or StoreError."""
        if self._writer is not None and not self._answers(self._writer):
            log.warning("store_connection_lost", store=self._backend.name)
            self._drop()
        if self._writer is None:
            self._writer = self._writers.connect()
        return self._writer

    def _answers(self, connection: Connection) -> bool:
        dialect = connection.dialect
        try:
            return bool(dialect.do_ping(connection.connection.dbapi_connection))  # type: ignore[arg-type]
        except dialect.loaded_dbapi.Error:
            return False

    def _clear(self) -> None:
        """Nothing stays of what was begun behind the session's back; a connection that cannot do so goes."""
        if self._writer is None:
            return
        try:
            self._writer.rollback()
        except SQLAlchemyError:
            self._drop()
        else:
            if self._writer.invalidated:
                self._drop()

    def _drop(self) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            if not writer.invalidated:
                writer.invalidate()
            writer.close()


def upgrade(
    target: Target, location: str = schema.MIGRATIONS, *, state: Path | None = None, patience: float = PATIENCE
) -> list[str]:
    """Bring a database to the newest schema in one transaction; makes a file (0600) and its folder (0700).

    state: the state folder, where a backup of what is there is made first (`backup/`); for a file, the one it lies in.
    Returns the revisions applied, oldest first. Raises SchemaMismatch for a newer database, StoreError when
    it cannot be used or backed up.
    """
    backend = backend_of(target, patience)
    before, pending = find_pending(backend, location)
    if not pending:
        return []
    _back_up(backend, state, before)
    with translated(backend), backend.migrating() as connection:
        config = schema.migration_config(connection, location)
        pending = schema.pending_revisions(connection, config)
        if pending:
            command.upgrade(config, "head")
    if pending:
        log.info("schema_upgraded", store=backend.name, revisions=pending)
    return pending


def refuse_older(target: Target) -> None:
    """Raises SchemaMismatch for a database that is not of the newest schema, StoreError when it cannot be read."""
    backend = backend_of(target)
    _, pending = find_pending(backend)
    if pending:
        raise SchemaMismatch(f"{backend.name} has an older schema: run `supsupd db upgrade`")


def downgrade(
    target: Target, revision: str = "-1", *, state: Path | None = None, patience: float = PATIENCE
) -> tuple[str, str | None]:
    """Take the newest revision back, or all behind `revision`, in one transaction; the schema before, and after.

    state: as for `upgrade`. Raises SchemaMismatch where there is nothing to take back, StoreError when the database
    cannot be used or holds what the older schema cannot.
    """
    backend = backend_of(target, patience)
    if not backend.exists() or (before := find_pending(backend)[0]) is None:
        raise SchemaMismatch(f"{backend.name} has no schema to take back")
    backend.refuse_unsafe()
    _back_up(backend, state, before)
    with translated(backend), backend.migrating() as connection:
        config = schema.migration_config(connection)
        try:
            command.downgrade(config, revision)
        except RuntimeError as error:
            if isinstance(error, StoreError | SchemaMismatch):
                raise
            raise StoreError(str(error)) from error
        after = schema.current_revision(connection)
    log.info("schema_downgraded", store=backend.name, before=before, after=after)
    return before, after


def _back_up(backend: Backend, state: Path | None, revision: str | None) -> None:
    folder = backend.path.parent if state is None and isinstance(backend, SqliteBackend) else state
    if folder is None or revision is None:
        return
    file = back_up_before(backend, folder, revision)
    if file is not None:
        log.info("store_backed_up", store=backend.name, file=str(file))


@contextmanager
def migrating(target: Target) -> Iterator[Connection]:
    """A writing connection inside one transaction, for migrations."""
    backend = backend_of(target)
    backend.create()
    with backend.migrating() as connection:
        yield connection


def find_pending(backend: Backend, location: str = schema.MIGRATIONS) -> tuple[str | None, list[str]]:
    """The schema, and the revisions still to apply, found without writing to what is there; makes what is not.

    Raises SchemaMismatch for a newer database, StoreError for a damaged one if there is something to apply.
    """
    if not (existed := backend.exists()):
        backend.create()
    readers = backend.readers()
    try:
        with translated(backend), readers.connect() as connection:
            pending = schema.pending_revisions(connection, schema.migration_config(location=location))
            current = schema.current_revision(connection)
    except StoreError:
        if existed:
            backend.refuse_unsafe()  # says more, if it is damaged
        raise
    finally:
        readers.dispose()
    if existed and pending:
        backend.refuse_unsafe()
    return current, pending
