"""What happens to one batch: read, then learned or scored, or refused; and how all is rebuilt from the store.

All of it runs in the learning thread.
"""

from __future__ import annotations

import math
import time
from dataclasses import replace
from functools import partial

import numpy as np
import structlog

from storage import cursors, decisions, ledger, networks, tasks
from storage.db import Database
from storage.failpoints import hit
from storage.models import BatchRow
from storage.spool import Spool, SpoolCorrupt
from streams.batch import Batch, BatchRejected
from streams.decoder import Decoder
from streams.tasks import told_task
from supsupd import attractors, persistence, scenarios, tracing
from supsupd.buckets import Buckets
from supsupd.config import Settings
from supsupd.engine import Engine
from supsupd.founding import found_network, wants_more_rows
from supsupd.knowledge import Knowledge
from supsupd.learning.device import Device, lacks_memory
from supsupd.learning.labels import ClassList, LabelMismatch
from supsupd.learning.learner import Samples, derive_seed
from supsupd.learning.normalise import ShapeMismatch
from supsupd.learning.records import Change, LabelledBatch, TaskRecord
from supsupd.persistence import TakenRows
from supsupd.predictions import Predictions
from supsupd.scoring import score, show
from supsupd.sections import LearningSettings
from supsupd.staging import discard, drop

LEARNING_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
NO_MEMORY = "no_memory"
NO_TASK = "no task is known yet; it is scored as soon as there is one"


class OutOfService(Exception):
    """A batch names a task that can neither learn nor answer until its mask is mended."""


log = structlog.get_logger("supsupd.learning")


