"""PostgreSQL as the store: one connection that writes and holds an advisory lock, a pool that reads snapshots.

The lock belongs to the session of the writing connection: whoever writes holds it, and who loses it has lost the
connection too. It needs PostgreSQL itself at the other end, or a pooler in session mode.
"""

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from sqlalchemy import (
    URL,
    Connection,
    Engine,
    ExceptionContext,
    MetaData,
    NullPool,
    QueuePool,
    create_engine,
    event,
    make_url,
    text,
)
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from storage.backend import dump_json, guard, load_json, one_line
from storage.errors import (
    CommitUnknown,
    DiskFull,
    SchemaMismatch,
    StoreError,
    StoreFailed,
    StoreTaken,
    StoreUnavailable,
    ValueRefused,
)

SAFE = ("fsync", "full_page_writes", "synchronous_commit")
STATEMENT_SECONDS = 60
KEEPALIVE = {"keepalives_idle": 30, "keepalives_interval": 10, "keepalives_count": 3, "tcp_user_timeout": 60_000}
"""A peer that is gone without a word is noticed within a minute, at both ends."""
STALE = frozenset(
    (
        "0A000",  # a plan that no longer fits
        "25006",  # read-only: by a setting, or as a standby
        "26000",  # a prepared statement that is gone
        "3F000",  # no such schema: the search path
        "42501",  # what the role may not do any more
        "42P01",  # no such table: the search path
        "55000",  # not now, as on a standby
    )
)
"""SQLSTATE -> the session is bound to what was true when it began, and a new one need not be: StoreUnavailable too."""
KINDS: dict[str, type[StoreError]] = {
    "22": ValueRefused,  # data
    "23": ValueRefused,  # constraints
    "54": ValueRefused,  # more than fits
    "08": StoreUnavailable,  # connections
    "25P03": StoreUnavailable,  # idle too long within a transaction
    "25P04": StoreUnavailable,  # a transaction that took too long
    "53100": DiskFull,
    "58030": StoreFailed,
    "53200": StoreUnavailable,  # out of memory
    "53300": StoreUnavailable,  # too many connections
    "55P03": StoreUnavailable,  # lock not available
    "57014": StoreUnavailable,  # statement timeout
    "57P01": StoreUnavailable,  # terminated by an administrator
    "57P02": StoreUnavailable,  # crash of another backend
    "57P03": StoreUnavailable,  # starting up, shutting down
    "57P04": StoreUnavailable,  # the database was dropped
    "57P05": StoreUnavailable,  # idle session timeout
    "40001": StoreUnavailable,
    "40P01": StoreUnavailable,
}
"""SQLSTATE, or its class -> what it is to us; none at all is StoreUnavailable, all others StoreError."""
SEARCH_PATH = re.compile(r"search_path\s*=\s*([^\s]+)")


