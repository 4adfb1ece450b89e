"""Traces: real spans at a real OTLP receiver, and nothing that waits for one that is not there."""

import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import numpy as np
import pytest
import tiny_engine
from daemon_process import DaemonProcess, until

from supsupd import tracing

pytest.importorskip("opentelemetry.sdk", reason="the extra otel is not installed")
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


class Collector(ThreadingHTTPServer):
    """An OTLP collector over HTTP; `spans`: all that it was sent."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Receiver)
        self.spans = []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def await_span(self, name):
        """The first of this name."""
        return until(lambda: next((span for span in self.spans if span.name == name), None))


class _Receiver(BaseHTTPRequestHandler):
    def do_POST(self):
        assert self.path == "/v1/traces"
        message = ExportTraceServiceRequest.FromString(self.rfile.read(int(self.headers["content-length"])))
        for resource in message.resource_spans:
            for scope in resource.scope_spans:
                self.server.spans += scope.spans
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture
def collector():
    with Collector() as running:
        yield running
        running.shutdown()


@pytest.fixture
def silent():
    """The address of something that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


def ask(path, headers=()):
    tensor = {"name": "x", "shape": [1, tiny_engine.INPUTS], "datatype": "FP32", "data": [0.5] * tiny_engine.INPUTS}
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(path))) as http:
        url = "http://supsupd/v2/models/supsup/infer"
        return http.post(url, json={"inputs": [tensor]}, headers=dict(headers)).status_code


def test_a_request_goes_on_with_its_callers_trace_and_its_pass_is_linked(tmp_path, collector):
    tracing.begin(collector.url)
    with tiny_engine.serving(tiny_engine.TinyEngine(), tmp_path / "s"):
        assert ask(tmp_path / "s", {"traceparent": f"00-{TRACE}-{PARENT}-01"}) == 200
    tracing.end()  # which may give up before the last spans have come
    request = collector.await_span("POST /v2/models/{model}/infer")
    assert (request.trace_id.hex(), request.parent_span_id.hex()) == (TRACE, PARENT)
    told = {a.key: a.value.string_value or a.value.int_value for a in request.attributes}
    assert told["http.response.status_code"] == 200
    run = collector.await_span("pass")
    assert [link.span_id for link in run.links] == [request.span_id]


def test_a_daemon_tells_of_the_batches_that_it_learns(tmp_path, collector, monkeypatch):
    monkeypatch.setenv("SUPSUPD_TRACING__ENDPOINT", collector.url)
    with DaemonProcess(tmp_path) as daemon:
        daemon.start()
        daemon.drop("a", x=np.eye(20, dtype=np.float32), y=np.arange(20) % 2)
        daemon.wait()
        collector.await_span("batch")
        assert daemon.stop() == 0


def test_a_collector_that_never_answers_holds_up_neither_requests_nor_the_end(tmp_path, silent, monkeypatch):
    monkeypatch.setattr(tracing, "EXPORT_SECONDS", 120.0)  # so that it shows on a busy machine too
    tracing.begin(silent)
    began = time.monotonic()
    with tiny_engine.serving(tiny_engine.TinyEngine(), tmp_path / "s"):
        for _ in range(20):
            assert ask(tmp_path / "s") == 200
    tracing.end()
    assert time.monotonic() - began < tracing.EXPORT_SECONDS / 2


def test_without_the_extra_the_daemon_says_so_in_one_line(tmp_path, monkeypatch):
    (tmp_path / "opentelemetry.py").write_text("raise ImportError")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("SUPSUPD_TRACING__ENDPOINT", "http://127.0.0.1:1")
    code, lines = DaemonProcess(tmp_path).refusal()
    assert code == 78
    assert len(lines) == 1
    assert "pip install 'supsupd[otel]'" in lines[0]


def test_nothing_is_traced_unless_asked_for(tmp_path, collector):
    with tiny_engine.serving(tiny_engine.TinyEngine(), tmp_path / "s"):
        assert ask(tmp_path / "s") == 200
    tracing.end()
    assert collector.spans == []
    assert tracing.current() is None
