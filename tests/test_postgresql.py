"""PostgreSQL as the store: one writer by an advisory lock, lost connections, unknown commits, no secrets in texts."""

import signal
import subprocess
import sys
import uuid
from contextlib import contextmanager

import pytest
import services
from cutting_proxy import CuttingProxy
from sqlalchemy import make_url
from stores import SERVER, administrator, postgresql_target, tampering

from storage import cursors, db, postgresql
from storage.db import (
    CommitUnknown,
    Database,
    DiskFull,
    SchemaMismatch,
    StoreError,
    StoreFailed,
    StoreTaken,
    StoreUnavailable,
    ValueRefused,
    verify,
)
from storage.postgresql import PostgresBackend

HOLD = """
import sys
from storage.db import Database
store = Database.open(sys.argv[1])
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def url():
    with postgresql_target() as url:
        db.upgrade(url)
        yield url


@pytest.fixture
def store(url):
    store = Database.open(url, patience=0.2)
    yield store
    store.close()


def positions(store):
    with store.read() as session:
        return cursors.load_cursors(session, "folder")


def advance(store, key, position="1"):
    with store.write() as session:
        cursors.advance(session, "folder", key, position)


def schema_of(url):
    return url.rpartition("%3D")[2]


def end_writer(url):
    """As an administrator would; the process that holds the lock of this schema's store."""
    key = postgresql.lock_key(schema_of(url)) % 2**64
    holder = "SELECT pid FROM pg_locks WHERE locktype = 'advisory' AND classid = :high AND objid = :low"
    with administrator() as run:
        (pid,) = run(holder, high=key >> 32, low=key % 2**32).scalars()
        assert run("SELECT pg_terminate_backend(:pid, 5000)", pid=pid).scalar()


def test_a_second_writer_is_refused_and_readers_are_not(url, store):
    advance(store, "a")
    with pytest.raises(StoreTaken, match="is used by another supsupd"):
        Database.open(url, patience=0.05)
    with pytest.raises(StoreTaken):
        db.downgrade(url, patience=0.05)
    with db.reading(url) as session:
        assert cursors.load_cursors(session, "folder") == {"a": "1"}
    assert verify(url) == []


