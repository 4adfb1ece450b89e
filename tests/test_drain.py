"""How serving ends: nothing that was taken up is left without an answer, and what comes too late is told so."""

import contextlib
import itertools
import random
import signal
import threading
import time
from collections import Counter

import pytest
from credentials import Credentials
from daemon_process import until
from forked_daemon import ForkedDaemon, Nursery
from ports import free_ports
from raw_http import LIVE, Door, good_client, open_door, read_all, read_answer
from served_process import ServedProcess, light_nursery
from tiny_engine import INPUTS, TinyEngine

PROMISED_SECONDS = 10
"""In which it ends, whatever it was doing."""
INFER = "/v2/models/supsup/infer"
READY = "/v2/health/ready"
ROW = b'{"inputs":[{"name":"x","shape":[1,%d],"datatype":"FP32","data":[%s]}]}' % (INPUTS, b",".join([b"1"] * INPUTS))
HELD = ROW[:-1] + b',"parameters":{"task":1}}'
"""A question that the small engine answers in the event loop itself, which waits with it."""
MOMENTS, LOAD_SECONDS = 50, 0.15


@pytest.fixture(scope="module")
def nursery():
    with light_nursery() as nursery:
        yield nursery


@pytest.fixture(params=["unix", "tcp"])
def kind(request):
    return request.param


@contextlib.contextmanager
def stopping(server, seconds):
    """The server stops, and has stopped at the end of the block."""
    thread = threading.Thread(target=server.stop, args=(seconds,))
    thread.start()
    try:
        yield
    finally:
        thread.join(30)
    assert not server.alive


def ask(connection, stream, request):
    connection.sendall(request)
    return read_answer(stream)


def test_while_it_drains_a_server_answers_but_is_not_ready(nursery, tmp_path, kind):
    served = ServedProcess(nursery, tmp_path / "served", drain_seconds=3.0)
    try:
        door = getattr(served, kind)
        with door.connect() as connection, connection.makefile("rb") as stream:
            ready = ask(connection, stream, door.head("GET", READY))
            assert (ready.status, ready.headers.get("connection")) == (200, None)
            served.child.send_signal(signal.SIGTERM)
            until(lambda: [answer.status for answer in door.say(door.head("GET", READY, "Connection: close"))] == [503])
            answer = ask(connection, stream, door.post(ROW))
            assert (answer.status, answer.headers["connection"]) == (200, "close")
            assert read_answer(stream) is None
        assert served.child.wait(PROMISED_SECONDS) == 0
        with pytest.raises(OSError):
            door.connect()
    finally:
        served.child.kill()


def test_a_connection_that_is_merely_kept_does_not_hold_up_the_end(tmp_path, kind):
    with open_door(kind, tmp_path) as door, contextlib.ExitStack() as stack:
        kept = [stack.enter_context(door.connect()) for _ in range(20)]
        for connection in kept:
            connection.sendall(door.head())
        assert [read_answer(stack.enter_context(one.makefile("rb"))).status for one in kept] == [200] * 20
        stack.enter_context(door.connect()).sendall(door.head()[:10])  # nor does half a head
        began = time.monotonic()
        assert door.server.stop(60.0)
        assert time.monotonic() - began < 30
        assert [one.recv(1) for one in kept] == [b""] * 20


def test_who_waits_to_be_accepted_at_the_end_is_told_to_come_again(tmp_path, kind):
    with open_door(kind, tmp_path) as door, contextlib.ExitStack() as stack:
        door.engine.gate.clear()
        held = stack.enter_context(door.connect())
        held.sendall(door.post(HELD))
        assert door.engine.entered.wait(10)
        waiting = [stack.enter_context(door.connect()) for _ in range(200)]
        for connection in waiting:
            connection.sendall(door.head())
        with stopping(door.server, 20.0):
            until(lambda: not (tmp_path / "s.sock").exists())
            door.engine.gate.set()
            answers = [read_all(connection) for connection in waiting]
            (last,) = read_all(held)
    assert (last.status, last.headers["connection"]) == (200, "close")
    told = Counter((answer.status, answer.headers.get("retry-after")) for (answer,) in answers)
    assert told.keys() <= {(200, None), (503, "1")}  # some were accepted just before
    assert told[503, "1"] >= door.server.arrivals.refused["stopping"] > 0


