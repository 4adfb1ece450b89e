"""What Prometheus is told. What happens is counted as it happens; what there is, is looked at when somebody asks."""

from __future__ import annotations

import platform
import threading
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from prometheus_client import CollectorRegistry, Info, ProcessCollector
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
GATHERED, GATHERED_ROWS = 64, 1 << 12
"""Answers, and rows of them, that wait at most to be looked at together."""
NO_ROUTE = "none"
"""What is asked for at a path that is none of ours."""


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
        self.queries: Counter[tuple[str, ...]] = Counter()
        """By model and outcome."""
        self.requests: Counter[tuple[str, ...]] = Counter()
        """By route and status."""
        self.calls: Counter[tuple[str, ...]] = Counter()
        """By method and code."""
        self.query_seconds, self.request_seconds, self.call_seconds = _Seconds(), _Seconds(), _Seconds()
        self.answers = Answers()
        registry.register(_Now(front, self))
        ProcessCollector(registry=registry)

    def count_query(self, question: Question, answer: Prediction | EngineError | None, seconds: float) -> None:
        """answer: None for one that failed or that nobody waited for."""
        model = "auto" if question.task is None else "given"
        self.queries[model, _outcome(answer)] += 1
        self.query_seconds[model].add(seconds)
        if isinstance(answer, Prediction):
            self.answers.add(answer)

    def count_request(self, route: str | None, status: int, seconds: float) -> None:
        """route: a template; None for a path that is none. status: 0 where nobody waited for an answer."""
        self.requests[route or NO_ROUTE, str(status or "gone")] += 1
        self.request_seconds[route or NO_ROUTE].add(seconds)

    def count_call(self, method: str, code: str, seconds: float) -> None:
        """method, code: by their names, as gRPC has them."""
        self.calls[method, code] += 1
        self.call_seconds[method].add(seconds)

    def render(self, accept: str) -> tuple[bytes, str]:
        """All figures of this moment and their media type, in the format that `accept` prefers. Asks the store."""
        encode, media_type = choose_encoder(accept)
        return encode(self._registry), media_type


class _Seconds(defaultdict[str, Buckets]):
    """How long something took, by what it was."""

    def __init__(self) -> None:
        super().__init__(lambda: Buckets(SECONDS))


class Answers:
    """What answered rows were like. Answers are looked at some at a time: by itself each would take as long as all.

    The event loop adds; any thread may look.
    """

    def __init__(self) -> None:
        self._entropy, self._margin = Buckets(NATS), Buckets(MARGINS)
        self._waiting: list[Prediction] = []
        self._rows = 0
        self._lock = threading.Lock()

    def add(self, answer: Prediction) -> None:
        with self._lock:
            self._waiting.append(answer)
            self._rows += len(answer.entropy)
            if len(self._waiting) >= GATHERED or self._rows >= GATHERED_ROWS:
                self._gather()

    def looked_at(self) -> tuple[Buckets, Buckets]:
        """Entropies in nats and margins of the rows of all answers so far."""
        with self._lock:
            self._gather()
        return self._entropy, self._margin

    def _gather(self) -> None:
        answers, self._waiting, self._rows = self._waiting, [], 0
        by_classes: dict[int, list[np.ndarray]] = {}
        for answer in answers:
            by_classes.setdefault(answer.probabilities.shape[1], []).append(answer.probabilities)
        for alike in by_classes.values():
            self._margin.add_all(margins(np.concatenate(alike)))
        if answers:
            self._entropy.add_all(np.concatenate([answer.entropy for answer in answers]))


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
        yield from self._asked()
        yield from self._queue()
        yield from self._connections()
        entropy, margin = self._metrics.answers.looked_at()
        yield _histogram("supsupd_query_entropy_nats", "Of each answered row's classes.", entropy)
        yield _histogram("supsupd_query_margin", "Between the two likeliest classes of each answered row.", margin)
        yield from _learning(self._front.engine.measures())

    def _asked(self) -> Iterator[Metric]:
        told = self._metrics
        yield _counts(
            "supsupd_queries",
            "Queries, by who chose the task and what became of them.",
            ("model", "outcome"),
            told.queries,
        )
        yield _times("supsupd_query_seconds", "From a query's decoded rows to its answer.", "model", told.query_seconds)
        yield _counts(
            "supsupd_http_requests", "HTTP requests, by the template of their path and the status of their answer.",
            ("route", "status"), told.requests,
        )  # fmt: skip
        yield _times(
            "supsupd_http_request_seconds",
            "From a request's head to the end of its answer.",
            "route",
            told.request_seconds,
        )
        yield _counts("supsupd_grpc_calls", "gRPC calls, by the code of their status.", ("method", "code"), told.calls)
        yield _times(
            "supsupd_grpc_call_seconds", "From a call's beginning to its end; a stream is one call.", "method",
            told.call_seconds,
        )  # fmt: skip

    def _queue(self) -> Iterator[Metric]:
        batcher = self._front.batcher
        passes = batcher.passes
        yield GaugeMetricFamily("supsupd_queue_requests", "Queries that wait.", batcher.queued)
        yield GaugeMetricFamily(
            "supsupd_queue_age_seconds", "How long the oldest of them has waited.", batcher.oldest_seconds()
        )
        yield _counts("supsupd_passes", "Passes over the masks, by why they began.", ["reason"], passes.by_reason)
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
        yield _counts("supsupd_connections_refused", "Connections that were not.", ["reason"], arrivals.refused)
        yield _counts("supsupd_http_refused", "Requests refused before any route.", ["status"], arrivals.answered)
        yield _counts("supsupd_connections_cut", "Connections ended since their time was over.", ["time"], arrivals.cut)


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
    yield _counts("supsupd_decisions", "Decisions about batches since the start.", ["kind"], stored.decisions)
    yield GaugeMetricFamily("supsupd_store_bytes", "What the database takes.", stored.store_bytes)
    yield GaugeMetricFamily("supsupd_spool_bytes", "What the batches in the spool take.", stored.spool_bytes)


def _counts(name: str, text: str, labels: Sequence[str], counts: Mapping[Any, int]) -> Metric:
    """counts: by the values of the labels; by the value itself where there is one label."""
    family = CounterMetricFamily(name, text, labels=labels)
    for values, count in dict(counts).items():  # a copy: it grows in another thread
        family.add_metric([values] if len(labels) == 1 else values, count)
    return family


def _times(name: str, text: str, label: str, seconds: Mapping[str, Buckets]) -> Metric:
    family = HistogramMetricFamily(name, text, labels=[label])
    for value, buckets in dict(seconds).items():
        family.add_metric([value], buckets=buckets.cumulative(), sum_value=buckets.total)
    return family


def _histogram(name: str, text: str, buckets: Buckets) -> Metric:
    return HistogramMetricFamily(name, text, buckets=buckets.cumulative(), sum_value=buckets.total)