class PostgresBackend:
    """The database that a URL names; its tables are in the first schema of the search path.

    Raises ValueError for a URL that is none, StoreError when the driver is not installed.
    """

    def __init__(self, url: str, patience: float = 5.0) -> None:
        self.patience = patience
        try:
            self._url = _with_password_in_place(make_url(url)).set(drivername="postgresql+psycopg")
        except (ArgumentError, ValueError):
            raise ValueError("database: expected postgresql://USER:PASSWORD@HOST:PORT/NAME") from None
        try:
            import psycopg
        except ImportError:
            raise StoreError("a PostgreSQL store needs psycopg: install supsupd[postgresql]") from None
        self._driver = psycopg
        self._secrets = [str(self._url.password)] if self._url.password else []
        schema = SEARCH_PATH.search(str(self._url.query.get("options", "")))
        self.name = f"postgresql://{self._url.host or ''}:{self._url.port or 5432}/{self._url.database or ''}"
        if schema is not None:
            self.name += f" (schema {schema[1]})"

    def __repr__(self) -> str:
        return f"PostgresBackend({self.name!r})"

    def exists(self) -> bool:
        engine = self.readers()
        try:
            with engine.connect() as connection:
                return bool(connection.scalar(text("SELECT to_regclass('alembic_version') IS NOT NULL")))
        except SQLAlchemyError as error:
            raise self.explain(error, committing=False) from None
        finally:
            engine.dispose()

    def create(self) -> None:
        """Nothing: the database, and the schema if the URL names one, are made by their owner."""

    def refuse_unsafe(self) -> None:
        """Nothing yet: every writing connection looks at the server's settings itself."""

    def writer(self) -> Engine:
        return self._writer(statement_seconds=STATEMENT_SECONDS)

    def readers(self) -> Engine:
        engine = self._engine(STATEMENT_SECONDS, poolclass=QueuePool, pool_pre_ping=True)
        return guard(engine, "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY", self._in_transaction)

    @contextmanager
    def migrating(self) -> Iterator[Connection]:
        engine = self._writer(statement_seconds=0)
        try:
            with engine.connect() as connection, connection.begin():
                yield connection
        finally:
            engine.dispose()

    @contextmanager
    def scratch(self) -> Iterator[Connection]:
        """Temporary tables, rolled back."""
        engine = guard(self._engine(STATEMENT_SECONDS, poolclass=NullPool), "BEGIN", self._in_transaction)
        try:
            with engine.connect() as connection:
                connection.exec_driver_sql("SET LOCAL search_path = pg_temp")
                yield connection
        finally:
            engine.dispose()

    def find_damage(self, connection: Connection) -> list[str]:
        """PostgreSQL has no check of its own to run: the foreign keys are followed, in every schema version."""
        reflected = MetaData()
        reflected.reflect(connection)
        found = []
        for table in reflected.sorted_tables:
            for key in table.foreign_keys:
                parent = key.column.table.alias("parent")
                orphans = table.outerjoin(parent, key.parent == parent.c[key.column.name])
                query = table.select().with_only_columns(key.parent).select_from(orphans)
                lost = connection.scalars(query.where(key.parent.is_not(None), parent.c[key.column.name].is_(None)))
                found += [f"{table.name}: {key.parent.name} {value} is a missing row of {key.column.table.name}"
                          for value in lost]  # fmt: skip
        return found

    def size(self, connection: Connection) -> int:
        size: int = connection.exec_driver_sql("SELECT pg_database_size(current_database())").scalar_one()
        return size

    def explain(self, error: Exception, committing: bool) -> StoreError:
        """A COMMIT whose connection is gone may have been carried out: only a new connection can tell."""
        cause = getattr(error, "orig", None) or error
        if isinstance(cause, StoreError):  # our own, of a value
            return cause
        state = getattr(cause, "sqlstate", None)
        gone = bool(getattr(error, "connection_invalidated", False)) or (state or "").startswith("08")
        kind = CommitUnknown if committing and gone else self._kind(cause, state)
        return kind(f"the database refused: {self._safe(cause)}")

    def fold(self, connection: Connection) -> None:
        """Give the lock back now: the server would only when it notices that we are gone."""
        self._raw(connection).execute("SELECT pg_advisory_unlock_all()")

    def _kind(self, cause: BaseException, state: str | None) -> type[StoreError]:
        if state is None:
            away = (self._driver.OperationalError, self._driver.InterfaceError)
            return StoreUnavailable if isinstance(cause, away) else StoreError
        return StoreUnavailable if state in STALE else KINDS.get(state, KINDS.get(state[:2], StoreError))

    def _safe(self, cause: BaseException) -> str:
        said = one_line(cause)
        for secret in self._secrets:
            said = said.replace(secret, "***")
        return said

    def _writer(self, statement_seconds: int) -> Engine:
        engine = self._engine(statement_seconds, poolclass=NullPool)
        event.listen(engine, "connect", self._claim)
        return guard(engine, "BEGIN", self._in_transaction)

    def _engine(self, statement_seconds: int, **pool: Any) -> Engine:
        settings = {"autocommit": True, "prepare_threshold": None, "connect_timeout": max(2, round(self.patience))}
        engine = create_engine(
            self._url,
            # What the URL says itself goes first.
            connect_args={key: value for key, value in (settings | KEEPALIVE).items() if key not in self._url.query},
            json_serializer=dump_json,
            json_deserializer=load_json,
            hide_parameters=True,
            use_native_hstore=False,
            **pool,
        )
        event.listen(engine, "connect", partial(_set_up, statement_seconds))
        event.listen(engine, "handle_error", _give_up_stale)
        return engine

    def _claim(self, driver: Any, _record: Any) -> None:
        """Refuse a server that forgets commits, and be its only writer."""
        for setting in SAFE:
            if driver.execute(f"SHOW {setting}").fetchone()[0] == "off":
                raise StoreError(f"{self.name}: {setting} is off, so that commits may be lost: turn it on")
        (schema,) = driver.execute("SELECT current_schema()").fetchone()
        if schema is None:
            raise SchemaMismatch(f"{self.name}: there is no such schema: CREATE SCHEMA makes it")
        driver.execute(f"SET lock_timeout = {round(1000 * self.patience) or 1}")
        try:
            driver.execute(f"SELECT pg_advisory_lock({lock_key(schema)})")
        except self._driver.errors.LockNotAvailable:
            raise StoreTaken(f"{self.name} is used by another supsupd") from None

    def _in_transaction(self, driver: Any) -> bool:
        return bool(driver.info.transaction_status == self._driver.pq.TransactionStatus.INTRANS)

    @staticmethod
    def _raw(connection: Connection) -> Any:
        return connection.connection.driver_connection


def lock_key(schema: str) -> int:
    """The number of the advisory lock on a schema's store; such locks are one database's own."""
    return int.from_bytes(hashlib.sha256(f"supsupd {schema}".encode()).digest()[:8], signed=True)


def _with_password_in_place(url: URL) -> URL:
    """Where SQLAlchemy knows it as a secret."""
    given = url.query.get("password")
    return url if given is None else url.set(password=str(given)).difference_update_query(["password"])


def _set_up(statement_seconds: int, driver: Any, _record: Any) -> None:
    """Times in UTC, an end to every statement, and an end to a session whose client is gone."""
    driver.execute(
        f"SET TIME ZONE 'UTC'; SET statement_timeout = '{statement_seconds}s'; SET client_encoding = 'UTF8';"
        " SET tcp_keepalives_idle = 30; SET tcp_keepalives_interval = 10; SET tcp_keepalives_count = 3"
    )


def _give_up_stale(context: ExceptionContext) -> None:
    """Such a session is treated as a lost one: it is dropped, and a new one made for what comes next."""
    if getattr(context.original_exception, "sqlstate", None) in STALE:
        context.is_disconnect = True
