"""The database file: one connection that writes, many that read, and everything that is particular to SQLite.

Nothing here ever opens the database file itself: closing any descriptor of it would drop SQLite's locks.
"""

import json
import os
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Self

import structlog
from alembic import command
from sqlalchemy import Connection, Engine, Pool, QueuePool, StaticPool, create_engine, event
from sqlalchemy.exc import DatabaseError, SQLAlchemyError
from sqlalchemy.orm import Session

from storage import features, masks, reservoir, schema
from storage.models import Base, StoreSession
from storage.schema import SchemaMismatch

__all__ = ["Database", "SchemaMismatch", "StoreError", "TransactionLost", "check", "migrating", "upgrade"]

log = structlog.get_logger("supsupd.storage")


class StoreError(RuntimeError):
    """The database refused: locked, full, damaged, or against a constraint. Nothing was stored."""


class TransactionLost(StoreError):
    """SQLite rolled the transaction back by itself, as on a full disk: all of it has to be done again."""


class Database:
    """A migrated database. Use `open`; one object per process."""

    def __init__(self, writer: Engine, readers: Engine) -> None:
        self._lock = threading.RLock()
        self._engines = (readers, writer)
        self._readers = readers
        self._writer = writer.connect()

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open a database that `upgrade` made.

        Raises SchemaMismatch when it is missing, not migrated, or newer than this program, StoreError when
        it cannot be used.
        """
        if not path.exists():
            raise SchemaMismatch(f"{path} does not exist: run `supsupd db upgrade`")
        path.chmod(0o600)
        _warn_of_wal_reset_bug(sqlite3.sqlite_version_info)
        readers = _engine(path, writes=False, pool=QueuePool)
        try:
            with _translated():
                with readers.connect() as connection:
                    if schema.pending_revisions(connection, schema.migration_config()):
                        raise SchemaMismatch(f"{path} has an older schema: run `supsupd db upgrade`")
                return cls(_engine(path, writes=True, pool=StaticPool), readers)
        except BaseException:
            readers.dispose()
            raise

    @contextmanager
    def write(self) -> Iterator[Session]:
        """One transaction on the one writing connection: all of it is committed at the end, or none of it.

        Other threads wait. Raises StoreError when the database refuses, TransactionLost when it gave the
        transaction up (an error that was caught inside never leads to half a commit), RuntimeError inside
        another `write` of the same thread.
        """
        with self._lock:
            if self._writer.in_transaction():
                raise RuntimeError("write() inside write(): pass the session on instead")
            try:
                with _translated(), _session(self._writer) as session, session.begin() as transaction:
                    session.connection()  # takes the write lock now: what is read next cannot be stale
                    yield session
                    if not transaction.is_active:  # an error was swallowed, or the block ended it
                        raise TransactionLost("the transaction was over before the end of its block")
            finally:
                self._writer.rollback()  # of what was begun behind the session's back

    @contextmanager
    def read(self) -> Iterator[Session]:
        """A read-only session on one snapshot, taken at its first query; it never waits for the writer."""
        with _translated(), _session(self._readers) as session:
            yield session

    def close(self) -> None:
        """Fold the write-ahead log into the file and close every connection."""
        with self._lock:
            self._readers.dispose()
            if not self._writer.closed:
                _driver(self._writer).execute("PRAGMA wal_checkpoint(TRUNCATE)")
                self._writer.close()
            for engine in self._engines:
                engine.dispose()


def upgrade(path: Path, location: str = schema.MIGRATIONS) -> list[str]:
    """Bring a database to the newest schema in one transaction; makes the file (0600) and its folder (0700).

    Returns the revisions applied, oldest first. Raises SchemaMismatch for a newer database, StoreError when
    it cannot be used.
    """
    with _translated(), migrating(path) as connection:
        config = schema.migration_config(connection, location)
        pending = schema.pending_revisions(connection, config)
        if pending:
            command.upgrade(config, "head")
    if pending:
        log.info("schema_upgraded", path=str(path), revisions=pending)
    return pending


@contextmanager
def migrating(path: Path) -> Iterator[Connection]:
    """A writing connection inside one transaction, for migrations.

    Foreign keys are checked at its end only, since SQLite changes a table by copying it.
    """
    _create_private(path)
    engine = _engine(path, writes=True, pool=StaticPool)
    try:
        with engine.connect() as connection:
            _driver(connection).execute("PRAGMA foreign_keys=OFF")
            with connection.begin():
                yield connection
                broken = connection.exec_driver_sql("PRAGMA foreign_key_check").all()
                if broken:
                    raise SchemaMismatch(
                        f"{path}: {len(broken)} rows refer to missing ones (foreign keys), as {broken[0]}"
                    )
    finally:
        engine.dispose()


def check(path: Path) -> list[str]:
    """What is wrong with a database, in words; nothing is changed. An empty list: it is sound.

    SQLite's own checks, the foreign keys, the schema against the models, the hashes of all masks and of the reservoir.
    """
    if not path.exists():
        return [f"{path} does not exist"]
    engine = _engine(path, writes=False, pool=QueuePool)
    try:
        with _session(engine) as session:
            return _damage(session) or _schema_problems(session) or _corrupt(session)
    except DatabaseError as error:
        return [f"{path}: {error.orig}"]
    finally:
        engine.dispose()


@contextmanager
def _translated() -> Iterator[None]:
    """SQLAlchemy's errors stay in this package."""
    try:
        yield
    except SQLAlchemyError as error:
        raise StoreError(f"the database refused: {getattr(error, 'orig', error)}") from error


