"""The learning side of the daemon: takes staged batches one by one, learns or scores them, stores, swaps.

One thread runs `step`. Everything that it does to the masks goes through one transaction; only after it the predictor
is replaced, so that nothing is ever served that a crash could take back.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import structlog

from storage import decisions, ledger, networks
from storage.db import Database, StoreError
from storage.models import BatchRow
from storage.spool import Spool, SpoolCorrupt
from streams.batch import Batch, BatchRejected
from streams.formats import Limits, decode
from supsupd import persistence
from supsupd.config import Settings
from supsupd.founding import found_network, wants_more_rows
from supsupd.learning.continual import Change, ContinualLearner, LabelledBatch, Member, TaskRecord
from supsupd.learning.device import Device
from supsupd.learning.inference import Scorer
from supsupd.learning.labels import ClassList, LabelMismatch
from supsupd.learning.learner import Samples
from supsupd.learning.network import Network
from supsupd.learning.normalise import Normaliser, ShapeMismatch
from supsupd.learning.predictor import Predictor, ServedTask
from supsupd.scoring import score, write_predictions

MAX_ATTEMPTS = 3
NO_TASK = "no task is known yet; it is scored as soon as there is one"

log = structlog.get_logger("supsupd.learning")


@dataclass
class Engine:
    """What exists once a network does; replaced as a whole, never half."""

    network: Network
    normaliser: Normaliser
    classes: ClassList
    learner: ContinualLearner


class Worker:
    """Learns staged batches.

    Args:
        settings: the whole configuration.
        database, spool: the store.
        device: where masks are trained and run.
    """

    def __init__(self, settings: Settings, database: Database, spool: Spool, device: Device) -> None:
        self.settings = settings
        self.database = database
        self.spool = spool
        self.device = device
        self.predictor: Predictor | None = None
        self.learned = 0
        self.busy = False
        self._engine: Engine | None = None
        self._wake = threading.Event()

    # -- lifecycle ------------------------------------------------------------------------------------------------

    def load(self) -> None:
        """Rebuilds all from the store: the network, every task, the provisional tasks. Raises NetworkMismatch,
        MaskCorrupt."""
        with self.database.write() as session:
            released = ledger.release_claims(session)
            row = networks.get_network(session)
            self.spool.clean(keep=ledger.list_spooled(session))
            records = []
            if row is not None:
                self._start_engine(*persistence.load_network(row, self.device))
                self._warn_of_ignored_settings()
                records = persistence.load_tasks(session, self._loaded.network)
                released += ledger.release_waiting(session, labelled=True)
            if records:
                released += ledger.release_waiting(session, labelled=False)
        for record in records:
            self._loaded.learner.restore_task(record)
            self._serve(record)
        if self._engine is not None:
            self._rebuild_provisionals(self._engine)
            self._resume_reconsidering()
        log.info("loaded", tasks=len(records), released=released)

    @property
    def _loaded(self) -> Engine:
        assert self._engine is not None
        return self._engine

    def _warn_of_ignored_settings(self) -> None:
        asked, engine = self.settings.network, self._loaded
        stored = (engine.network.architecture.hidden, engine.network.seed, engine.normaliser.rule)
        if stored != (tuple(asked.hidden), asked.seed, asked.normalisation):
            log.warning("network_settings_ignored", reason="a network never changes", in_use=stored)

    def _start_engine(self, network: Network, normaliser: Normaliser, classes: ClassList) -> None:
        recognition, learning = self.settings.recognition, self.settings.learning
        scorer = Scorer(network, learning.threads)
        scorer.warm_up()
        learner = ContinualLearner(network, scorer, learning, recognition)
        self._engine = Engine(network, normaliser, classes, learner)
        self.predictor = Predictor(
            scorer, normaliser, classes, recognition.inference, recognition.evidence, recognition.false_alarm
        )

    def _rebuild_provisionals(self, engine: Engine) -> None:
        with self.database.read() as session:
            unsure = [row for row in ledger.list_unsure(session) if row.provisional is not None]
            taken = {row.id: persistence.member_rows(session, row) for row in unsure}
        groups: dict[int, list[Member]] = {}
        for row in unsure:
            try:
                batch, _ = self._labelled(row, self._read(row), engine)
            except (BatchRejected, SpoolCorrupt) as refusal:
                self._quarantine(row, str(refusal))
                continue
            groups.setdefault(row.provisional or 0, []).append(Member(batch, *taken[row.id]))
        # In the order of their newest members, as they were touched.
        for number, members in sorted(groups.items(), key=lambda item: item[1][-1].batch.batch_id):
            engine.learner.restore_provisional(engine.learner.rebuild(number, members, len(engine.classes)))

    def _resume_reconsidering(self) -> None:
        """Goes on where a crash came between the commit of a new task and those of the batches that it explains.

        If the last step found a task and was not interrupted, there is nothing left to reconsider.
        """
        with self.database.read() as session:
            newest = ledger.newest_learned(session)
        if newest is not None and newest.decision == "new":
            self._reconsider()

    def notify(self) -> None:
        """There is something new to learn."""
        self._wake.set()

    def loop(self, stopping: threading.Event) -> None:
        """Until `stopping`: everything that is staged, then waits for `notify`."""
        failure: Exception | None = None
        while not stopping.is_set():
            self._wake.clear()
            try:
                if failure is not None:
                    self._set_aside(failure)
                found, failure = self.step(), None
            except Exception as error:  # the edge: neither one batch nor a full disk must end the thread
                log.exception("learning_failed")
                found, failure = False, error
            if not found:
                self._wake.wait(timeout=1.0)

    def step(self) -> bool:
        """Takes one staged batch to its state; False when there was none."""
        self.busy = True  # until what follows from the batch is done too, after it has its state
        try:
            with self.database.write() as session:
                row = ledger.claim(session)
            if row is not None:
                self._process(row)
            return row is not None
        finally:
            self.busy = False

    def _set_aside(self, failure: Exception) -> None:
        """After a failure: the batch is tried again, and given up at the third time unless it was the disk's fault."""
        hopeless = not isinstance(failure, StoreError | OSError)
        with self.database.write() as session:
            for row in ledger.list_batches(session, state="training"):
                if hopeless and row.attempts >= MAX_ATTEMPTS:
                    reason = f"learning_failed: {row.attempts} attempts failed; the log has the traceback"
                    ledger.finish(session, row.id, ledger.Outcome("quarantined", reason=reason))
            ledger.release_claims(session)

    # -- one batch ------------------------------------------------------------------------------------------------

    def _process(self, row: BatchRow) -> None:
        try:
            batch = self._read(row)
            if batch.y is None:
                self._score(row, batch)
            else:
                self._learn(row, batch)
        except (BatchRejected, SpoolCorrupt) as refusal:
            self._quarantine(row, str(refusal))

    def _read(self, row: BatchRow) -> Batch:
        """Raises SpoolCorrupt, BatchRejected."""
        assert row.sha256 is not None
        return decode(self.spool.load(row.sha256), Limits(bytes=self.settings.intake.max_unpacked_bytes))

    def _learn(self, row: BatchRow, batch: Batch) -> None:
        if self._engine is None and not self._found_network(row, batch):
            return
        engine = self._loaded
        labelled, classes = self._labelled(row, batch, engine)
        change = engine.learner.consider(labelled, len(classes))
        self._store(change, classes)
        if change.kind == "new":
            self._reconsider()
            self._take_up_waiting()

    def _reconsider(self) -> None:
        """Decides the unsure batches that the tasks explain by now."""
        engine = self._loaded
        while (change := engine.learner.reconsider(len(engine.classes))) is not None:
            self._store(change, engine.classes)

    def _labelled(self, row: BatchRow, batch: Batch, engine: Engine) -> tuple[LabelledBatch, ClassList]:
        """Normalises and encodes a batch; the class list that it needs comes too. Raises BatchRejected."""
        assert batch.y is not None
        assert row.sha256 is not None
        try:
            x = engine.normaliser(batch.x)
            classes = engine.classes.extended(batch.y)
        except ShapeMismatch as error:
            raise BatchRejected("schema_mismatch", str(error)) from None
        except LabelMismatch as error:
            raise BatchRejected("bad_labels", str(error)) from None
        samples = Samples.of(x, classes.encode(batch.y), self.device)
        return LabelledBatch(row.id, row.sha256, samples), classes

    def _store(self, change: Change, classes: ClassList) -> None:
        """One transaction, then the engine and the served snapshot take it over."""
        engine = self._loaded
        with self.database.write() as session:
            if classes != engine.classes:
                networks.extend_classes(session, list(classes.labels))
            change = persistence.store_change(session, change, self.settings.learning.active_tasks)
        engine.classes = classes
        engine.learner.apply(change)
        if change.task is not None:
            self._serve(change.task)
            self.learned += len(change.assigned)
        for done in (*(member.batch for member in change.assigned), *change.given_up):
            self.spool.remove(done.sha256)
        _log_change(change)

    def _serve(self, task: TaskRecord) -> None:
        assert self.predictor is not None
        gauge = task.reference.evidence[self.settings.recognition.evidence]
        served = ServedTask(task.task_id, task.version, task.packed, gauge)
        self.predictor = self.predictor.with_mask(served, self._loaded.classes)

    # -- the first batches ----------------------------------------------------------------------------------------

    def _found_network(self, row: BatchRow, batch: Batch) -> bool:
        """Makes the network that fits the first labelled batches; False while its normalisation wants more rows."""
        settings = self.settings.network
        waiting = self._waiting_labelled() if settings.normalisation == "feature" else []
        batches = [b for _, b in waiting if b.x.shape[1:] == batch.x.shape[1:]] + [batch]
        if wants_more_rows(settings, batches):
            self._leave_waiting(row, f"waiting for {settings.feature_rows} rows to set the normalisation")
            return False
        network, normaliser, classes = found_network(settings, batches, self.device)
        with self.database.write() as session:
            persistence.save_network(session, network, normaliser, classes)
        self._start_engine(network, normaliser, classes)
        log.info("network_made", widths=network.architecture.widths, seed=settings.seed, sha256=network.sha256)
        for waiting_row, _ in waiting:
            self._process(waiting_row)
        return True

    def _waiting_labelled(self) -> list[tuple[BatchRow, Batch]]:
        with self.database.read() as session:
            rows = [r for r in ledger.list_unsure(session) if r.provisional is None and r.labelled]
        waiting = []
        for row in rows:
            try:
                waiting.append((row, self._read(row)))
            except (BatchRejected, SpoolCorrupt) as refusal:
                self._quarantine(row, str(refusal))
        return waiting

    def _take_up_waiting(self) -> None:
        """Scores the unlabelled batches that came before there was a task."""
        with self.database.read() as session:
            rows = [r for r in ledger.list_unsure(session) if r.provisional is None and not r.labelled]
        for row in rows:
            self._process(row)

    def _leave_waiting(self, row: BatchRow, reason: str) -> None:
        with self.database.write() as session:
            ledger.finish(session, row.id, ledger.Outcome("unsure", decision="unsure", reason=reason))

    # -- unlabelled and refused -----------------------------------------------------------------------------------

    def _score(self, row: BatchRow, batch: Batch) -> None:
        """Predicts an unlabelled batch and records what was inferred; nothing is trained."""
        predictor = self.predictor
        if predictor is None or not predictor.tasks:
            self._leave_waiting(row, NO_TASK)
            return
        scored = score(predictor, batch)
        if self.settings.predictions is not None:
            write_predictions(self.settings.predictions, row.name, predictor, scored.answer)
        outcome = ledger.Outcome("scored", scored.task_id, None, scored.kind, scored.reason)
        with self.database.write() as session:
            ledger.finish(session, row.id, outcome)
            decisions.record(session, row.id, scored.kind, scored.task_id, scored.evidence)
        self._forget(row)
        log.info("batch_scored", batch=row.id, name=row.name, task=scored.task_id, decision=scored.kind)

    def _quarantine(self, row: BatchRow, reason: str) -> None:
        with self.database.write() as session:
            ledger.finish(session, row.id, ledger.Outcome("quarantined", reason=reason))
        self._forget(row)
        log.warning("batch_quarantined", batch=row.id, name=row.name, reason=reason)

    def _forget(self, row: BatchRow) -> None:
        assert row.sha256 is not None
        self.spool.remove(row.sha256)


def _log_change(change: Change) -> None:
    batch = change.assigned[-1].batch if change.assigned else None
    if change.kind == "new" and change.task is not None:
        log.info("task_found", task=change.task.task_id, batches=[m.batch.batch_id for m in change.assigned])
    elif batch is not None and change.task is not None:
        log.info("batch_learned", batch=batch.batch_id, task=change.task.task_id, version=change.task.version)
    elif change.provisional is not None:
        member = change.provisional.members[-1].batch
        log.info("batch_unsure", batch=member.batch_id, provisional=change.provisional.provisional_id)
    for given_up in change.given_up:
        log.warning("batch_given_up", batch=given_up.batch_id)
