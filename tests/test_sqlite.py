"""SQLite as the store: its locks, its errors, its files."""

import os
import resource
import sqlite3
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from sqlalchemy.exc import OperationalError
from test_migrations import next_migration

from storage import cursors, db, sqlite
from storage.db import Database, DiskFull, StoreError, StoreFailed, StoreUnavailable, TransactionLost, verify
from storage.sqlite import SqliteBackend


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "state" / "supsup.db"
    db.upgrade(path)
    return path


@pytest.fixture
def store(path):
    store = Database.open(path)
    yield store
    store.close()


def positions(store):
    with store.read() as session:
        return cursors.load_cursors(session, "folder")


def advance(store, key, position="1"):
    with store.write() as session:
        cursors.advance(session, "folder", key, position)


def pragma(session, name):
    return session.connection().exec_driver_sql(f"PRAGMA {name}").scalar()


def test_write_takes_the_lock_before_its_first_query(store, path):
    other = sqlite3.connect(path, isolation_level=None, timeout=0)
    with store.write(), pytest.raises(sqlite3.OperationalError, match="locked"):
        other.execute("BEGIN IMMEDIATE")
    other.execute("BEGIN IMMEDIATE")
    other.close()


@pytest.mark.parametrize("error_is", ["raised", "swallowed", "swallowed, then more is written"])
def test_a_full_disk_never_leads_to_half_a_transaction(store, error_is):
    advance(store, "before")
    with pytest.raises(DiskFull if error_is == "raised" else TransactionLost), store.write() as session:
        run = session.connection().exec_driver_sql
        run(f"PRAGMA max_page_count = {pragma(session, 'page_count') + 2}")
        run("INSERT INTO cursor VALUES ('a', 'folder', 'first half', '1')")
        try:
            run("INSERT INTO cursor VALUES ('b', 'folder', 'too much', ?)", ("x" * 1_000_000,))
        except OperationalError as error:
            assert "full" in str(error)
            if error_is == "raised":
                raise
        if error_is != "swallowed":
            run("INSERT INTO cursor VALUES ('c', 'folder', 'second half', '1')")
    assert positions(store) == {"before": "1"}
    with store.write() as session:
        pragma(session, "max_page_count = 1000000")
    advance(store, "after")
    assert set(positions(store)) == {"before", "after"}


def test_the_connections_are_set_up_for_safety(store):
    with store.write() as session:
        assert pragma(session, "journal_mode") == "wal"
        assert pragma(session, "synchronous") == 2
        assert pragma(session, "trusted_schema") == 0
        assert pragma(session, "cell_size_check") == 1
    with store.read() as session:
        assert pragma(session, "query_only") == 1


@pytest.mark.parametrize("umask", [0o000, 0o077])
def test_the_files_are_private_under_any_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        path = tmp_path / "fresh" / "supsup.db"
        db.upgrade(path)
        store = Database.open(path)
        advance(store, "a")
        modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in path.parent.iterdir()}
        store.close()
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert modes == {"supsup.db": 0o600, "supsup.db-wal": 0o600, "supsup.db-shm": 0o600}


def test_close_leaves_one_file_and_may_be_called_twice(path):
    store = Database.open(path)
    advance(store, "a")
    store.close()
    store.close()
    assert [file.name for file in path.parent.iterdir()] == ["supsup.db"]


def test_a_path_with_the_signs_of_a_url_is_a_path(tmp_path):
    path = tmp_path / "a?mode=memory#b%20 c" / "supsup.db"
    db.upgrade(path)
    store = Database.open(path)
    advance(store, "a")
    store.close()
    assert path.is_file()


@pytest.mark.parametrize("open_it", [Database.open, db.upgrade])
def test_a_file_that_is_no_database_is_refused_and_left_alone(tmp_path, open_it):
    path = tmp_path / "supsup.db"
    path.write_bytes(b"not a database at all" * 100)
    with pytest.raises(StoreError, match="not a database"):
        open_it(path)
    assert path.read_bytes() == b"not a database at all" * 100
    assert "not a database" in verify(path)[0]


@pytest.mark.parametrize(
    ("version", "affected"),
    [
        ((3, 6, 23), False),
        ((3, 40, 1), True),
        ((3, 44, 5), True),
        ((3, 44, 6), False),
        ((3, 45, 0), True),
        ((3, 50, 7), False),
        ((3, 51, 2), True),
        ((3, 51, 3), False),
        ((3, 54, 0), False),
    ],
)
def test_the_sqlite_versions_with_the_wal_reset_bug_are_known(version, affected):
    assert sqlite.has_wal_reset_bug(version) is affected


