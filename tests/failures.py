"""What goes wrong around a daemon: its decoders die or stand still, its store is locked; and what it says of it."""

import json
import os
import signal
import socket
import sqlite3
import threading
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import psycopg
import pytest
import stores
from daemon_process import ask, is_logged, until, what_was_learned, without_holes
from digits import draw

from storage.backend import dump_json
from storage.postgresql import lock_key
from supsupd.client import DaemonError

LETTERS = "ABC"


def config_of(*, intake="", more=""):
    """Small and quick, with other lines for the section [intake], and other sections."""
    lines = "settle_seconds = 0.1\nincomplete_seconds = 0.5\n" if "incomplete" not in intake else ""
    return f"[intake]\n{lines}{intake}\n[network]\nhidden = [100]\n{more}\n"


def put(daemon, stream, start=0):
    """One file for each letter, a batch of that task."""
    for turn, letter in enumerate(stream, start):
        daemon.drop(f"{turn:02}-{letter}", **draw(LETTERS.index(letter), turn))


def said(daemon):
    """The lines on stderr beside the log."""
    return [line for line in daemon.log.read_text().splitlines() if not is_logged(line)]


def problems(daemon):
    """{who: kind} of the problems that the daemon has now."""
    return {problem["who"]: problem["kind"] for problem in daemon.client.status()["problems"]}


def rows(daemon, name):
    """All ledger rows of a file, the oldest first."""
    return sorted((row for row in daemon.client.batches() if row["name"] == name), key=lambda row: row["batch"])


def codes(daemon):
    """{name: reason code} of the rejected batches."""
    return {row["name"]: row["code"] for row in daemon.client.rejected()}


def counts(state):
    """{state of the ledger: batches}; of a store in a file."""
    return dict(ask(state, "SELECT state, count(*) FROM batch GROUP BY state"))


def resident_bytes(pid):
    """Memory that the process has now."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


@contextmanager
def begun_request(daemon):
    """A query of which the daemon has read the beginning; a function that sends the rest and gives the status."""
    tensor = {"name": "x", "shape": [2, 64], "datatype": "FP32", "data": [0.5] * 128}
    body = json.dumps({"inputs": [tensor]}).encode()
    head = f"POST /v2/models/supsup/infer HTTP/1.1\r\nHost: supsupd\r\nContent-Length: {len(body)}\r\n"
    with socket.socket(socket.AF_UNIX) as connection, connection.makefile("rb") as answer:
        connection.connect(str(daemon.socket))
        connection.sendall(f"{head}Content-Type: application/json\r\nExpect: 100-continue\r\n\r\n".encode())
        assert answer.readline() == b"HTTP/1.1 100 Continue\r\n"
        assert answer.readline() == b"\r\n"

        def finish():
            connection.sendall(body)
            return int(answer.readline().split()[1])

        yield finish


# -- its store ---------------------------------------------------------------------------------------------------------


@contextmanager
def locked(target):
    """Meanwhile another writer has the store: nothing can be written, all can be read."""
    if isinstance(target, Path):
        with closing(sqlite3.connect(target, isolation_level=None)) as other:
            other.execute("BEGIN EXCLUSIVE")
            yield
        return
    with psycopg.connect(target) as other:
        other.execute("LOCK TABLE batch IN EXCLUSIVE MODE")
        yield


def learned(target):
    """`what_was_learned`, of a store of either kind."""
    if isinstance(target, Path):
        return what_was_learned(target.parent)
    with psycopg.connect(target) as connection:
        return without_holes(
            what_was_learned(None, lambda _, query: [_as_in_a_file(row) for row in connection.execute(query)])
        )


def _as_in_a_file(row):
    """With its JSON as text."""
    return tuple(dump_json(value) if isinstance(value, dict | list) else value for value in row)


def decided(url):
    """How many batches of a PostgreSQL store are learned, or unsure."""
    with psycopg.connect(url) as connection:
        query = "SELECT count(*) FROM batch WHERE state IN ('committed', 'unsure')"
        return connection.execute(query).fetchone()[0]


def named(url, name):
    """The URL for a daemon whose connections `cut` finds."""
    return f"{url}&application_name={name}"


def cut(name):
    """Ends all connections of this name."""
    with stores.administrator() as run:
        run("SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE application_name = :name", name=name)


@contextmanager
def next_in_line(url):
    """Another session that has the store's lock once it is free: an event, set then."""
    took = threading.Event()

    def take():
        connection.execute(f"SELECT pg_advisory_lock({lock_key(schema)})")
        took.set()

    with psycopg.connect(url, autocommit=True) as connection:
        (schema,) = connection.execute("SELECT current_schema()").fetchone()
        pid = connection.info.backend_pid
        taker = threading.Thread(target=take)
        taker.start()
        try:
            with stores.administrator() as run:
                waits = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted AND pid = :pid"
                until(lambda: run(waits, pid=pid).scalar())
            yield took
        finally:
            connection.cancel()
            taker.join()


# -- its decoders ------------------------------------------------------------------------------------------------------


def decoders(daemon):
    """The ids of the processes that decode for a daemon."""
    tasks = Path(f"/proc/{daemon.process.pid}/task")
    children = {int(pid) for file in tasks.glob("*/children") for pid in file.read_text().split()}
    return {pid for pid in children if b"streams.decode_worker" in _read(pid, "cmdline")}


def decoder_of_learning(daemon):
    """That of a settled daemon's learning thread: it sleeps on while intake looks into something."""
    before = {pid: switches for pid in decoders(daemon) if (switches := _switches(pid)) is not None}
    with suppress(DaemonError):
        daemon.client.submit("nothing.npz", b"no batch")

    def idle():
        found = [pid for pid, switches in before.items() if _switches(pid) == switches]
        return found if len(found) == 1 else None

    return until(idle)[0]


@contextmanager
def learning_held(daemon):
    """Meanwhile a settled daemon's learning thread waits for its decoder, which stands still."""
    pid = decoder_of_learning(daemon)
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def strike(daemon, number, times=3, spared=()):
    """Sends a signal to decoders at their work, each time to another one."""
    struck = set(spared)
    for _ in range(times):
        pid = until(lambda: next(iter(_at_work(daemon) - struck), None))
        os.kill(pid, number)
        struck.add(pid)


def open_files(pid):
    """What a process has open, as /proc shows it."""
    try:
        return sorted(str(path.readlink()) for path in Path(f"/proc/{pid}/fd").iterdir())
    except PermissionError:
        pytest.skip("the system hides what a process without core dumps has open, except from root")
    except FileNotFoundError:
        return []


def _at_work(daemon):
    """The decoders that hold bytes of a batch."""
    return {pid for pid in decoders(daemon) if any("memfd:batch" in path for path in open_files(pid))}


def _read(pid, name):
    with suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/{name}").read_bytes()
    return b""


def _switches(pid):
    """How often the process went to sleep."""
    lines = _read(pid, "status").splitlines()  # none of one that has ended, as idle ones do
    return next((int(line.split()[1]) for line in lines if line.startswith(b"voluntary_ctxt_switches")), None)