def _damage(session: Session) -> list[str]:
    run = session.connection().exec_driver_sql
    found = [line for (line,) in run("PRAGMA integrity_check") if line != "ok"]
    orphans = [
        f"{table}: row {row} refers to a missing row of {parent}"
        for table, row, parent, _ in run("PRAGMA foreign_key_check")
    ]
    return found + orphans


def _corrupt(session: Session) -> list[str]:
    return masks.list_corrupt(session) + reservoir.list_corrupt(session) + features.list_corrupt(session)


def _schema_problems(session: Session) -> list[str]:
    try:
        pending = schema.pending_revisions(session.connection(), schema.migration_config())
    except SchemaMismatch as error:
        return [str(error)]
    if pending:
        return [f"revision {revision} is not applied: run `supsupd db upgrade`" for revision in pending]
    actual, wanted = schema.describe(session.connection()), _wanted_schema()
    missing = [f"missing: {fact}" for fact in sorted(wanted - actual)]
    return missing + [f"unexpected: {fact}" for fact in sorted(actual - wanted)]


def _wanted_schema() -> set[str]:
    engine = create_engine("sqlite://")
    try:
        with engine.connect() as connection:
            Base.metadata.create_all(connection)
            return schema.describe(connection)
    finally:
        engine.dispose()


def _engine(path: Path, *, writes: bool, pool: type[Pool]) -> Engine:
    engine = create_engine(
        "sqlite+pysqlite://",
        creator=partial(_connect, path, writes),
        poolclass=pool,
        json_serializer=partial(json.dumps, allow_nan=False, ensure_ascii=False),
    )
    begin = "BEGIN IMMEDIATE" if writes else "BEGIN"
    event.listen(engine, "begin", lambda connection: connection.exec_driver_sql(begin))
    event.listen(engine, "before_cursor_execute", _refuse_autocommit)
    event.listen(engine, "commit", _require_transaction)
    return engine


def _connect(path: Path, writes: bool) -> sqlite3.Connection:
    uri = f"{path.absolute().as_uri()}?mode={'rw' if writes else 'ro'}"
    # isolation_level None: no statement but our own begins a transaction.
    connection = sqlite3.connect(uri, uri=True, isolation_level=None, check_same_thread=False)
    settings = ["busy_timeout=5000", "foreign_keys=ON", "trusted_schema=OFF", "cell_size_check=ON"]
    settings += ["synchronous=FULL"] if writes else ["query_only=ON"]
    for setting in settings:
        connection.execute(f"PRAGMA {setting}")
    if writes and connection.execute("PRAGMA journal_mode=WAL").fetchone() != ("wal",):
        connection.close()
        raise OSError(f"{path}: this file system cannot hold SQLite's write-ahead log")
    return connection


def _driver(connection: Connection) -> sqlite3.Connection:
    driver = connection.connection.driver_connection
    assert isinstance(driver, sqlite3.Connection)
    return driver


def _require_transaction(connection: Connection) -> None:
    if not _driver(connection).in_transaction:
        raise TransactionLost("SQLite rolled the transaction back; nothing of it was stored")


def _refuse_autocommit(connection: Connection, _cursor: Any, statement: str, *_rest: Any) -> None:
    if not statement.startswith("BEGIN"):
        _require_transaction(connection)


def _session(bind: Engine | Connection) -> Session:
    # Rows stay readable when their session is gone.
    return StoreSession(bind, expire_on_commit=False)


def _create_private(path: Path) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:  # before SQLite opens it: the log files get the same mode
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    except FileExistsError:
        path.chmod(0o600)


def has_wal_reset_bug(version: tuple[int, ...]) -> bool:
    """Whether this SQLite can damage a WAL database when two connections write or checkpoint at once."""
    mended = version >= (3, 51, 3) or any(line <= version < (*line[:2], 99) for line in [(3, 50, 7), (3, 44, 6)])
    return version >= (3, 7, 0) and not mended


def _warn_of_wal_reset_bug(version: tuple[int, ...]) -> None:
    if has_wal_reset_bug(version):
        log.warning(
            "sqlite_wal_reset_bug",
            version=".".join(map(str, version)),
            advice="safe as long as only the daemon opens the database for writing; SQLite 3.51.3 mends it",
        )
