"""From the sources to the ledger: own the bytes first, then say so in one transaction, then tell the learner.

A crash before the transaction leaves only a stray file in the spool, and the source is asked again; after it the batch
is ours.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from dataclasses import dataclass

import structlog

from storage import cursors, ledger
from storage.db import Database
from storage.spool import Spool
from streams.batch import Arrival, Refusal
from streams.formats import Limits
from streams.source import Source
from streams.tasks import TaskRule, accept
from supsupd.config import IntakeSettings

RETRY_SECONDS = 1.0
SOCKET_SOURCE = "socket"

log = structlog.get_logger("supsupd.intake")


class QueueFull(Exception):
    """As many batches as are allowed wait to be learned."""


@dataclass
class SourceProgress:
    """passes: the newest `scan` request that a full pass has covered."""

    source: Source
    passes: int = 0


class Intake:
    """Stages what the sources yield, one thread a source.

    Args:
        database, spool: the store.
        settings: sizes and times.
        notify: called after each staged batch.
        tasks: which submitted batches must say what task they belong to.
    """

    def __init__(
        self,
        database: Database,
        spool: Spool,
        settings: IntakeSettings,
        notify: Callable[[], None],
        tasks: TaskRule = "ignored",
    ) -> None:
        self._database = database
        self._spool = spool
        self._settings = settings
        self._notify = notify
        self._tasks = tasks
        self._requested = 1
        self._staging = threading.Lock()
        self.progress: list[SourceProgress] = []

    def add(self, source: Source) -> None:
        self.progress.append(SourceProgress(source))

    def request_scan(self) -> int:
        """Asks every source for a full pass; its number is in `passes` once the pass is over."""
        self._requested += 1
        for progress in self.progress:
            progress.source.poke()
        return self._requested

    def loop(self, progress: SourceProgress, stopping: threading.Event) -> None:
        """Passes over one source until `stopping`."""
        while not stopping.is_set():
            requested = self._requested
            try:
                if self._pass(progress.source, stopping):
                    progress.passes = requested
            except Exception:  # the edge: a failing disk or database must not end the source
                log.exception("intake_failed", source=progress.source.name)
                stopping.wait(RETRY_SECONDS)
            if self._requested == requested and not stopping.is_set():
                progress.source.wait(self._settings.scan_seconds)

    def _pass(self, source: Source, stopping: threading.Event) -> bool:
        for item in source.iter_arrivals():
            while self._is_full() and not stopping.wait(0.05):
                self._notify()
            if stopping.is_set():
                return False
            self.take(item)
            source.acknowledge(item)
        return True

    def _is_full(self) -> bool:
        with self._database.read() as session:
            return ledger.count_staged(session) >= self._settings.max_queue

    def take(self, item: Arrival | Refusal) -> None:
        """Makes one item of a source durable, with its cursor."""
        if isinstance(item, Arrival):
            self._stage(item)
            return
        with self._database.write() as session:
            ledger.quarantine_arrival(session, item.source, item.name, item.sha256, item.reason)
            cursors.advance(session, item.source, item.key, item.position)
        log.warning("file_quarantined", source=item.source, name=item.name, reason=item.reason)

    def _stage(self, arrival: Arrival) -> ledger.Staged:
        with self._staging:  # the spool and the ledger must agree about equal contents from two sources
            return self._stage_alone(arrival)

    def _stage_alone(self, arrival: Arrival) -> ledger.Staged:
        with self._database.read() as session:
            is_new = ledger.find_content(session, arrival.sha256) is None
        if is_new:
            self._spool.store(arrival.sha256, arrival.payload)
        entry = ledger.Entry(
            arrival.source,
            arrival.name,
            arrival.sha256,
            len(arrival.payload),
            arrival.samples,
            arrival.labelled,
            arrival.task,
        )
        with self._database.write() as session:
            staged = ledger.stage(session, entry)
            if arrival.key:
                cursors.advance(session, arrival.source, arrival.key, arrival.position)
        log.info("batch_staged", batch=staged.id, name=arrival.name, duplicate=staged.duplicate)
        self._notify()
        return staged

    def submit(self, name: str, payload: bytes) -> tuple[ledger.Staged, str]:
        """Stages a batch that came over the socket; its SHA-256 too. Raises BatchRejected, QueueFull."""
        if self._is_full():
            raise QueueFull(f"{self._settings.max_queue} batches are waiting; try again later")
        payload, batch = accept(payload, name, self._tasks, Limits(bytes=self._settings.max_unpacked_bytes))
        sha256 = hashlib.sha256(payload).hexdigest()
        arrival = Arrival(
            source=SOCKET_SOURCE,
            name=name,
            sha256=sha256,
            payload=payload,
            samples=len(batch.x),
            labelled=batch.y is not None,
            key="",
            position="",
            task=batch.task,
        )
        return self._stage(arrival), sha256
