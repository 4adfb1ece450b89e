"""Clients that are slow, never read or come in thousands: each is cut off in its time, and a good client beside them
sees no failure."""

import contextlib
import signal
import threading
import time

import numpy as np
import pytest
from daemon_process import STOP_SECONDS, until
from raw_http import LIVE, Door, good_client, open_door, read_all, read_answer
from served_process import ServedProcess, light_nursery
from tiny_engine import INPUTS, TinyEngine

SHORT = 2.0
"""Seconds of every deadline here: more than a busy machine keeps a good client waiting."""
LATE = 30.0
"""Seconds by which what is cut off after SHORT has been, on a busy machine."""
MANY = 60
INFER = "/v2/models/supsup/infer"


@pytest.fixture(params=["unix", "tcp"])
def door(request, tmp_path):
    engine = TinyEngine()
    engine.ledger = [{"batch": i, "name": "n" * 8000, "sha256": "0" * 64, "state": "staged"} for i in range(1, 1001)]
    short = dict.fromkeys(("header_seconds", "body_seconds", "write_seconds"), SHORT)
    with open_door(request.param, tmp_path, engine, idle_seconds=SHORT, **short) as door, good_client(door):
        yield door


@pytest.fixture(scope="module")
def nursery():
    with light_nursery() as nursery:
        yield nursery


def ends_of(connections):
    """All answers of each connection; every one has ended LATE at the latest."""
    deadline = time.monotonic() + LATE
    found = []
    for connection in connections:
        connection.settimeout(max(0.01, deadline - time.monotonic()))
        found.append(read_all(connection))
    return found


@contextlib.contextmanager
def trickle(connections, script, pause=0.02):
    """Sends a byte at a time on all connections at once, until the block ends."""
    done = threading.Event()

    def send():
        for i in range(len(script)):
            if done.wait(pause):
                return
            for connection in connections:
                with contextlib.suppress(OSError):
                    connection.sendall(script[i : i + 1])

    sending = threading.Thread(target=send)
    sending.start()
    try:
        yield
    finally:
        done.set()
        sending.join(10)


