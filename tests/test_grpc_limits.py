"""What gRPC does under load, abuse and shutdown."""

import queue
import resource
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import pytest
from daemon_process import until
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_served import SERVICE, Caller, Served, infer_request, refused
from ports import free_ports
from tiny_engine import TinyEngine

from supsupd.serving.grpc.health import MOST_WATCHERS, NAME

Code = grpc.StatusCode
HEAVY = np.ones((8, 4))  # more rows than the engine answers in the loop's own thread
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


@pytest.fixture
def engine():
    engine = TinyEngine()
    yield engine
    engine.gate.set()


@pytest.fixture
def blocked(engine):
    """An engine that answers nothing before its gate is set."""
    engine.gate.clear()
    return engine


@pytest.fixture
def path(tmp_path):
    return tmp_path / "grpc.sock"


@pytest.fixture
def threads():
    with ThreadPoolExecutor(16) as threads:
        yield threads


# -- time -------------------------------------------------------------------------------------------------------------


def test_a_request_waits_no_longer_than_its_timeout_says(blocked, path, threads):
    with Served(blocked, path, parallel=1) as served, Caller(*served.targets()) as call:
        first = threads.submit(call, "ModelInfer", infer_request(HEAVY))
        assert blocked.entered.wait(20)
        late = threads.submit(call, "ModelInfer", infer_request(HEAVY, timeout=1))
        until(lambda: served.front.batcher.queued == 1)
        blocked.gate.set()
        assert first.result(20).outputs
        with refused(Code.DEADLINE_EXCEEDED, "deadline_exceeded"):
            late.result(20)


def test_a_request_whose_own_deadline_is_over_is_not_computed(blocked, path, threads):
    with Served(blocked, path, parallel=1) as served, Caller(*served.targets()) as call:
        first = threads.submit(call, "ModelInfer", infer_request(HEAVY))
        assert blocked.entered.wait(20)
        with refused(Code.DEADLINE_EXCEEDED):
            call.raw("ModelInfer", infer_request(HEAVY).SerializeToString(), timeout=0.2)
        blocked.gate.set()
        assert first.result(20).outputs
        until(lambda: served.front.batcher.queued == 0)
    assert len(blocked.answered_in) == 1


@pytest.mark.parametrize("method", [f"{SERVICE}/ModelInfer", f"{SERVICE}/ServerLive", f"{NAME}/Check", f"{NAME}/Watch"])
def test_a_request_that_does_not_come_is_cut(method, engine, path):
    def nothing():
        ended.wait(20)
        yield b""

    ended = threading.Event()
    with Served(engine, path, body_seconds=1.0) as served, Caller(*served.targets()) as call:
        slow = call.channel.stream_unary(f"/{method}")
        with refused(Code.DEADLINE_EXCEEDED, "did not come within 1 s"):
            slow(nothing(), timeout=20)
        ended.set()
        assert call("ServerLive").live


def test_a_stream_whose_answers_nobody_takes_is_cut(engine, path):
    large = infer_request(np.ones((20_000, 4))).SerializeToString()
    with Served(engine, path, write_seconds=0.3) as served, Caller(*served.targets()) as call:
        unread = call.channel.stream_stream(f"/{SERVICE}/ModelStreamInfer")(iter([large] * 60), timeout=60)
        cut = 'supsupd_grpc_calls_total{code="DEADLINE_EXCEEDED",method="ModelStreamInfer"} 1.0'
        until(lambda: cut in served.front.metrics.render("text/plain")[0].decode(), 20)
        assert call("ServerLive").live
        unread.cancel()


