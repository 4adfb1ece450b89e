"""The learning side of the daemon: takes staged batches one by one, learns or scores them, stores, swaps.

One thread runs `step`. Everything that it does to the masks goes through one transaction; only after it the predictor
is replaced, so that nothing is ever served that a crash could take back.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

import structlog

from storage import decisions, ledger, networks, tasks
from storage.db import Database, StoreError
from storage.models import BatchRow, utc_now
from storage.spool import Spool, SpoolCorrupt
from streams.batch import Batch, BatchRejected
from streams.formats import Limits
from streams.tasks import accept
from supsupd import attractors, persistence, scenarios
from supsupd.commands import CommandQueue
from supsupd.config import Settings
from supsupd.engine import Engine
from supsupd.founding import found_network, wants_more_rows
from supsupd.learning.device import Device
from supsupd.learning.labels import ClassList, LabelMismatch
from supsupd.learning.learner import Samples
from supsupd.learning.network import Network
from supsupd.learning.normalise import Normaliser, ShapeMismatch
from supsupd.learning.predictor import Predictor
from supsupd.learning.records import Change, LabelledBatch, Member
from supsupd.learning.reservoir import Reservoir
from supsupd.scoring import score, write_predictions

if TYPE_CHECKING:
    from storage.db import Session

MAX_ATTEMPTS = 3
COMMAND_SECONDS = 45.0
"""How long a command waits for its turn: less than clients wait for an answer."""
NO_TASK = "no task is known yet; it is scored as soon as there is one"

T = TypeVar("T")

log = structlog.get_logger("supsupd.learning")


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
        self.learned = 0
        self.busy = False
        self._engine: Engine | None = None
        self._wake = threading.Event()
        self._commands = CommandQueue(self.notify)
        self._watched: set[str] = set()

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
                scenarios.check_stored(row, self.settings)
                self._start_engine(*persistence.load_network(row, self.device, self.settings.network.pretrained))
                self._loaded.warn_of_ignored_settings()
                if self.settings.reservoir.enabled:
                    self._loaded.hold(attractors.load_reservoir(session, self._loaded.network))
                records = persistence.load_tasks(session, self._loaded.network, self._loaded.bank)
                released += ledger.release_waiting(session, labelled=True)
            if records:
                released += ledger.release_waiting(session, labelled=False)
        if self._engine is not None:
            self._engine.learner.restore_tasks(records)
            self._engine.serve(*records)
            self._serve_merged()
            self._rebuild_provisionals(self._engine)
            self._resume_reconsidering()
        log.info("loaded", tasks=len(records), released=released)

    def _serve_merged(self) -> None:
        """The tasks that were merged into others are answered for by those."""
        with self.database.read() as session:
            merges = tasks.load_merges(session)
        for task_id, into in merges.items():
            self._loaded.withdraw(task_id, into)

    @property
    def predictor(self) -> Predictor | None:
        """What answers queries; None before there is a network."""
        return None if self._engine is None else self._engine.predictor

    @property
    def masks_in_memory(self) -> dict[str, int]:
        """How many, and their bytes."""
        bank = self._engine.bank if self._engine is not None else None
        return {"count": len(bank), "bytes": bank.nbytes} if bank is not None else {"count": 0, "bytes": 0}

    @property
    def engine(self) -> Engine | None:
        """Only the learning thread may change what is in it."""
        return self._engine

    @property
    def _loaded(self) -> Engine:
        assert self._engine is not None
        return self._engine

    def _start_engine(self, network: Network, normaliser: Normaliser, classes: ClassList) -> None:
        self._engine = Engine.start(self.settings, self.database, network, normaliser, classes)
        self._engine.load_features(self.database)

    def _rebuild_provisionals(self, engine: Engine) -> None:
        with self.database.read() as session:
            unsure = [row for row in ledger.list_unsure(session) if row.provisional is not None]
            taken = {row.id: persistence.taken_rows(session, row) for row in unsure}
        unsure.sort(key=lambda row: taken[row.id].turn)  # as they joined
        groups: dict[int, list[Member]] = {}
        for row in unsure:
            try:
                batch, _ = self._labelled(row, self._read(row), engine)
            except (BatchRejected, SpoolCorrupt) as refusal:
                self._quarantine(row, str(refusal))
                continue
            groups.setdefault(row.provisional or 0, []).append(taken[row.id].of(batch))
        # In the order of their newest members, as they were touched.
        for number, members in sorted(groups.items(), key=lambda item: taken[item[1][-1].batch.batch_id].turn):
            engine.learner.restore_provisional(engine.learner.rebuild(number, members, len(engine.classes)))

    def _resume_reconsidering(self) -> None:
        """Goes on where a crash came between the commit of a new task and those of the batches that it explains.

        If the last step found a task, or set one back, and was not interrupted, there is nothing left to reconsider.
        """
        with self.database.read() as session:
            newest = ledger.newest_learned(session)
            unfinished = newest is not None and persistence.may_explain_more(session, newest)
        if unfinished:
            self._reconsider()

    def notify(self) -> None:
        """There is something new to learn."""
        self._wake.set()

    def call(self, command: Callable[[], T]) -> T:
        """What `command` gives, or raises, in the learning thread, between two batches: only that one changes masks.

        Raises CommandRefused.
        """
        return self._commands.call(command, COMMAND_SECONDS)

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
        limits = Limits(bytes=self.settings.intake.max_unpacked_bytes)
        _, batch = accept(self.spool.load(row.sha256), row.name, self.settings.recognition.task_rule, limits)
        return batch

    def _learn(self, row: BatchRow, batch: Batch) -> None:
        if self._engine is None and not self._found_network(row, batch):
            return
        engine = self._loaded
        labelled, classes = self._labelled(row, batch, engine)
        change = engine.learner.consider(labelled, len(classes), self._found_lately())
        self._store(change, classes, newest=True)
        if change.may_explain_more:
            self._reconsider()
        if change.kind == "new":
            self._take_up_waiting()

    def _found_lately(self) -> int:
        """The tasks found in the last hour."""
        with self.database.read() as session:
            return tasks.count_since(session, utc_now() - timedelta(hours=1))

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
        given_id = self._given_id(batch)
        return LabelledBatch(row.id, row.sha256, samples, batch.task, given_id, content=batch.sha256()), classes

    def _given_id(self, batch: Batch) -> int | None:
        """The task that the batch names, if it does and there is one. Raises BatchRejected for a retired task."""
        if batch.task is None:
            return None
        with self.database.read() as session:
            return scenarios.find_given(session, batch.task)

    def _store(self, change: Change, classes: ClassList, newest: bool = False) -> None:
        """One transaction, then the engine and the served snapshot take it over.

        `newest`: the batch is the stream's last one, not one that had been waiting.
        """
        engine = self._loaded
        with self.database.write() as session:
            if classes != engine.classes:
                networks.extend_classes(session, list(classes.labels))
            change = persistence.store_change(session, change, engine.network, self.settings.learning.active_tasks)
            features = engine.features
            if features is not None:
                features = persistence.store_features(session, features, change)
            reservoir = self._finish_left(session, change) if newest else None
        engine.classes, engine.features = classes, features
        engine.learner.apply(change)
        if reservoir is not None:
            engine.hold(reservoir)
            attractors.warn_of_load(reservoir, self.settings.reservoir)
        if change.task is not None:
            engine.serve(change.task)
            self.learned += len(change.assigned)
        self._forget_done(change)
        _log_change(change)

    def _finish_left(self, session: Session, change: Change) -> Reservoir | None:
        """The reservoir with the masks of the tasks that the stream has gone on from; None where nothing changes."""
        engine = self._loaded
        if engine.reservoir is None or change.task is None or not change.assigned:
            return None
        tasks_left = [t for t in engine.learner.tasks.values() if t.task_id != change.task.task_id]
        left = [task for task in tasks_left if not engine.learner.is_finished(task)]
        held = attractors.finish(session, engine.reservoir, left, engine.network)
        return held if held is not engine.reservoir else None

    def _forget_done(self, change: Change) -> None:
        """Drops the bytes of batches that nothing may take back any more.

        What a guard still watches stays in the spool until its window moves on; a restart begins with empty windows.
        """
        learner = self._loaded.learner
        done = {member.batch.sha256 for member in change.assigned} | self._watched
        self._watched = done & learner.guarded()
        waiting = {m.batch.sha256 for p in learner.provisionals.values() for m in p.members}
        for sha256 in (done - self._watched - waiting) | {batch.sha256 for batch in change.given_up}:
            self.spool.remove(sha256)

    # -- the first batches ----------------------------------------------------------------------------------------

    def _found_network(self, row: BatchRow, batch: Batch) -> bool:
        """Makes the network that fits the first labelled batches; False while its normalisation wants more rows."""
        settings = self.settings.network
        waiting = self._waiting_labelled() if settings.normalisation == "feature" else []
        batches = [b for _, b in waiting if b.x.shape[1:] == batch.x.shape[1:]] + [batch]
        if wants_more_rows(settings, batches):
            self._leave_waiting(row, f"waiting for {settings.feature_rows} rows to set the normalisation")
            return False
        spare = scenarios.spare_outputs(self.settings.recognition.objective)
        network, normaliser, classes = found_network(settings, batches, self.device, spare)
        with self.database.write() as session:
            persistence.save_network(session, network, normaliser, classes, scenarios.to_stored(self.settings))
        self._start_engine(network, normaliser, classes)
        self._loaded.begin_reservoir()
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
        place = None
        if batch.task is not None:
            given_id = self._given_id(batch)
            place = None if given_id is None else predictor.place_of(given_id)
            if place is None:
                self._leave_waiting(row, f"task {batch.task} is not known yet; it is scored as soon as it is")
                return
        scored = score(predictor, batch, place)
        if self.settings.predictions is not None:
            write_predictions(self.settings.predictions, row.name, predictor, scored.answer)
        outcome = ledger.Outcome("scored", scored.task_id, None, scored.kind, scored.reason)
        with self.database.write() as session:
            ledger.finish(session, row.id, outcome)
            decision = decisions.Decision(scored.kind, scored.task_id, scored.evidence, scored.reason)
            decisions.record(session, row.id, decision)
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
    if change.recalled and change.task is not None:
        taken_back = [m.batch.batch_id for m in change.recalled]
        log.warning("task_set_back", task=change.task.task_id, version=change.task.version, batches=taken_back)
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