@pytest.fixture
def connections(door):
    """As many as there are slow clients."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(door.connect()) for _ in range(MANY)]


def test_a_head_that_trickles_in_is_cut_off(door, connections):
    with trickle(connections, door.head("GET", LIVE, "A: " + "b" * 1000)):
        answers = ends_of(connections)
    assert [[answer.status for answer in each] for each in answers] == [[408]] * MANY
    assert door.server.arrivals.cut["headers"] == MANY


def test_a_second_head_has_no_more_time_than_the_first(door):
    with door.connect() as connection, connection.makefile("rb") as stream:
        connection.sendall(door.head())
        assert read_answer(stream).status == 200
        with trickle([connection], door.head("GET", LIVE, "A: " + "b" * 1000)):
            assert [answer.status for answer in read_all(connection)] == [408]


def test_a_body_that_trickles_in_is_cut_off(door, connections):
    for connection in connections:
        connection.sendall(door.head("POST", INFER, "Content-Length: 1000"))
    with trickle(connections, b" " * 1000):
        answers = ends_of(connections)
    assert [[answer.status for answer in each] for each in answers] == [[408]] * MANY


def test_who_says_nothing_is_let_go_without_a_word(door, connections):
    assert ends_of(connections) == [[]] * MANY
    with door.connect() as connection, connection.makefile("rb") as stream:
        connection.sendall(door.head())
        assert read_answer(stream).status == 200
        assert ends_of([connection]) == [[]]


def test_who_never_reads_a_large_answer_is_cut_off(door):
    with contextlib.ExitStack() as stack:
        for _ in range(5):
            connection = stack.enter_context(door.connect(receive_bytes=4096))
            connection.sendall(door.head("GET", "/v1/batches"))
        until(lambda: door.server.arrivals.cut["write"] == 5)


def test_who_never_reads_many_small_answers_is_cut_off(door):
    heads = door.head() * 1000
    with door.connect(receive_bytes=4096) as connection:
        connection.setblocking(False)

        def is_cut():
            with contextlib.suppress(OSError):
                connection.send(heads)
            return door.server.arrivals.cut["write"]

        until(is_cut)


def test_who_reads_a_large_answer_slowly_gets_all_of_it(door):
    with door.connect() as connection:
        connection.sendall(door.head("GET", "/v1/batches", "Connection: close"))
        body = b""
        while piece := connection.recv(1 << 18):
            body += piece
            time.sleep(0.02)  # a pace, not a wait for anything
    assert body.count(b'"staged"') == 1000


def test_a_thousand_requests_at_once_are_answered_in_order_one_at_a_time(door):
    engine = door.engine
    engine.gate.clear()
    rows = np.arange(1000)
    bodies = [
        b'{"id":"%d","inputs":[{"name":"x","shape":[1,%d],"datatype":"FP32","data":[%d,1,1,1]}]}' % (i, INPUTS, i)
        for i in rows
    ]
    with door.connect(30) as connection, connection.makefile("rb") as stream:
        sending = threading.Thread(target=connection.sendall, args=(b"".join(door.post(body) for body in bodies),))
        sending.start()
        assert engine.entered.wait(10)
        with door.connect() as other:  # by its answer all that came before it has been looked at
            other.sendall(door.head("GET", LIVE, "Connection: close"))
            assert [answer.status for answer in read_all(other)] == [200]
        assert len(engine.answered_in) == 1
        engine.gate.set()
        answers = [read_answer(stream) for _ in rows]
        sending.join(10)
    assert [b'"id":"%d"' % i in answer.body for i, answer in enumerate(answers)] == [True] * 1000


# -- too many ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["unix", "tcp"])
@pytest.mark.parametrize("limits", [{"max_connections": 8}, {"max_peer_connections": 8}])
def test_a_connection_beyond_the_limit_is_told_so_and_closed(tmp_path, kind, limits):
    with open_door(kind, tmp_path, **limits) as door, good_client(door), contextlib.ExitStack() as stack:
        for _ in range(7):
            stack.enter_context(door.connect())
        until(lambda: door.server.open_connections == 8)
        for _ in range(20):
            with door.connect() as refused:
                (answer,) = read_all(refused)
            assert (answer.status, answer.headers["retry-after"]) == (503, "1")
            assert answer.error.startswith("unavailable: there are 8 connections")
        stack.close()
        until(lambda: door.server.open_connections == 1)
        (answer,) = door.say(door.head("GET", LIVE, "Connection: close"))
        assert answer.status == 200


def flood(door, count, at_once, kept):
    """Opens `count` connections; the last `at_once` of them stay open, in the ExitStack `kept`."""
    latest = []
    for _ in range(count):
        latest.append(kept.enter_context(door.connect()))
        if len(latest) > at_once:
            latest.pop(0).close()


def among_many(door, request):
    """How a request is answered while 200 connections stay open; each has its time for a head."""
    with contextlib.ExitStack() as kept:
        flood(door, 200, 200, kept)
        return [answer.status for answer in door.say(request)]


@pytest.mark.parametrize("kind", ["unix", "tcp"])
def test_5000_connections_find_a_server_with_256_files_at_work(nursery, tmp_path, kind):
    served = ServedProcess(nursery, tmp_path / "served", files=256)
    try:
        door: Door = getattr(served, kind)
        last = door.head("GET", LIVE, "Connection: close")
        with good_client(door) as beside:
            until(lambda: beside.answers)
            with contextlib.ExitStack() as kept:
                flood(door, 4800, 200, kept)
            until(lambda: among_many(door, last) == [503])
            until(lambda: [answer.status for answer in door.say(last)] == [200])
        assert served.stop(signal.SIGTERM, STOP_SECONDS) == 0
    finally:
        served.child.kill()