def test_a_request_that_does_not_end_in_time_is_refused(tmp_path, kind):
    engine = TinyEngine()
    with open_door(kind, tmp_path, engine) as door, door.connect() as connection:
        engine.gate.clear()
        connection.sendall(door.post(ROW))
        assert engine.entered.wait(10)
        with stopping(door.server, 0.5):
            (answer,) = read_all(connection)
        engine.gate.set()
    assert (answer.status, answer.headers["retry-after"]) == (503, "1")
    assert door.server.arrivals.cut["shutdown"] == 1


# -- at random moments -------------------------------------------------------------------------------------------------


class Load:
    """Clients that ask without end; what became of each request, by its number.

    A request is "answered", "refused" (503), "closed" (its connection ended without a byte of an answer) or
    "unconnected". Anything else, as half an answer, is a failure.
    """

    def __init__(self, doors):
        self.outcomes = {}
        self.failures = []
        self._numbers = itertools.count()
        self._done = threading.Event()
        kinds = [self._keep_asking, self._keep_asking, self._ask_anew]
        self._threads = [threading.Thread(target=self._run, args=(kind, door)) for door in doors for kind in kinds]

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self._done.set()
        for thread in self._threads:
            thread.join(30)

    def _run(self, ask, door):
        try:
            while not self._done.is_set():
                ask(door)
        except Exception as error:  # noqa: BLE001 - the test looks at it
            self.failures.append(error)

    def _keep_asking(self, door):
        try:
            connection = door.connect()
        except OSError:
            self.outcomes[next(self._numbers)] = "unconnected"
            self._done.wait(0.01)
            return
        with connection, connection.makefile("rb") as stream:
            while not self._done.is_set() and self._ask(door, connection, stream):
                pass

    def _ask_anew(self, door):
        with contextlib.suppress(OSError), door.connect() as connection, connection.makefile("rb") as stream:
            self._ask(door, connection, stream)

    def _ask(self, door, connection, stream):
        """Whether the connection goes on."""
        number = next(self._numbers)
        url = f"{INFER}?n={number}" if number % 2 else f"{LIVE}?n={number}"
        request = door.post(ROW, path=url) if number % 2 else door.head("GET", url)
        answer = None
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it may be refused already
            connection.sendall(request)
        with contextlib.suppress(ConnectionResetError):
            answer = read_answer(stream)
        if answer is None:
            self.outcomes[number] = "closed"
            return False
        self.outcomes[number] = {200: "answered", 503: "refused"}[answer.status]
        return "connection" not in answer.headers

    def of(self, *kinds):
        return {number for number, outcome in self.outcomes.items() if outcome in kinds}


def test_whatever_the_moment_of_the_end_each_request_is_answered_or_refused(nursery, tmp_path):
    moments, told = random.Random(0), Counter()
    for turn in range(MOMENTS):
        served = ServedProcess(nursery, tmp_path / str(turn))
        try:
            with Load([served.unix, served.tcp]) as load:
                until(lambda load=load: load.outcomes)
                time.sleep(moments.uniform(0, LOAD_SECONDS))  # the moment, which is not waited for
                assert served.stop(signal.SIGTERM, PROMISED_SECONDS) == 0
            assert load.failures == []
            accepted = {int(query.removeprefix("n=")) for query in served.accepted()}
            assert accepted <= load.of("answered", "refused"), "taken up and never answered"
            assert load.of("answered") <= accepted
            assert not served.path.exists()
            told.update(load.outcomes.values())
        finally:
            served.child.kill()
    assert told["answered"] > MOMENTS


def test_a_real_daemon_under_load_ends_in_its_time_and_leaves_no_socket(tmp_path):
    moments = random.Random(1)
    with Nursery() as nursery, ForkedDaemon(nursery, tmp_path) as daemon:
        daemon.state.mkdir(mode=0o700)
        token = Credentials(daemon.state).granted["admin"]
        (port,) = free_ports(1)
        daemon.flags = ("--http", f"127.0.0.1:{port}")
        doors = [Door(kind, str(daemon.socket), port, token) for kind in ("unix", "tcp")]
        for _ in range(3):
            daemon.start()
            with good_client(doors[0]) as beside:
                until(lambda beside=beside: beside.answers)
            with Load(doors) as load:
                until(lambda load=load: load.of("answered"))
                time.sleep(moments.uniform(0, LOAD_SECONDS))  # the moment, which is not waited for
                assert daemon.stop() == 0
            assert load.failures == []
            assert not daemon.socket.exists()
