"""The database: one writer, whole transactions or none, snapshots for readers, private files."""

import contextlib
import os
import sqlite3
import stat
import threading

import pytest
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError, OperationalError

from storage import cursors, db, decisions
from storage.db import Database, StoreError, TransactionLost
from storage.decisions import Decision


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


def test_what_was_committed_is_there_after_reopening(path):
    store = Database.open(path)
    advance(store, "a.npz")
    store.close()
    store = Database.open(path)
    assert positions(store) == {"a.npz": "1"}
    store.close()


def test_an_exception_leaves_nothing_of_its_transaction(store):
    advance(store, "before")
    with pytest.raises(ZeroDivisionError), store.write() as session:
        cursors.advance(session, "folder", "half", "1")
        raise ZeroDivisionError
    assert positions(store) == {"before": "1"}
    advance(store, "after")
    assert set(positions(store)) == {"before", "after"}


def test_a_broken_constraint_leaves_nothing_and_is_a_store_error(store):
    with pytest.raises(StoreError, match="FOREIGN KEY"), store.write() as session:
        cursors.advance(session, "folder", "half", "1")
        decisions.record(session, 99, Decision("new", None, {}))
    assert positions(store) == {}


def test_a_number_that_json_does_not_have_is_refused(store):
    with pytest.raises(StoreError, match="JSON"), store.write() as session:
        decisions.record(session, 1, Decision("new", None, {"p": float("nan")}))


def test_write_takes_the_lock_before_its_first_query(store, path):
    other = sqlite3.connect(path, isolation_level=None, timeout=0)
    with store.write(), pytest.raises(sqlite3.OperationalError, match="locked"):
        other.execute("BEGIN IMMEDIATE")
    other.execute("BEGIN IMMEDIATE")
    other.close()


def test_a_second_thread_waits_for_the_writer(store):
    order = []

    def second():
        advance(store, "second")
        order.append("second")

    with store.write() as session:
        thread = threading.Thread(target=second)
        thread.start()
        thread.join(timeout=0.2)
        assert thread.is_alive()
        cursors.advance(session, "folder", "first", "1")
        order.append("first")
    thread.join(timeout=30)
    assert order == ["first", "second"]
    assert set(positions(store)) == {"first", "second"}


def test_many_threads_write_through_one_connection(store):
    threads = [threading.Thread(target=advance, args=(store, f"file-{i}")) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert len(positions(store)) == 16


def test_write_inside_write_is_refused_and_does_not_harm_the_outer_one(store):
    with store.write() as session:
        cursors.advance(session, "folder", "outer", "1")
        with pytest.raises(RuntimeError, match="inside"), store.write():
            pass
        assert pragma(session, "foreign_keys") == 1
    assert set(positions(store)) == {"outer"}


def test_a_reader_keeps_its_snapshot(store):
    advance(store, "old")
    with store.read() as session:
        assert cursors.load_cursors(session, "folder") == {"old": "1"}
        advance(store, "new")
        assert cursors.load_cursors(session, "folder") == {"old": "1"}
    assert set(positions(store)) == {"old", "new"}


def test_a_reader_does_not_see_what_is_not_committed(store):
    with store.write() as session:
        cursors.advance(session, "folder", "open", "1")
        assert positions(store) == {}


def test_a_reader_cannot_write(store):
    with pytest.raises(StoreError, match="readonly"), store.read() as session:
        cursors.advance(session, "folder", "a", "1")
    assert positions(store) == {}


@pytest.mark.parametrize("error_is", ["raised", "swallowed", "swallowed, then more is written"])
def test_a_full_disk_never_leads_to_half_a_transaction(store, error_is):
    advance(store, "before")
    with pytest.raises(StoreError), store.write() as session:
        run = session.connection().exec_driver_sql
        run(f"PRAGMA max_page_count = {pragma(session, 'page_count') + 2}")
        run("INSERT INTO cursor VALUES ('folder', 'first half', '1')")
        try:
            run("INSERT INTO cursor VALUES ('folder', 'too much', ?)", ("x" * 1_000_000,))
        except OperationalError as error:
            assert "full" in str(error)
            if error_is == "raised":
                raise
        if error_is != "swallowed":
            run("INSERT INTO cursor VALUES ('folder', 'second half', '1')")
    assert positions(store) == {"before": "1"}
    with store.write() as session:
        pragma(session, "max_page_count = 1000000")
    advance(store, "after")
    assert set(positions(store)) == {"before", "after"}


def test_an_error_that_was_swallowed_in_the_block_still_stores_nothing(store):
    with pytest.raises(TransactionLost), store.write() as session:
        cursors.advance(session, "folder", "a", "1")
        with contextlib.suppress(IntegrityError):
            decisions.record(session, 99, Decision("new", None, {}))
    assert positions(store) == {}


@pytest.mark.parametrize("end", ["commit", "rollback"])
def test_a_block_that_ends_its_own_transaction_is_refused(store, end):
    with pytest.raises(TransactionLost), store.write() as session:
        getattr(session, end)()


def test_nothing_written_behind_the_session_stays_open(store):
    with pytest.raises(TransactionLost), store.write() as session:
        connection = session.connection()
        session.rollback()
        connection.exec_driver_sql("INSERT INTO cursor VALUES ('folder', 'behind', '1')")
    advance(store, "after")
    assert set(positions(store)) == {"after"}


def test_after_sqlite_gave_up_a_transaction_no_statement_commits_alone(store):
    with pytest.raises(TransactionLost), store.write() as session:
        cursors.advance(session, "folder", "first half", "1")
        session.execute(text("ROLLBACK"))  # what SQLite does by itself on some errors
        cursors.advance(session, "folder", "second half", "1")
    assert positions(store) == {}


def test_a_transaction_that_sqlite_gave_up_is_not_reported_as_committed(store):
    with pytest.raises(TransactionLost), store.write() as session:
        cursors.advance(session, "folder", "a", "1")
        session.execute(text("ROLLBACK"))
    assert positions(store) == {}
    advance(store, "b")
    assert set(positions(store)) == {"b"}


def test_the_connections_are_set_up_for_safety(store):
    with store.write() as session:
        assert pragma(session, "journal_mode") == "wal"
        assert pragma(session, "synchronous") == 2
        assert pragma(session, "foreign_keys") == 1
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
    assert "not a database" in db.check(path)[0]


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
    assert db.has_wal_reset_bug(version) is affected
