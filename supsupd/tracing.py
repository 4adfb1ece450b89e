"""Traces for OpenTelemetry: requests, passes over the masks, and batches that are learned. Off unless begun.

The extra `otel` is only imported then. A collector that cannot be reached costs spans, and neither time nor the exit.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from streams.broker import client_library
from supsupd import __version__

EXPORT_SECONDS = 2.0
"""How long the collector may take for one message."""
FAREWELL_SECONDS = 1.0
"""How long the last spans may take, at the end of the process."""

_OFF: AbstractContextManager[Any] = nullcontext()
_on: _Tracing | None = None


class _Tracing:
    """Raises MissingExtra."""

    def __init__(self, endpoint: str) -> None:
        client_library("opentelemetry.exporter.otlp.proto.http.trace_exporter", "otel")
        from opentelemetry import propagate, trace
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        resource = Resource.create({"service.name": "supsupd", "service.version": __version__})
        exporter = OTLPSpanExporter(f"{endpoint.rstrip('/')}/v1/traces", timeout=EXPORT_SECONDS)
        self.provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self.provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=1000))
        self.tracer = self.provider.get_tracer("supsupd", __version__)
        self.api = trace
        self.extract = propagate.extract


def begin(endpoint: str) -> None:
    """From now on spans go to the collector at `endpoint`. Raises MissingExtra."""
    global _on  # noqa: PLW0603 - one for a process, like its log
    _on = _Tracing(endpoint)


def end() -> None:
    """Sends what there is, and gives up soon."""
    global _on
    ended, _on = _on, None
    if ended is not None:
        farewell = threading.Thread(target=ended.provider.shutdown, daemon=True)
        farewell.start()
        farewell.join(FAREWELL_SECONDS)


def span(name: str, links: Sequence[Any] = (), **attributes: Any) -> AbstractContextManager[Any]:
    """Lasts as long as its block; within it, others are its children. links: of `current`."""
    if _on is None:
        return _OFF
    found = [_on.api.Link(link) for link in links if link is not None]
    return _on.tracer.start_as_current_span(name, links=found, attributes=attributes)


def request_span(method: str, headers: Iterable[tuple[bytes, bytes]]) -> AbstractContextManager[Any]:
    """Of a request; it goes on with the caller's trace (`traceparent`) if there is one."""
    if _on is None:
        return _OFF
    carrier = {name.decode("latin-1"): value.decode("latin-1") for name, value in headers}
    kind, attributes = _on.api.SpanKind.SERVER, {"http.request.method": method}
    return _on.tracer.start_as_current_span(method, context=_on.extract(carrier), kind=kind, attributes=attributes)


def current() -> Any:
    """What a later span may link to: the one that lasts now. None where there is none."""
    if _on is None:
        return None
    context = _on.api.get_current_span().get_span_context()
    return context if context.is_valid else None


def finish_request(span: Any, route: str | None, status: int) -> None:
    """Says of a request's span what became of it."""
    if span is None:
        return
    if route is not None:
        span.update_name(f"{span.attributes['http.request.method']} {route}")
        span.set_attribute("http.route", route)
    span.set_attribute("http.response.status_code", status)
    if status >= 500 and _on is not None:
        span.set_status(_on.api.StatusCode.ERROR)
