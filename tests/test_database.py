"""The store, of either kind: one writer, whole transactions or none, snapshots for readers."""

import contextlib
import threading

import pytest
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError

from storage import cursors, db, decisions
from storage.db import Database, StoreError, TransactionLost
from storage.decisions import Decision


@pytest.fixture
def target(store_target):
    db.upgrade(store_target)
    return store_target


@pytest.fixture
def store(target):
    store = Database.open(target)
    yield store
    store.close()


def positions(store):
    with store.read() as session:
        return cursors.load_cursors(session, "folder")


def advance(store, key, position="1"):
    with store.write() as session:
        cursors.advance(session, "folder", key, position)


def test_what_was_committed_is_there_after_reopening(target):
    store = Database.open(target)
    advance(store, "a.npz")
    store.close()
    store = Database.open(target)
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
    with pytest.raises(StoreError, match=r"(?i)foreign key"), store.write() as session:
        cursors.advance(session, "folder", "half", "1")
        decisions.record(session, 99, Decision("new", None, {}))
    assert positions(store) == {}


def test_a_number_that_json_does_not_have_is_refused(store):
    with pytest.raises(StoreError, match="JSON"), store.write() as session:
        decisions.record(session, 1, Decision("new", None, {"p": float("nan")}))


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
    with pytest.raises(StoreError, match=r"read-?only"), store.read() as session:
        cursors.advance(session, "folder", "a", "1")
    assert positions(store) == {}


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
        connection.exec_driver_sql("INSERT INTO cursor VALUES ('digest', 'folder', 'behind', '1')")
    advance(store, "after")
    assert set(positions(store)) == {"after"}


def test_after_the_database_gave_up_a_transaction_no_statement_commits_alone(store):
    with pytest.raises(TransactionLost), store.write() as session:
        cursors.advance(session, "folder", "first half", "1")
        session.execute(text("ROLLBACK"))  # what SQLite does by itself on some errors
        cursors.advance(session, "folder", "second half", "1")
    assert positions(store) == {}


def test_a_transaction_that_the_database_gave_up_is_not_reported_as_committed(store):
    with pytest.raises(TransactionLost), store.write() as session:
        cursors.advance(session, "folder", "a", "1")
        session.execute(text("ROLLBACK"))
    assert positions(store) == {}
    advance(store, "b")
    assert set(positions(store)) == {"b"}