def test_a_closed_store_and_a_killed_daemon_leave_the_lock(url):
    Database.open(url).close()
    with subprocess.Popen([sys.executable, "-c", HOLD, url], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(StoreTaken):
            Database.open(url, patience=0.05)
        other.send_signal(signal.SIGKILL)
    Database.open(url).close()


def test_stores_in_two_schemas_do_not_disturb_each_other(store):
    with postgresql_target() as other:
        db.upgrade(other)
        Database.open(other, patience=0.05).close()


def test_a_connection_that_ends_between_writes_is_replaced(url, store):
    advance(store, "a")
    end_writer(url)
    advance(store, "b")
    assert set(positions(store)) == {"a", "b"}
    with pytest.raises(StoreTaken):
        Database.open(url, patience=0.05)


def test_a_connection_that_ends_within_a_write_loses_all_of_it_and_the_next_one_works(url, store):
    with pytest.raises(StoreUnavailable), store.write() as session:
        cursors.advance(session, "folder", "half", "1")
        end_writer(url)
        cursors.advance(session, "folder", "other half", "1")
    assert positions(store) == {}
    advance(store, "after")
    assert set(positions(store)) == {"after"}


def test_who_lost_the_store_to_another_writes_nothing(url, store):
    end_writer(url)
    other = Database.open(url)
    with pytest.raises(StoreTaken):
        advance(store, "a")
    other.close()
    advance(store, "b")
    assert set(positions(store)) == {"b"}


def test_a_reader_whose_connection_ended_is_given_a_new_one(url, store):
    advance(store, "a")
    with store.read() as session:
        pid = session.connection().exec_driver_sql("SELECT pg_backend_pid()").scalar()
    with administrator() as run:
        run("SELECT pg_terminate_backend(:pid, 5000)", pid=pid)
    assert positions(store) == {"a": "1"}


@contextmanager
def read_only_for(url):
    """Sessions that begin within cannot write; those that began before can. Only the role of this very URL."""
    role = make_url(url).username
    with administrator() as run:
        run(f"ALTER ROLE {role} SET default_transaction_read_only = on")
        try:
            yield
        finally:
            run(f"ALTER ROLE {role} RESET default_transaction_read_only")


@pytest.fixture
def own_role(url):
    """The URL for a role of the test's own, whose settings are nobody else's."""
    role = f"role_{uuid.uuid4().hex}"
    with administrator() as run:
        run(f"CREATE ROLE {role} LOGIN SUPERUSER")
        try:
            yield url.replace("postgres@", f"{role}@")
        finally:
            run(f"DROP OWNED BY {role}")
            run(f"DROP ROLE {role}")


def test_a_session_that_began_while_all_was_read_only_is_replaced_and_claims_the_store_again(url, own_role):
    store = Database.open(own_role, patience=0.2)
    advance(store, "before")
    with read_only_for(own_role):
        end_writer(url)
        for _ in range(2):
            with pytest.raises(StoreUnavailable, match="read-only"):
                advance(store, "during")
    advance(store, "after")
    assert set(positions(store)) == {"before", "after"}
    with pytest.raises(StoreTaken):
        Database.open(url, patience=0.05)
    store.close()


@pytest.mark.parametrize("sqlstate", sorted(postgresql.STALE))
def test_a_session_that_may_be_stale_is_used_no_more_neither_to_write_nor_to_read(store, sqlstate):
    raising = f"DO $$ BEGIN RAISE EXCEPTION USING ERRCODE = '{sqlstate}'; END $$"
    for session_of in (store.write, store.read):
        with pytest.raises(StoreUnavailable), session_of() as session:
            before = session.connection().exec_driver_sql("SELECT pg_backend_pid()").scalar()
            session.connection().exec_driver_sql(raising)
        with session_of() as session:
            assert session.connection().exec_driver_sql("SELECT pg_backend_pid()").scalar() != before


def test_a_role_that_may_not_write_for_a_while_writes_as_soon_as_it_may(url):
    role, schema = f"role_{uuid.uuid4().hex}", schema_of(url)
    with administrator() as run:
        run(f"CREATE ROLE {role} LOGIN")
        run(f"GRANT USAGE ON SCHEMA {schema} TO {role}")
        run(f"GRANT ALL ON ALL TABLES IN SCHEMA {schema} TO {role}")
        store = Database.open(url.replace("postgres@", f"{role}@"), patience=0.2)
        run(f"REVOKE ALL ON cursor FROM {role}".replace("cursor", f"{schema}.cursor"))
        with pytest.raises(StoreUnavailable, match="permission denied"):
            advance(store, "during")
        run(f"GRANT ALL ON {schema}.cursor TO {role}")
        advance(store, "after")
        store.close()
        run(f"DROP OWNED BY {role}")
        run(f"DROP ROLE {role}")


@pytest.fixture
def proxy():
    proxy = CuttingProxy(("127.0.0.1", services.PORTS["postgresql"]))
    yield proxy
    proxy.close()


@pytest.mark.parametrize("carried_out", [False, True])
def test_a_commit_whose_connection_is_cut_is_unknown_and_all_or_nothing(url, proxy, carried_out):
    store = Database.open(url.replace(f":{services.PORTS['postgresql']}/", f":{proxy.port}/"))
    stored = set()
    for turn in range(5):
        with pytest.raises(CommitUnknown), store.write() as session:
            cursors.advance(session, "folder", f"a{turn}", "1")
            cursors.advance(session, "folder", f"b{turn}", "1")
            # What comes next is the COMMIT.
            proxy.lose_replies() if carried_out else proxy.lose_requests()
        proxy.accept()
        stored |= {f"a{turn}", f"b{turn}"} if carried_out else set()
        assert set(positions(store)) == stored
    assert proxy.cuts >= 5
    advance(store, "last")
    assert set(positions(store)) == {*stored, "last"}
    store.close()


def test_a_server_that_is_away_is_unavailable(url):
    gone = url.replace(f":{services.PORTS['postgresql']}/", ":1/")
    for attempt in (Database.open, db.upgrade, verify):
        with pytest.raises(StoreUnavailable, match=r"^[^\n]*refused[^\n]*$"):
            attempt(gone)


def test_a_schema_that_is_not_there_is_told(url):
    with pytest.raises(SchemaMismatch, match="no such schema: CREATE SCHEMA"):
        db.upgrade(url + "_absent")


@pytest.mark.parametrize("setting", ["synchronous_commit"])
def test_a_server_that_forgets_commits_is_refused(url, setting):
    unsafe = url.replace("?options=", f"?options=-c{setting}%3Doff%20")
    with pytest.raises(StoreError, match=f"{setting} is off"):
        Database.open(unsafe)
    assert verify(unsafe) == []


def test_no_text_shows_a_password(url, caplog):
    for target in (
        url.replace("postgres@", "nobody:s3cr3t-word@"),
        url.replace("postgres@127.0.0.1:5432", "nobody:s3cr3t-word@127.0.0.1:1"),
        url.replace("postgres@", "") + "&user=nobody&password=s3cr3t-word",
        f"{SERVER.replace('postgres@', 'postgres:s3cr3t-word@')}?sslmode=nonsense",
        "postgresql://u:s3cr3t-word@[::bad/x",
    ):
        with pytest.raises((StoreError, ValueError, SchemaMismatch)) as refused:
            Database.open(target)
        shown = [str(refused.value), repr(refused.value)]
        if not isinstance(refused.value, ValueError):
            backend = PostgresBackend(target)
            shown += [backend.name, repr(backend), repr(backend.writer().url), repr(backend.writer())]
        assert not any("s3cr3t" in text for text in shown), shown
    assert "s3cr3t" not in caplog.text


@pytest.mark.parametrize(
    ("sqlstate", "kind"),
    [
        ("53100", DiskFull),
        ("58030", StoreFailed),
        ("57P01", StoreUnavailable),
        ("55P03", StoreUnavailable),
        ("40001", StoreUnavailable),
        ("XX001", StoreError),
        ("25006", StoreUnavailable),
        ("23505", ValueRefused),
        ("22001", ValueRefused),
        ("54000", ValueRefused),
    ],
)
def test_what_the_server_says_is_what_a_caller_does_next(store, sqlstate, kind):
    raising = f"DO $$ BEGIN RAISE EXCEPTION USING ERRCODE = '{sqlstate}'; END $$"
    with pytest.raises(StoreError) as refused, store.write() as session:
        cursors.advance(session, "folder", "a", "1")
        session.connection().exec_driver_sql(raising)
    assert type(refused.value) is kind
    assert positions(store) == {}


def test_a_row_that_refers_to_a_missing_one_is_found(url, store):
    with tampering(url) as run:
        run("SET session_replication_role = replica")
        run("INSERT INTO training_state VALUES (7, 1, 1, '', '2026-01-01')")
    assert verify(url) == ["training_state: task_id 7 is a missing row of task"]