def test_a_write_that_fails_on_the_disk_ends_in_store_failed(store):
    advance(store, "before")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # the system says EFBIG behind it
    try:
        with pytest.raises(StoreFailed, match="I/O"):
            advance(store, "too much", "x" * 1_000_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert positions(store) == {"before": "1"}


HOLD = """
import sqlite3, sys
other = sqlite3.connect(sys.argv[1], isolation_level=None)
other.execute("BEGIN EXCLUSIVE")
print("held", flush=True)
sys.stdin.read()
"""


def test_a_database_that_another_process_locks_is_unavailable_until_it_lets_go(path):
    store = Database.open(path, patience=0.05)
    with subprocess.Popen([sys.executable, "-c", HOLD, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(StoreUnavailable, match="locked"):
            advance(store, "a")
        assert positions(store) == {}
        other.communicate(timeout=180)
    advance(store, "b")
    assert positions(store) == {"b": "1"}
    store.close()


def leave_unclean(path):
    """As after a kill: what was committed is in the log alone."""
    script = "import os, sys; sys.path.insert(0, sys.argv[2]); from test_sqlite import *;"
    script += "store = Database.open(Path(sys.argv[1])); advance(store, 'a'); os.kill(os.getpid(), 9)"
    killed = subprocess.run([sys.executable, "-c", script, path, Path(__file__).parent], timeout=180)
    assert killed.returncode == -9


def test_a_database_that_was_not_closed_is_seen_as_such(path):
    assert not SqliteBackend(path).crashed()
    leave_unclean(path)
    assert SqliteBackend(path).crashed()
    store = Database.open(path)
    assert positions(store) == {"a": "1"}
    store.close()
    assert not SqliteBackend(path).crashed()


def upgrade_further(path):
    """As a newer program, which has one more revision, would."""
    with tempfile.TemporaryDirectory() as folder:
        db.upgrade(path, str(next_migration(Path(folder), "pass")))


@pytest.mark.parametrize("open_it", [Database.open, upgrade_further])
@pytest.mark.parametrize("unclean", [False, True])
def test_a_damaged_page_is_found_before_anything_is_written(path, open_it, unclean):
    if unclean:
        leave_unclean(path)
    content = bytearray(path.read_bytes())
    content[4096:8192] = bytes(4096)
    path.write_bytes(content)
    log = path.with_name("supsup.db-wal")
    before = log.read_bytes() if log.exists() else None
    with pytest.raises(StoreError, match=r"^[^\n]*supsup\.db is damaged: [^\n]+$"):
        open_it(path)
    assert path.read_bytes() == content
    assert (log.read_bytes() if unclean else None) == before
    assert verify(path) != []


def test_a_value_of_the_wrong_type_is_found_and_refused_in_one_line(path, store):
    with sqlite3.connect(path) as connection:
        columns = "id, source, key, position, reason, created_at"
        connection.execute(f"INSERT INTO gap ({columns}) VALUES (1, 's', 'k', 'p', 'r', 'yesterday')")
    (problem,) = verify(path)
    assert problem.startswith("gap: a value cannot be read: a stored value is damaged: it is not a time")


def test_the_kind_of_a_file_system_is_known(tmp_path):
    assert sqlite.file_system(Path("/proc")) == 0x9FA0
    with pytest.raises(FileNotFoundError):
        sqlite.file_system(tmp_path / "nowhere")


@pytest.mark.parametrize("open_it", [Database.open, upgrade_further])
def test_a_network_file_system_is_refused(path, monkeypatch, open_it):
    monkeypatch.setitem(sqlite.REMOTE, sqlite.file_system(path.parent), "NFS")
    with pytest.raises(StoreError, match="is on NFS: put the database on a local disk"):
        open_it(path)


def test_a_target_that_is_no_store_is_refused_without_its_secrets():
    for target in ("mysql://u:secret@h/d", "sqlite://", "supsup.db"):
        with pytest.raises(ValueError, match=r"expected sqlite:///FILE or postgresql://") as refused:
            Database.open(target)
        assert "secret" not in str(refused.value)


def test_a_url_of_sqlite_means_its_file(path, store):
    advance(store, "a")
    with db.reading(f"sqlite:///{path}") as session:
        assert cursors.load_cursors(session, "folder") == {"a": "1"}
