"""What Prometheus is told. What happens is counted as it happens; what there is, is looked at when somebody asks."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Histogram, Info, ProcessCollector, disable_created_metrics
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric

import supsupd
from supsupd.buckets import Buckets
from supsupd.serving.engine import (
    DeadlineExceeded,
    EngineError,
    Measures,
    Prediction,
    Question,
    Stored,
    TooManyQueries,
)

if TYPE_CHECKING:
    from supsupd.serving.front import Front
    from supsupd.serving.http.accepting import Acceptor

SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
NATS = (0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 7.0)
MARGINS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
NO_ROUTE = "none"
"""What is asked for at a path that is none of ours."""

disable_created_metrics()  # a series more for each, which nobody reads


class Metrics:
    """One for a daemon. It is told things in the thread of the event loop, and read in any.

    Every label has few values: routes as templates, statuses, states and kinds of fixed lists.

    Args:
        front: what is served.

    Attributes:
        acceptor: knows the connections, once there is a server.
    """

    def __init__(self, front: Front) -> None:
        self.acceptor: Acceptor | None = None
        self._registry = registry = CollectorRegistry()
        Info("supsupd_build", "The program.", registry=registry).info(
            {"version": supsupd.__version__, "python": platform.python_version()}
        )
        self._queries = Counter(
            "supsupd_queries", "Queries, by who chose the task and what became of them.", ["model", "outcome"],
            registry=registry,
        )  # fmt: skip
        self._query_seconds = Histogram(
            "supsupd_query_seconds", "From a query's decoded rows to its answer.", ["model"],
            buckets=SECONDS, registry=registry,
        )  # fmt: skip
        self._requests = Counter(
            "supsupd_http_requests", "HTTP requests, by the template of their path and the status of their answer.",
            ["route", "status"], registry=registry,
        )  # fmt: skip
        self._request_seconds = Histogram(
            "supsupd_http_request_seconds", "From a request's head to the end of its answer.", ["route"],
            buckets=SECONDS, registry=registry,
        )  # fmt: skip
        self._calls = Counter(
            "supsupd_grpc_calls", "gRPC calls, by the code of their status.", ["method", "code"], registry=registry
        )
        self._call_seconds = Histogram(
            "supsupd_grpc_call_seconds", "From a call's beginning to its end; a stream is one call.", ["method"],
            buckets=SECONDS, registry=registry,
        )  # fmt: skip
        self.entropy, self.margin = Buckets(NATS), Buckets(MARGINS)
        registry.register(_Now(front, self))
        ProcessCollector(registry=registry)

    def count_query(self, question: Question, answer: Prediction | EngineError | None, seconds: float) -> None:
        """answer: None for one that failed or that nobody waited for."""
        model = "auto" if question.task is None else "given"
        self._queries.labels(model, _outcome(answer)).inc()
        self._query_seconds.labels(model).observe(seconds)
        if isinstance(answer, Prediction):
            self.entropy.add(answer.entropy)
            self.margin.add(margins(answer.probabilities))

    def count_request(self, route: str | None, status: int, seconds: float) -> None:
        """route: a template; None for a path that is none. status: 0 where nobody waited for an answer."""
        self._requests.labels(route or NO_ROUTE, str(status or "gone")).inc()
        self._request_seconds.labels(route or NO_ROUTE).observe(seconds)

    def count_call(self, method: str, code: str, seconds: float) -> None:
        """method, code: by their names, as gRPC has them."""
        self._calls.labels(method, code).inc()
        self._call_seconds.labels(method).observe(seconds)

    def render(self, accept: str) -> tuple[bytes, str]:
        """All figures of this moment and their media type, in the format that `accept` prefers. Asks the store."""
        encode, media_type = choose_encoder(accept)
        return encode(self._registry), media_type


def margins(probabilities: np.ndarray) -> np.ndarray:
    """By how much the likeliest class of each row is likelier than the next: (n, classes) -> (n,)."""
    if probabilities.shape[1] < 2:  # nothing else is possible
        return probabilities[:, 0]
    top = np.partition(probabilities, -2, axis=1)
    return np.asarray(top[:, -1] - top[:, -2])


def _outcome(answer: Prediction | EngineError | None) -> str:
    if isinstance(answer, Prediction):
        return "answered"
    if isinstance(answer, TooManyQueries):
        return "overloaded"
    if isinstance(answer, DeadlineExceeded):
        return "late"
    if isinstance(answer, EngineError):
        return "refused" if answer.status < 500 else "unavailable"
    return "failed"


class _Now:
    """Looks, whenever it is asked, at what is counted elsewhere."""

    def __init__(self, front: Front, metrics: Metrics) -> None:
        self._front = front
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        yield from self._queue()
        yield from self._connections()
        yield _histogram("supsupd_query_entropy_nats", "Of each answered row's classes.", self._metrics.entropy)
        yield _histogram(
            "supsupd_query_margin", "Between the two likeliest classes of each answered row.", self._metrics.margin
        )
        yield from _learning(self._front.engine.measures())

    def _queue(self) -> Iterator[Metric]:
        batcher = self._front.batcher
        passes = batcher.passes
        yield GaugeMetricFamily("supsupd_queue_requests", "Queries that wait.", batcher.queued)
        yield GaugeMetricFamily(
            "supsupd_queue_age_seconds", "How long the oldest of them has waited.", batcher.oldest_seconds()
        )
        yield _counts("supsupd_passes", "Passes over the masks, by why they began.", "reason", passes.by_reason)
        yield CounterMetricFamily("supsupd_pass_requests", "Queries in these passes.", passes.requests)
        yield CounterMetricFamily("supsupd_pass_rows", "Rows in these passes.", passes.rows)
        yield CounterMetricFamily(
            "supsupd_queue_seconds", "How long these queries waited, together.", passes.queued_seconds
        )
        yield GaugeMetricFamily("supsupd_passes_running", "Passes in threads of their own now.", batcher.running)

    def _connections(self) -> Iterator[Metric]:
        if (acceptor := self._metrics.acceptor) is None:
            return
        arrivals = acceptor.arrivals
        yield GaugeMetricFamily("supsupd_connections", "Connections that are open.", acceptor.open)
        yield CounterMetricFamily("supsupd_connections_accepted", "Connections that were let in.", arrivals.accepted)
        yield _counts("supsupd_connections_refused", "Connections that were not.", "reason", arrivals.refused)
        yield _counts("supsupd_http_refused", "Requests refused before any route.", "status", arrivals.answered)
        yield _counts("supsupd_connections_cut", "Connections ended since their time was over.", "time", arrivals.cut)


def _learning(now: Measures) -> Iterator[Metric]:
    yield GaugeMetricFamily("supsupd_ready", "Whether queries are answered: 1 or 0.", float(now.ready))
    yield GaugeMetricFamily("supsupd_tasks", "Tasks in use.", now.tasks)
    yield GaugeMetricFamily("supsupd_masks_in_memory", "Masks in memory.", now.masks_in_memory)
    yield GaugeMetricFamily("supsupd_masks_in_memory_bytes", "What they take.", now.masks_in_memory_bytes)
    yield CounterMetricFamily("supsupd_batches_learned", "Batches that tasks took up since the start.", now.learned)
    yield _histogram("supsupd_learning_seconds", "From the claim of a labelled batch to its state.", now.training)
    yield GaugeMetricFamily("supsupd_problems", "What keeps the daemon from working as it should.", now.problems)
    is_readable = float(now.stored is not None)
    yield GaugeMetricFamily("supsupd_store_readable", "Whether the store could be read: 1 or 0.", is_readable)
    if now.stored is not None:
        yield from _store(now.stored)


def _store(stored: Stored) -> Iterator[Metric]:
    batches = GaugeMetricFamily("supsupd_batches", "Batches in the ledger, by state.", labels=["state"])
    for state, count in stored.batches.items():
        batches.add_metric([state], count)
    yield batches
    yield _counts("supsupd_decisions", "Decisions about batches since the start.", "kind", stored.decisions)
    yield GaugeMetricFamily("supsupd_store_bytes", "What the database takes.", stored.store_bytes)
    yield GaugeMetricFamily("supsupd_spool_bytes", "What the batches in the spool take.", stored.spool_bytes)


def _counts(name: str, text: str, label: str, counts: Mapping[Any, int]) -> Metric:
    family = CounterMetricFamily(name, text, labels=[label])
    for value, count in dict(counts).items():  # a copy: it grows in another thread
        family.add_metric([value], count)
    return family


def _histogram(name: str, text: str, buckets: Buckets) -> Metric:
    return HistogramMetricFamily(name, text, buckets=buckets.cumulative(), sum_value=buckets.total)