@pytest.mark.parametrize(
    "sent", [b"", b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x02\x00" + bytes(99), PREFACE, PREFACE * 2]
)
def test_what_is_no_grpc_is_cut_at_once(sent, engine, path):
    with Served(engine, path, header_seconds=0.3) as served, socket.socket(socket.AF_UNIX) as stranger:
        stranger.settimeout(20)
        stranger.connect(str(path))
        stranger.sendall(sent)
        while stranger.recv(4096):
            pass
        with Caller(*served.targets()) as call:
            assert call("ServerLive").live


def test_a_call_without_a_request_is_refused(engine, path):
    said = refused(Code.INVALID_ARGUMENT, "expected a message")
    with Served(engine, path) as served, Caller(*served.targets()) as call, said:
        call.channel.stream_unary(f"/{SERVICE}/ModelInfer")(iter(()), timeout=20)


# -- size and number --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compression", [grpc.Compression.NoCompression, grpc.Compression.Gzip])
def test_a_request_that_is_too_large_is_refused(compression, engine, path):
    zeros = infer_request(np.zeros((1 << 20, 4))).SerializeToString()
    with Served(engine, path, max_body_bytes=1 << 20) as served, Caller(*served.targets()) as call:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with refused(Code.RESOURCE_EXHAUSTED, "larger than max"):
            call.raw("ModelInfer", zeros, compression=compression)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before + (16 << 10)  # KiB
        assert call("ModelInfer", infer_request()).outputs


def test_large_requests_are_answered_as_small_ones(engine, path):
    x = np.random.default_rng(1).normal(size=(20_000, 4)).astype(np.float32)
    with Served(engine, path) as served, Caller(*served.targets()) as call:
        raw = call("ModelInfer", infer_request(x))
        assert call("ModelInfer", infer_request(x, typed=True)).raw_output_contents == raw.raw_output_contents
    assert list(raw.outputs[1].shape) == [20_000, 3]


def test_more_queries_than_may_wait_are_refused(blocked, path, threads):
    with Served(blocked, path, parallel=1, queue_requests=2) as served, Caller(*served.targets()) as call:
        first = threads.submit(call, "ModelInfer", infer_request(HEAVY))
        assert blocked.entered.wait(20)
        more = [threads.submit(call, "ModelInfer", infer_request(HEAVY)) for _ in range(2)]
        until(lambda: served.front.batcher.queued == 2)
        with refused(Code.RESOURCE_EXHAUSTED, "overloaded"):
            call("ModelInfer", infer_request(HEAVY))
        blocked.gate.set()
        assert all(answer.result(20).outputs for answer in (first, *more))


def test_more_connections_than_there_may_be_are_refused(engine, path):
    with Served(engine, path, max_connections=3) as served:
        callers = [Caller(*served.targets()) for _ in range(4)]
        for caller in callers[:3]:
            assert caller("ServerLive").live
        with refused(Code.UNAVAILABLE):
            callers[3].raw("ServerLive", wait_for_ready=False)
        callers[0].channel.close()
        assert callers[3]("ServerLive").live
        for caller in callers:
            caller.channel.close()


def test_queries_of_many_callers_are_answered_together(blocked, path, threads):
    with Served(blocked, path, parallel=1) as served, Caller(*served.targets()) as call:
        answers = [threads.submit(call, "ModelInfer", infer_request(HEAVY)) for _ in range(9)]
        until(lambda: served.front.batcher.queued == 8)
        blocked.gate.set()
        assert len({answer.result(20).SerializeToString() for answer in answers}) == 1
        assert served.front.batcher.passes.by_reason.total() == 2


# -- health and the end -----------------------------------------------------------------------------------------------


def test_health_says_whether_queries_are_answered(engine, path):
    learned, engine.weights = engine.weights, engine.weights[:0]
    with Served(engine, path) as served, Caller(*served.targets()) as call:
        assert (call.health(), call("ServerReady").ready, call("ServerLive").live) == (NOT_SERVING, False, True)
        with refused(Code.UNAVAILABLE, "no task has been learned yet"):
            call("ModelInfer", infer_request())
        engine.weights = learned
        assert (call.health(), call("ServerReady").ready) == (SERVING, True)
        served.front.draining = True
        assert (call.health(), call("ServerReady").ready) == (NOT_SERVING, False)
        assert call("ModelInfer", infer_request()).outputs


def test_those_who_watch_the_health_are_told_of_changes(engine, path):
    with Served(engine, path) as served, Caller(*served.targets()) as call:
        states = health_pb2_grpc.HealthStub(call.channel).Watch(health_pb2.HealthCheckRequest(), timeout=20)
        assert next(states).status == SERVING
        served.front.draining = True
        assert next(states).status == NOT_SERVING
        states.cancel()


def test_who_watches_the_health_hears_of_changes_after_another_has_left(engine, path):
    with Served(engine, path) as served, Caller(*served.targets()) as call:
        watch = health_pb2_grpc.HealthStub(call.channel).Watch
        states, other = (watch(health_pb2.HealthCheckRequest(), timeout=20) for _ in range(2))
        assert (next(states).status, next(other).status) == (SERVING, SERVING)
        other.cancel()
        until(lambda: served.service.health.watchers == 1)
        served.front.draining = True
        assert next(states).status == NOT_SERVING
        states.cancel()


def test_who_watches_the_health_hears_of_the_end(engine, path):
    with Served(engine, path) as served, Caller(*served.targets()) as call:
        states = health_pb2_grpc.HealthStub(call.channel).Watch(health_pb2.HealthCheckRequest(), timeout=20)
        assert next(states).status == SERVING
        assert served.server.stop(8.0)
        assert [state.status for state in states] == [NOT_SERVING]


def test_the_health_of_what_there_is_not_is_unknown(engine, path):
    with Served(engine, path) as served, Caller(*served.targets()) as call:
        health = health_pb2_grpc.HealthStub(call.channel)
        asked = health_pb2.HealthCheckRequest(service="another.Service")
        with refused(Code.NOT_FOUND, "unknown_service"):
            health.Check(asked, timeout=20)
        states = health.Watch(asked, timeout=20)
        assert next(states).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
        states.cancel()
        with refused(Code.INVALID_ARGUMENT, "bad_request"):
            call.channel.unary_unary(f"/{NAME}/Check")(b"\xff", timeout=20)


def test_those_who_watch_the_health_leave_room_for_others(engine, path):
    with Served(engine, path, max_connections=MOST_WATCHERS + 2) as served, Caller(*served.targets()) as call:
        watch = health_pb2_grpc.HealthStub(call.channel).Watch
        watchers = [watch(health_pb2.HealthCheckRequest(), timeout=20) for _ in range(MOST_WATCHERS)]
        assert {next(states).status for states in watchers} == {SERVING}
        with refused(Code.RESOURCE_EXHAUSTED, "overloaded"):
            next(watch(health_pb2.HealthCheckRequest(), timeout=20))
        assert call("ModelInfer", infer_request()).outputs
        for states in watchers:
            states.cancel()


def test_calls_in_progress_are_answered_at_the_end(blocked, path, threads):
    with Served(blocked, path) as served, Caller(*served.targets()) as call:
        answer = threads.submit(call, "ModelInfer", infer_request(HEAVY))
        assert blocked.entered.wait(20)
        stopped = threads.submit(served.server.stop, 8.0)
        until(lambda: not path.exists())
        blocked.gate.set()
        assert answer.result(20).outputs
        assert stopped.result(20)
        with refused(Code.UNAVAILABLE):
            call.raw("ServerLive", wait_for_ready=False)


@pytest.mark.parametrize("moment", [0.0, 0.01, 0.1, 0.3])
def test_every_call_is_answered_or_refused_cleanly_at_the_end(moment, engine, path, threads):
    def ask():
        while True:
            call.raw("ModelInfer", request, wait_for_ready=False)
            seen.append(1)

    seen, request = [], infer_request(HEAVY).SerializeToString()
    with Served(engine, path) as served, Caller(*served.targets()) as call:
        asking = [threads.submit(ask) for _ in range(8)]
        until(lambda: len(seen) > 20)
        ended = threading.Timer(moment, served.server.stop, [5.0])
        ended.start()
        codes = set()
        for future in asking:
            with pytest.raises(grpc.RpcError) as caught:
                future.result(30)
            codes.add(caught.value.code())
        ended.join()
    assert codes == {Code.UNAVAILABLE}


def test_a_stream_that_waits_does_not_hold_up_the_end(engine, path):
    requests = queue.Queue()
    with Served(engine, path) as served, Caller(*served.targets()) as call:
        requests.put(infer_request())
        answers = call.stream(iter(requests.get, None))
        assert not next(answers).error_message
        began = time.monotonic()
        assert served.server.stop(60.0)
        assert time.monotonic() - began < 30
        with refused(Code.UNAVAILABLE, "shutting_down"):
            next(answers)
        requests.put(None)


def test_what_does_not_end_in_time_is_cut(blocked, path, threads):
    with Served(blocked, path) as served, Caller(*served.targets()) as call:
        answer = threads.submit(call, "ModelInfer", infer_request(HEAVY))
        assert blocked.entered.wait(20)
        began = time.monotonic()
        served.server.stop(0.2)
        assert time.monotonic() - began < 15  # half of what the engine takes
        with pytest.raises(grpc.RpcError) as caught:
            answer.result(20)
        assert caught.value.code() in (Code.CANCELLED, Code.UNAVAILABLE)
        blocked.gate.set()


def test_a_port_can_be_listened_on_again_at_once(engine, tmp_path):
    (port,) = free_ports(1)
    address = f"127.0.0.1:{port}"
    for _ in range(2):
        with Served(engine, address, state=tmp_path), Caller(address) as call:
            assert call("ServerLive").live