class Lessons:
    """Brings claimed batches to their state.

    Args:
        settings: the whole configuration.
        database, spool: the store.
        device: where masks are trained and run.
        decoder: reads the bytes of batches.
        knowledge: what was learned; the batches change it.
        predictions: what is told of unlabelled batches beside the ledger.
    """

    def __init__(
        self,
        settings: Settings,
        database: Database,
        spool: Spool,
        device: Device,
        decoder: Decoder,
        knowledge: Knowledge,
        predictions: Predictions,
    ) -> None:
        self._settings = settings
        self._database = database
        self._spool = spool
        self._device = device
        self._decoder = decoder
        self._knowledge = knowledge
        self._predictions = predictions
        self.training = Buckets(LEARNING_SECONDS)
        """Seconds from the claim of a labelled batch to its state."""

    def load(self, crashed: bool = False) -> None:
        """Rebuilds all from the store: the network, every task, the provisional tasks.

        `crashed`: a batch that is in training died with the process. Raises NetworkMismatch, StoreError.
        """
        self._knowledge.forget()
        with self._database.write() as session:
            released = ledger.release_claims(session, crashed)
            suspended = [row.id for row in ledger.list_batches(session, "suspended")]
            row = networks.get_network(session)
            records: list[TaskRecord] = []
            damaged: dict[int, str] = {}
            if row is not None:
                scenarios.check_stored(row, self._settings)
                stored = persistence.load_network(row, self._device, self._settings.network.pretrained)
                engine = self._knowledge.start_engine(*stored)
                engine.warn_of_ignored_settings()
                if self._settings.reservoir.enabled:
                    engine.hold(attractors.load_reservoir(session, engine.network))
                records, damaged = persistence.load_tasks(
                    session, engine.network, engine.bank, engine.learner.learner.active_tasks
                )
                released += ledger.release_waiting(session, labelled=True)
            if records:
                released += ledger.release_waiting(session, labelled=False)
            hit("start.released")
        if row is not None:
            engine = self._knowledge.loaded
            engine.begin_without(damaged)
            engine.learner.restore_tasks(records)
            engine.serve(*records)
            self._serve_merged()
            self._rebuild_provisionals(engine)
            self._knowledge.stale = False
            self._resume_reconsidering()
        self._knowledge.stale = False
        if suspended and crashed:
            log.error("batches_suspended", batches=suspended, advice="supsup-cli batches rejected tells more")
        log.info("loaded", tasks=len(records), released=released)

    def _serve_merged(self) -> None:
        """The tasks that were merged into others are answered for by those."""
        with self._database.read() as session:
            merges = tasks.load_merges(session)
        for task_id, into in merges.items():
            self._knowledge.loaded.withdraw(task_id, into)

    def _rebuild_provisionals(self, engine: Engine) -> None:
        with self._database.read() as session:
            unsure = [row for row in ledger.list_unsure(session) if row.provisional is not None]
            taken = {row.id: persistence.taken_rows(session, row) for row in unsure}
        unsure.sort(key=lambda row: taken[row.id].turn)  # as they joined
        groups: dict[int, list[BatchRow]] = {}
        for row in unsure:
            groups.setdefault(row.provisional or 0, []).append(row)
        # In the order of their newest members, as they were touched.
        for number, rows in sorted(groups.items(), key=lambda item: taken[item[1][-1].id].turn):
            try:
                self._rebuild(engine, number, rows, taken)
            except Exception as error:
                if not lacks_memory(error):
                    raise
                self._set_aside(rows)

    def _rebuild(self, engine: Engine, number: int, rows: list[BatchRow], taken: dict[int, TakenRows]) -> None:
        members = []
        for row in rows:
            try:
                batch, _ = self._labelled(row, self._read(row), engine)
            except (BatchRejected, SpoolCorrupt) as refusal:
                if isinstance(refusal, BatchRejected) and refusal.code == "oom":  # it was read once: it is the machine
                    self._set_aside([row])
                else:
                    self._quarantine(row, refusal)
                continue
            members.append(taken[row.id].of(batch))
        if members:
            rebuild = partial(engine.learner.rebuild, number, members, len(engine.classes))
            engine.learner.restore_provisional(self._knowledge.sound(rebuild))

    def _set_aside(self, rows: list[BatchRow]) -> None:
        """There is not enough memory to learn these batches: an operator may send them in again where there is."""
        ids = [row.id for row in rows]
        with self._database.write() as session:
            for batch_id in ids:
                ledger.suspend(session, batch_id, NO_MEMORY, "there was not enough memory to learn it")
        log.error("batches_suspended", batches=ids, reason=NO_MEMORY, advice="supsup-cli batches rejected tells more")

    def _resume_reconsidering(self) -> None:
        """Goes on where a crash came between the commit of a new task and those of the batches that it explains.

        If the last step found a task, or set one back, and was not interrupted, there is nothing left to reconsider.
        """
        with self._database.read() as session:
            newest = ledger.newest_learned(session)
            unfinished = newest is not None and persistence.may_explain_more(session, newest)
        if unfinished:
            self._knowledge.reconsider()

    def drop(self, batch_id: int) -> None:
        """Gives a batch up whatever it waits for: its bytes go, its row stays; its provisional task goes on without it.

        Between two batches: one whose turn failed may be in training still. Raises BatchUnknown, LedgerConflict,
        StoreError, OSError.
        """
        row = drop(self._database, self._spool, batch_id)
        if row is None or row.provisional is None or self._knowledge.stale:  # then all is rebuilt anyway
            return
        self._knowledge.stale = True  # until it has gone from memory too
        engine = self._knowledge.loaded
        engine.learner.forget_provisionals()
        self._rebuild_provisionals(engine)
        self._knowledge.stale = False

    # -- one batch ------------------------------------------------------------------------------------------------

    def process(self, row: BatchRow) -> None:
        """Takes a claimed batch to its state, and does what follows from it."""
        bound = structlog.contextvars.bound_contextvars(batch=row.id, source=row.source)
        with bound, tracing.span("batch", batch=row.id, source=row.source):
            self._process(row)

    def _process(self, row: BatchRow) -> None:
        began = time.perf_counter()
        try:
            batch = self._read(row)
            if batch.y is None:
                self._knowledge.sound(partial(self._score, row, batch))
            else:
                self._learn(row, batch)
                self.training.add(time.perf_counter() - began)
        except (BatchRejected, SpoolCorrupt) as refusal:
            self._quarantine(row, refusal)
        except OutOfService as reason:
            self._leave_waiting(row, str(reason))

    def _read(self, row: BatchRow) -> Batch:
        """Raises SpoolCorrupt, BatchRejected."""
        assert row.sha256 is not None
        batch = self._decoder.decode(self._spool.load(row.sha256), "npz" if row.form is None else row.form)
        hit("learn.decoded")
        task = told_task(batch.task, batch.y is not None, row.name, self._settings.recognition.task_rule)
        return drawn(replace(batch, task=task), self._settings.learning)

    def _learn(self, row: BatchRow, batch: Batch) -> None:
        if self._knowledge.engine is None and not self._found_network(row, batch):
            return
        engine = self._knowledge.loaded
        change, classes = self._knowledge.sound(partial(self._consider, row, batch, engine))
        hit("learn.trained")
        self._knowledge.sound(partial(self._knowledge.store, change, classes, newest=True))
        if change.may_explain_more:
            self._knowledge.reconsider()
        if change.kind == "new":
            self._take_up_waiting()

    def _consider(self, row: BatchRow, batch: Batch, engine: Engine) -> tuple[Change, ClassList]:
        """What a labelled batch does, and the class list that it needs. Raises BatchRejected, OutOfService."""
        labelled, classes = self._labelled(row, batch, engine)
        return engine.learner.consider(labelled, len(classes), self._knowledge.found_lately(labelled.origin)), classes

    def _labelled(self, row: BatchRow, batch: Batch, engine: Engine) -> tuple[LabelledBatch, ClassList]:
        """Normalises and encodes a batch; the class list that it needs comes too.

        Raises BatchRejected, OutOfService.
        """
        assert batch.y is not None
        assert row.sha256 is not None
        try:
            x = engine.normaliser(batch.x)
            classes = engine.classes.extended(batch.y)
        except ShapeMismatch as error:
            raise BatchRejected("schema_mismatch", str(error)) from None
        except LabelMismatch as error:
            raise BatchRejected("bad_labels", str(error)) from None
        samples = Samples.of(x, classes.encode(batch.y), self._device)
        came = None if row.samples == len(samples) else row.samples
        labelled = LabelledBatch(
            row.id,
            row.sha256,
            samples,
            batch.task,
            self._given_id(batch),
            content=batch.sha256(),
            origin=row.origin,
            came=came,
            size=row.size,
        )
        return labelled, classes

    def _given_id(self, batch: Batch) -> int | None:
        """The task that the batch names, if it does and there is one.

        Raises BatchRejected for a retired task, OutOfService.
        """
        if batch.task is None:
            return None
        with self._database.read() as session:
            given_id = scenarios.find_given(session, batch.task)
        engine = self._knowledge.engine
        if engine is not None and given_id in engine.out_of_service:
            raise OutOfService(f"waiting until task {given_id} is mended: {engine.out_of_service[given_id]}")
        return given_id

    # -- the first batches ----------------------------------------------------------------------------------------

    def _found_network(self, row: BatchRow, batch: Batch) -> bool:
        """Makes the network that fits the first labelled batches; False while its normalisation wants more rows."""
        settings = self._settings.network
        waiting = self._waiting_labelled() if settings.normalisation == "feature" else []
        batches = [b for _, b in waiting if b.x.shape[1:] == batch.x.shape[1:]] + [batch]
        if wants_more_rows(settings, batches):
            self._leave_waiting(row, f"waiting for {settings.feature_rows} rows to set the normalisation")
            return False
        spare = scenarios.spare_outputs(self._settings.recognition.objective)
        network, normaliser, classes = found_network(settings, self._settings.learning, batches, self._device, spare)
        self._knowledge.stale = True
        with self._database.write() as session:
            persistence.save_network(session, network, normaliser, classes, scenarios.to_stored(self._settings))
        self._knowledge.start_engine(network, normaliser, classes).begin_reservoir()
        self._knowledge.stale = False
        log.info("network_made", widths=network.architecture.widths, seed=settings.seed, sha256=network.sha256)
        for waiting_row, _ in waiting:
            self.process(waiting_row)
        return True

    def _waiting_labelled(self) -> list[tuple[BatchRow, Batch]]:
        with self._database.read() as session:
            rows = [r for r in ledger.list_unsure(session) if r.provisional is None and r.labelled]
        waiting = []
        for row in rows:
            try:
                waiting.append((row, self._read(row)))
            except (BatchRejected, SpoolCorrupt) as refusal:
                self._quarantine(row, refusal)
        return waiting

    def _take_up_waiting(self) -> None:
        """The unlabelled batches that came before there was a task have their turns now, before all that is staged."""
        with self._database.write() as session:
            ledger.release_waiting(session, labelled=False)

    def _leave_waiting(self, row: BatchRow, reason: str) -> None:
        with self._database.write() as session:
            ledger.finish(session, row.id, ledger.Outcome("unsure", decision="unsure", reason=reason))

    # -- unlabelled and refused -----------------------------------------------------------------------------------

    def _score(self, row: BatchRow, batch: Batch) -> None:
        """Predicts an unlabelled batch and records what was inferred; nothing is trained."""
        predictor = self._knowledge.predictor
        if predictor is None or not predictor.tasks:
            self._leave_waiting(row, NO_TASK)
            return
        place = None
        if batch.task is not None:
            given_id = self._given_id(batch)
            place = None if given_id is None else predictor.place_of(given_id)
            if place is None:
                self._leave_waiting(row, f"task {batch.task} is not known yet; it is scored as soon as it is")
                return
        scored = score(predictor, batch, place)
        shown = show(predictor, scored.answer) if self._predictions.wanted else b""
        is_written = self._predictions.write(row, shown)
        outcome = ledger.Outcome("scored", scored.task_id, None, scored.kind, scored.reason)
        with self._database.write() as session:
            ledger.finish(session, row.id, outcome)
            decision = decisions.Decision(scored.kind, scored.task_id, scored.evidence, scored.reason)
            decisions.record(session, row.id, decision)
            if not is_written:
                self._predictions.keep(session, row, shown)
            hit("score.commit")
        assert row.sha256 is not None
        discard(self._database, self._spool, [row.sha256])
        log.info("batch_scored", batch=row.id, name=row.name, task=scored.task_id, decision=scored.kind)

    def _quarantine(self, row: BatchRow, refusal: BatchRejected | SpoolCorrupt) -> None:
        """Its bytes stay, for an operator to look at. Where they are damaged, the same content may come again."""
        with self._database.write() as session:
            ledger.finish(session, row.id, ledger.Outcome("quarantined", reason=str(refusal)))
            if isinstance(refusal, SpoolCorrupt):
                ledger.forget_content(session, row.id)
                cursors.forget(session, row.source, row.name)
            hit("reject.commit")
        hit("reject.committed")
        log.warning("batch_rejected", batch=row.id, source=row.source, name=row.name, reason=str(refusal))


def drawn(batch: Batch, learning: LearningSettings) -> Batch:
    """A labelled batch itself, or where it has more rows than are learned, so many of them, in order.

    Which ones depends on what the batch holds and on nothing else.
    """
    most = learning.most_rows(math.prod(batch.x.shape[1:]))
    if batch.y is None or len(batch.x) <= most:
        return batch
    draw = np.random.Generator(np.random.Philox(derive_seed(learning.seed, "rows", batch.sha256())))
    rows = np.sort(draw.choice(len(batch.x), most, replace=False))
    return replace(batch, x=batch.x[rows], y=batch.y[rows])
