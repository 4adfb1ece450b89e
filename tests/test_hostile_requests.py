"""Whoever may ask or send asks a real daemon for as much as may be, over every wire: what it holds stays bounded, and
a row beside that is answered."""

import contextlib
import json
import re
import socket
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor

import digits
import grpc
import numpy as np
import pytest
from daemon_process import QUICK, DaemonProcess, until
from grpc_served import Caller, infer_request
from process_tree import MIB, peak, resident
from raw_http import read_all

INPUTS = 64
ROOM = 384 * MIB  # serving.memory_bytes
SLACK = (
    256 * MIB
)  # 8 messages of 16 MiB that gRPC's library has before they are counted; pieces of work, the allocator's
CONFIG = f'grpc_socket = "{{grpc}}"\n{QUICK}'
WBITS = {"gzip": zlib.MAX_WBITS | 16, "deflate": zlib.MAX_WBITS}


@pytest.fixture(scope="module")
def daemon(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    with DaemonProcess(folder, config=CONFIG.format(grpc=folder / "grpc")) as daemon:
        daemon.start()
        for seed in range(6):
            daemon.drop(f"{seed}", **digits.draw(0, seed))
        daemon.wait()
        assert daemon.client.tasks()
        ask_one(daemon)
        daemon.at_rest = resident(daemon.process.pid)
        yield daemon


@pytest.fixture
def bounded(daemon):
    """Throughout a test no more is held than the budget, and one row after the other is answered."""
    ended, answered = threading.Event(), []

    def ask():
        while not ended.is_set():
            answered.append(ask_one(daemon))

    with peak(daemon.process.pid) as seen:
        asking = threading.Thread(target=ask)
        asking.start()
        try:
            yield
        finally:
            ended.set()
            asking.join(60)
    assert max(seen) < daemon.at_rest + ROOM + SLACK, (max(seen) // MIB, daemon.at_rest // MIB)
    assert answered
    assert all(status == 200 for status in answered)


def head(path, size, *headers):
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", f"Content-Length: {size}", "Connection: close", *headers]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


INFER = "/v2/models/supsup/infer"


def send(daemon, payload):
    """A connection on which this was sent, or as much as it took."""
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(str(daemon.socket))
    connection.settimeout(120)
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # refused by now; what it is told is read
        connection.sendall(payload)
    return connection


def ask(daemon, body, *headers, path=INFER):
    """(status, text) of one request."""
    with send(daemon, head(path, len(body), *headers) + body) as connection:
        (answer,) = read_all(connection)
    return answer.status, answer.body


def ask_one(daemon):
    return ask(daemon, np.zeros(INPUTS, "<f4").tobytes(), "Inference-Header-Content-Length: 0")[0]


def at_once(count, work):
    with ThreadPoolExecutor(count) as threads:
        return list(threads.map(lambda _: work(), range(count)))


def json_of(size):
    """A query of zeros in about so many bytes."""
    rows = size // (2 * INPUTS)
    data = b",".join([b"0"] * (rows * INPUTS))
    return b'{"inputs":[{"name":"x","datatype":"FP64","shape":[%d,%d],"data":[%b]}]}' % (rows, INPUTS, data)


def raw_of(size):
    """A query of bytes that become floats, and where they begin."""
    tensor = {"name": "x", "datatype": "UINT8", "shape": [size // INPUTS, INPUTS]}
    tensor["parameters"] = {"binary_data_size": size}
    told = json.dumps({"inputs": [tensor]}).encode()
    return told + bytes(size), f"Inference-Header-Content-Length: {len(told)}"


def packed(body, coding):
    stream = zlib.compressobj(9, zlib.DEFLATED, WBITS[coding])
    return stream.compress(body) + stream.flush()


@pytest.mark.parametrize("coding", WBITS)
def test_ten_queries_that_unpack_to_a_thousand_times_their_size_are_refused(daemon, bounded, coding):
    body = packed(json_of(63 * MIB), coding)
    assert len(body) < 100_000
    for status, text in at_once(10, lambda: ask(daemon, body, f"Content-Encoding: {coding}")):
        assert status == 413
        assert b"unpacks to more than 200 times" in text


@pytest.mark.parametrize("coding", [*WBITS, "identity"])
def test_ten_queries_of_many_numbers_are_answered_in_turn(daemon, bounded, coding):
    plain = json_of(8 * MIB)
    body = plain if coding == "identity" else packed(plain, coding)
    found = at_once(10, lambda: ask(daemon, body, f"Content-Encoding: {coding}"))
    assert {status for status, _ in found} == {200}
    told = json.loads(found[0][1])["outputs"]
    assert told[0]["shape"] == [8 * MIB // (2 * INPUTS)]


def test_ten_queries_of_raw_bytes_are_answered_in_turn(daemon, bounded):
    body, where = raw_of(8 * MIB)
    assert {status for status, _ in at_once(10, lambda: ask(daemon, body, where))} == {200}


HOSTILE = {
    "empty arrays": b'{"inputs":[{"name":"x","datatype":"FP32","shape":[1],"data":[' + b"[]," * (20 * MIB) + b"[]]}]}",
    "empty objects": b'{"inputs":[' + b"{}," * (20 * MIB) + b"{}]}",
    "short strings": b'{"inputs":[' + b'"ab",' * (12 * MIB) + b'""]}',
    "keys": b'{"inputs":{' + b'"a":{},' * (8 * MIB) + b'"b":0}}',
    "a long string": b'{"id":"' + b"a" * (60 * MIB) + b'"}',
    "depth": b"[" * (60 * MIB),
    "blanks": b" " * (60 * MIB),
    "escapes": b'{"id":"' + b"\\u0041" * (10 * MIB) + b'"}',
    "one number": b'{"inputs":[{"name":"x","datatype":"FP32","shape":[1,1],"data":[' + b"1" * (60 * MIB) + b"]}]}",
}


@pytest.mark.parametrize("body", HOSTILE.values(), ids=HOSTILE)
def test_json_that_becomes_many_objects_is_refused(daemon, bounded, body):
    for status, text in at_once(4, lambda: ask(daemon, body)):
        assert status in (400, 413), text
        assert len(text) < 1000


def test_a_query_with_too_many_answers_is_refused(daemon, bounded):
    body, where = raw_of(60 * MIB)
    for status, text in at_once(10, lambda: ask(daemon, body, where)):
        assert status == 413
        assert text.startswith(b'{"error":"too_large: an answer to ')


@pytest.mark.parametrize("path", [INFER, "/v1/batches?name=half"])
def test_bodies_half_sent_hold_no_more_than_has_room(daemon, bounded, path):
    half = head(path, 60 * MIB) + bytes(1 * MIB)

    def begin():
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(str(daemon.socket))
        connection.setblocking(False)
        sent = 0
        try:
            while sent < len(half):
                sent += connection.send(half[sent:])
        except BlockingIOError:  # it takes no more now
            pass
        return connection

    connections = [begin() for _ in range(100)]
    for _ in range(20):
        assert ask_one(daemon) == 200
    for connection in connections:
        connection.close()
    until(lambda: float(re.search(r"^supsupd_connections ([0-9.]+)$", daemon.client.metrics(), re.M)[1]) < 10)


def test_posted_batches_wait_for_their_turn_unread(daemon, bounded):
    body = b"PK\x03\x04" + bytes(60 * MIB)
    assert {status for status, _ in at_once(8, lambda: ask(daemon, body, path="/v1/batches?name=b.npz"))} == {400}


def test_words_to_operators_are_short(daemon, bounded):
    body = b'{"name":"' + b"a" * (60 * MIB) + b'"}'
    for path in ("/v2/repository/index", "/v2/repository/models/task-1/unload", "/v2/logging", "/v1/tasks/1/merge"):
        assert {status for status, _ in at_once(3, lambda path=path: ask(daemon, body, path=path))} == {413}


# -- gRPC -------------------------------------------------------------------------------------------------------------


def calling(daemon):
    """A caller that takes answers of any size."""
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", -1)]
    return Caller(None, channel=grpc.insecure_channel(f"unix:{daemon.socket.parent / 'grpc'}", options))


def call(daemon, request, **how):
    """The name of the status."""
    with calling(daemon) as caller:
        try:
            caller.raw("ModelInfer", request, **{"timeout": 120, **how})
        except grpc.RpcError as error:
            return error.code().name
    return "OK"


def test_eight_packed_calls_are_refused(daemon, bounded):
    request = infer_request(np.zeros((63 * MIB // INPUTS, INPUTS), np.uint8), "UINT8").SerializeToString()
    found = at_once(8, lambda: call(daemon, request, compression=grpc.Compression.Gzip))
    assert set(found) == {"RESOURCE_EXHAUSTED"}


@pytest.mark.parametrize("is_typed", [False, True])
def test_eight_large_calls_are_answered(daemon, bounded, is_typed):
    size = 2 * MIB if is_typed else 8 * MIB
    x = np.zeros((size // INPUTS, INPUTS), np.uint8)
    request = infer_request(x, "UINT8", typed=is_typed).SerializeToString()
    answers = at_once(8, lambda: call(daemon, request))
    assert set(answers) <= {"OK", "RESOURCE_EXHAUSTED"}  # told at once that there is no room, never left to wait
    assert answers.count("OK") >= 4


def test_many_large_calls_hold_no_more_than_has_room(daemon, bounded):
    request = infer_request(np.zeros((15 * MIB // INPUTS, INPUTS), np.uint8), "UINT8").SerializeToString()
    assert set(at_once(24, lambda: call(daemon, request))) <= {"OK", "RESOURCE_EXHAUSTED"}


def test_a_stream_reads_no_further_than_has_room(daemon, bounded):
    request = infer_request(np.zeros((2 * MIB // INPUTS, INPUTS), np.uint8), "UINT8")
    with calling(daemon) as caller:
        answers = list(caller.stream([request] * 24))
    assert [answer.error_message for answer in answers] == [""] * 24


def test_more_streams_than_may_be_are_refused(daemon, bounded):
    ended = threading.Event()

    def quiet():
        yield infer_request(np.zeros((1, INPUTS)))
        ended.wait(60)

    with calling(daemon) as caller, ThreadPoolExecutor(40) as threads:
        streams = [caller.stream(quiet()) for _ in range(20)]
        first = [threads.submit(next, stream) for stream in streams]
        until(lambda: sum(answer.done() for answer in first) == 20)
        refused = [answer.exception().code().name for answer in first if answer.exception()]
        ended.set()
    assert refused == ["RESOURCE_EXHAUSTED"] * 4
