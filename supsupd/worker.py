"""The learning side of the daemon: takes staged batches one by one; what keeps it from that is tried again or told.

One thread runs `step`, and between two steps what an operator commands.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

import structlog

from storage import ledger
from storage.db import Database, StoreError
from storage.failpoints import hit
from storage.masks import MaskCorrupt
from storage.models import BatchRow
from storage.spool import Spool
from streams.decoder import Decoder
from supsupd.buckets import Buckets
from supsupd.commands import CommandQueue
from supsupd.config import Settings
from supsupd.engine import Engine
from supsupd.health import Health, may_be_the_batchs
from supsupd.knowledge import Knowledge
from supsupd.learning.device import Device, lacks_memory
from supsupd.learning.predictor import Predictor
from supsupd.lessons import NO_MEMORY, Lessons
from supsupd.predictions import Predictions
from supsupd.reading import inline_decoder

MAX_ATTEMPTS = 3
COMMAND_SECONDS = 45.0
"""How long a command waits for its turn: less than clients wait for an answer."""

T = TypeVar("T")

log = structlog.get_logger("supsupd.learning")


class Worker:
    """Learns staged batches.

    Args:
        settings: the whole configuration.
        database, spool: the store.
        device: where masks are trained and run.
        decoder: reads the bytes of batches; by default in this process.
        health: told what keeps it from learning.
    """

    def __init__(
        self,
        settings: Settings,
        database: Database,
        spool: Spool,
        device: Device,
        decoder: Decoder | None = None,
        health: Health | None = None,
    ) -> None:
        self.settings = settings
        self.database = database
        self.spool = spool
        self.device = device
        self.busy = False
        self._health = health or Health()
        self._knowledge = Knowledge(settings, database, spool)
        decoder = decoder or inline_decoder(settings)
        self._predictions = Predictions(settings.predictions, database, self._health)
        self._lessons = Lessons(settings, database, spool, device, decoder, self._knowledge, self._predictions)
        self._failed: Counter[int] = Counter()
        self._wake = threading.Event()
        self._commands = CommandQueue(self.notify)

    # -- lifecycle ------------------------------------------------------------------------------------------------

    def load(self, crashed: bool = False) -> None:
        """Rebuilds all from the store: the network, every task, the provisional tasks.

        `crashed`: a batch that is in training died with the process. Raises NetworkMismatch, StoreError.
        """
        self._lessons.load(crashed)

    def clean_spool(self) -> None:
        """Removes what a crash left there and no batch needs. Before anything is staged."""
        with self.database.read() as session:
            needed = ledger.list_spooled(session)
        self.spool.clean(keep=needed)

    def release(self) -> None:
        """At the end of a process that does not wait for a batch in training: it is no crash of the batch's."""
        with suppress(StoreError), self.database.write() as session:
            ledger.release_claims(session)

    # -- what is known --------------------------------------------------------------------------------------------

    @property
    def predictor(self) -> Predictor | None:
        """What answers queries; None before there is a network."""
        return self._knowledge.predictor

    def predictor_without(self, error: MaskCorrupt, predictor: Predictor) -> Predictor:
        """What answers instead of `predictor`, which came upon a damaged mask. Any thread may call it."""
        return self._knowledge.predictor_without(error, predictor)

    @property
    def engine(self) -> Engine | None:
        """Only the learning thread may change what is in it."""
        return self._knowledge.engine

    @property
    def masks_in_memory(self) -> dict[str, int]:
        """How many, and their bytes."""
        bank = self.engine.bank if self.engine is not None else None
        return {"count": len(bank), "bytes": bank.nbytes} if bank is not None else {"count": 0, "bytes": 0}

    @property
    def learned(self) -> int:
        """The batches that tasks took up, since the start."""
        return self._knowledge.learned

    @property
    def training(self) -> Buckets:
        """Seconds from the claim of a labelled batch to its state."""
        return self._lessons.training

    def reconsider(self) -> None:
        """Decides the unsure batches that the tasks explain by now."""
        self._knowledge.reconsider()

    def drop(self, batch_id: int) -> None:
        """Gives up a batch of any state that still has its bytes; any thread but the learning one may call it.

        Raises BatchUnknown, LedgerConflict, CommandRefused, StoreError, OSError.
        """
        self.call(lambda: self._lessons.drop(batch_id))

    # -- commands -------------------------------------------------------------------------------------------------

    def notify(self) -> None:
        """There is something new to learn."""
        self._wake.set()

    def call(self, command: Callable[[], T]) -> T:
        """What `command` gives, or raises, in the learning thread, between two batches: only that one changes masks.

        Raises CommandRefused.
        """
        return self._commands.call(lambda: self._run(command), COMMAND_SECONDS)

    def _run(self, command: Callable[[], T]) -> T:
        try:
            return command()
        except (StoreError, OSError) as error:
            self._knowledge.stale = True  # nobody knows how far it came
            self._health.judge("learning", error)
            raise

    # -- the thread -----------------------------------------------------------------------------------------------

    def loop(self, stopping: threading.Event) -> None:
        """Until `stopping`: everything that is staged, then waits for `notify`."""
        try:
            self._loop(stopping)
        finally:
            self._commands.close()

    def _loop(self, stopping: threading.Event) -> None:
        failure: Exception | None = None
        while not stopping.is_set():
            self._wake.clear()
            self._commands.run_waiting()
            try:
                if failure is not None or self._knowledge.stale:
                    self._recover(failure)
                found, failure = self.step(), None
                found |= self._predictions.write_kept()
                self._failed.clear()
                self._health.clear("learning")
            except Exception as error:  # noqa: BLE001 - the edge: neither a batch nor a full disk must end the thread
                self._report(error)
                found, failure = False, error
            if not found:
                self._wake.wait(timeout=1.0)

    def step(self) -> bool:
        """Takes one staged batch to its state; False when there was none."""
        self.busy = True  # until what follows from the batch is done too, after it has its state
        try:
            with self.database.write() as session:
                row = ledger.claim(session)
                hit("claim.commit")
            if row is not None:
                hit("claim.committed")
                self._process(row)
            return row is not None
        finally:
            self.busy = False

    def _process(self, row: BatchRow) -> None:
        try:
            self._lessons.process(row)
        except Exception as error:
            self._failed[row.id] += may_be_the_batchs(error)
            raise

    # -- failures -------------------------------------------------------------------------------------------------

    def _report(self, error: Exception) -> None:
        if self._health.blame("learning", error) == "failed":
            log.exception("learning_failed")

    def _recover(self, failure: Exception | None) -> None:
        """After a failure: the batch is tried again, and given up at the third time unless it was the disk's fault."""
        with self.database.write() as session:
            for row in ledger.list_batches(session, "training"):
                if self._failed[row.id] < MAX_ATTEMPTS:
                    continue
                if failure is not None and lacks_memory(failure):
                    ledger.suspend(session, row.id, NO_MEMORY, f"not enough memory to learn it, {MAX_ATTEMPTS} times")
                else:
                    reason = f"learning_failed: {MAX_ATTEMPTS} attempts failed; the log has the traceback"
                    ledger.finish(session, row.id, ledger.Outcome("quarantined", reason=reason))
            ledger.release_claims(session)
        if self._knowledge.stale:
            self._reload()

    def _reload(self) -> None:
        """After a failure, what is in memory may be behind the store, or before it: only the store is right.

        Queries are answered by what was served before, until all is there again.
        """
        self._knowledge.standing = self.predictor
        try:
            self.load()
        except BaseException:
            self._knowledge.stale = True  # it may have come half the way
            raise
        self._knowledge.standing = None
