"""SQLite as the store: one connection that writes, many that read, one private file on a local disk.

Nothing here ever opens the database file itself: closing any descriptor of it would drop SQLite's locks.
"""

import ctypes
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import structlog
from sqlalchemy import Connection, Engine, NullPool, Pool, QueuePool, create_engine

from storage.backend import dump_json, guard, load_json, one_line
from storage.errors import DiskFull, SchemaMismatch, StoreError, StoreFailed, StoreUnavailable, ValueRefused

log = structlog.get_logger("supsupd.storage")

REMOTE = {
    0x6969: "NFS",
    0x517B: "SMB",
    0xFF534D42: "CIFS",
    0xFE534D42: "SMB",
    0x65735546: "FUSE",
}
"""File systems (statfs) whose locks or fsync SQLite's log cannot rely on."""
SMALL_BYTES = 256 << 20
"""Files up to this size are checked whole at every start, which takes about a second; larger ones after a crash."""
FOLD_MILLISECONDS = 1000


class SqliteBackend:
    """The database file `path`, which need not exist yet."""

    def __init__(self, path: Path, patience: float = 5.0) -> None:
        self.path = path
        self.name = str(path)
        self.patience = patience

    def exists(self) -> bool:
        return self.path.exists()

    def create(self) -> None:
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._refuse_remote()
        try:  # before SQLite opens it: the log files get the same mode
            os.close(os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        except FileExistsError:
            self.path.chmod(0o600)

    def refuse_unsafe(self) -> None:
        self._refuse_remote()
        small, crashed = self.path.stat().st_size <= SMALL_BYTES, self.crashed()
        thorough = small or has_wal_reset_bug(sqlite3.sqlite_version_info)
        if small or crashed:
            found = self._first_damage("integrity_check" if thorough else "quick_check")
            if found is not None:
                raise StoreError(f"{self.path} is damaged: {found}")
        _warn_of_wal_reset_bug(sqlite3.sqlite_version_info)

    def crashed(self) -> bool:
        """Whether the last writer did not close the database; one that has it open now looks the same."""
        try:
            return self.path.with_name(self.path.name + "-wal").stat().st_size > 0
        except FileNotFoundError:
            return False

    def writer(self) -> Engine:
        return self._engine(writes=True, pool=NullPool)

    def readers(self) -> Engine:
        return self._engine(writes=False, pool=QueuePool)

    @contextmanager
    def migrating(self) -> Iterator[Connection]:
        """Foreign keys are checked at the end only, since SQLite changes a table by copying it."""
        engine = self.writer()
        try:
            with engine.connect() as connection:
                _driver(connection).execute("PRAGMA foreign_keys=OFF")
                with connection.begin():
                    yield connection
                    broken = connection.exec_driver_sql("PRAGMA foreign_key_check").all()
                    if broken:
                        raise SchemaMismatch(
                            f"{self.path}: {len(broken)} rows refer to missing ones (foreign keys), as {broken[0]}"
                        )
                self.fold(connection)
        finally:
            engine.dispose()

    @contextmanager
    def scratch(self) -> Iterator[Connection]:
        engine = create_engine("sqlite://")
        try:
            with engine.connect() as connection:
                yield connection
        finally:
            engine.dispose()

    def find_damage(self, connection: Connection) -> list[str]:
        run = connection.exec_driver_sql
        found = [one_line(text) for (text,) in run("PRAGMA integrity_check") if text != "ok"]
        orphans = [
            f"{table}: row {row} refers to a missing row of {parent}"
            for table, row, parent, _ in run("PRAGMA foreign_key_check")
        ]
        return found + orphans

    def size(self, connection: Connection) -> int:
        pages: int = connection.exec_driver_sql("PRAGMA page_count").scalar_one()
        page_bytes: int = connection.exec_driver_sql("PRAGMA page_size").scalar_one()
        return pages * page_bytes

    def explain(self, error: Exception, committing: bool) -> StoreError:
        """A COMMIT that fails for want of room, or of a lock, stores nothing; any other failure ends the process."""
        cause = getattr(error, "orig", None) or error
        if isinstance(cause, StoreError):  # our own, of a value
            return cause
        return _kind(cause)(f"the database refused: {one_line(cause)}")

    def fold(self, connection: Connection) -> None:
        """Fold the write-ahead log into the file; not while another process is busy with it, for nothing is lost."""
        _driver(connection).execute(f"PRAGMA busy_timeout={FOLD_MILLISECONDS}")
        _driver(connection).execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def copy_to(self, target: Path) -> None:
        """Write a consistent copy to `target`, which must not exist, also while others write. Raises StoreError."""
        try:
            connection = self._connect(False)
            try:
                connection.execute("PRAGMA query_only=OFF")
                connection.execute("VACUUM INTO ?", (str(target),))
            finally:
                connection.close()
        except (sqlite3.Error, UnicodeDecodeError) as error:
            raise _kind(error)(f"the database refused: {one_line(error)}") from error

    def settle(self, compact: bool = False) -> None:
        """Leave the file alone, without a log; `compact`: and give the room of deleted rows back. Raises StoreError."""
        try:
            connection = self._connect(True)
            try:
                if compact:
                    connection.execute("VACUUM")
                connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            finally:
                connection.close()
        except (sqlite3.Error, UnicodeDecodeError) as error:
            raise _kind(error)(f"the database refused: {one_line(error)}") from error

    def _first_damage(self, check: str) -> str | None:
        try:
            connection = self._connect(False)
            try:
                found = connection.execute(f"PRAGMA {check}(1)").fetchone()[0]
            finally:
                connection.close()
        except (sqlite3.Error, UnicodeDecodeError) as error:
            if isinstance(error, sqlite3.Error) and _kind(error) is not StoreError:
                raise _kind(error)(f"the database refused: {one_line(error)}") from error
            found = str(error)
        return None if found == "ok" else one_line(found)

    def _refuse_remote(self) -> None:
        kind = REMOTE.get(file_system(self.path.parent))
        if kind is not None:
            raise StoreError(f"{self.path.parent} is on {kind}: put the database on a local disk, or in PostgreSQL")

    def _engine(self, *, writes: bool, pool: type[Pool]) -> Engine:
        engine = create_engine(
            "sqlite+pysqlite://",
            creator=partial(self._connect, writes),
            poolclass=pool,
            json_serializer=dump_json,
            json_deserializer=load_json,
            hide_parameters=True,
        )
        return guard(engine, "BEGIN IMMEDIATE" if writes else "BEGIN", lambda driver: driver.in_transaction)

    def _connect(self, writes: bool) -> sqlite3.Connection:
        uri = f"{self.path.absolute().as_uri()}?mode={'rw' if writes else 'ro'}"
        # isolation_level None: no statement but our own begins a transaction.
        connection = sqlite3.connect(
            uri, uri=True, isolation_level=None, check_same_thread=False, timeout=self.patience
        )
        settings = ["foreign_keys=ON", "trusted_schema=OFF", "cell_size_check=ON"]
        settings += ["synchronous=FULL"] if writes else ["query_only=ON"]
        try:
            for setting in settings:
                connection.execute(f"PRAGMA {setting}")
            if writes and connection.execute("PRAGMA journal_mode=WAL").fetchone() != ("wal",):
                raise OSError(f"{self.path}: this file system cannot hold SQLite's write-ahead log")
        except BaseException:
            connection.close()
            raise
        return connection


def file_system(folder: Path) -> int:
    """The number by which Linux knows the kind of file system that `folder` is on. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    answer = ctypes.create_string_buffer(256)  # struct statfs begins with it
    if libc.statfs(os.fsencode(folder), answer) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(folder))
    return ctypes.c_long.from_buffer(answer).value & 0xFFFFFFFF


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


def _kind(error: BaseException) -> type[StoreError]:
    code = getattr(error, "sqlite_errorcode", 0)
    if code == sqlite3.SQLITE_IOERR_SHMSIZE:  # the index of the log could not grow
        return DiskFull
    if code == sqlite3.SQLITE_IOERR_SHORT_READ:  # the file ends too early
        return StoreError
    kinds: dict[int, type[StoreError]] = {
        sqlite3.SQLITE_BUSY: StoreUnavailable,
        sqlite3.SQLITE_LOCKED: StoreUnavailable,
        sqlite3.SQLITE_FULL: DiskFull,
        sqlite3.SQLITE_IOERR: StoreFailed,
        sqlite3.SQLITE_CONSTRAINT: ValueRefused,
        sqlite3.SQLITE_MISMATCH: ValueRefused,
        sqlite3.SQLITE_TOOBIG: ValueRefused,
    }
    return kinds.get(code & 0xFF, StoreError)


def _driver(connection: Connection) -> Any:
    return connection.connection.driver_connection
