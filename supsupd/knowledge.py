"""What was learned, in memory as in the store: each change is stored first, and only then taken over and served."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import structlog

from storage import networks
from storage.db import Database
from storage.failpoints import hit
from storage.masks import MaskCorrupt
from storage.spool import Spool
from supsupd import attractors, persistence
from supsupd.config import Settings
from supsupd.engine import Engine
from supsupd.explain import why
from supsupd.learning.labels import ClassList
from supsupd.learning.network import Network
from supsupd.learning.normalise import Normaliser
from supsupd.learning.predictor import Predictor
from supsupd.learning.records import Change
from supsupd.learning.reservoir import Reservoir
from supsupd.staging import discard

if TYPE_CHECKING:
    from storage.db import Session

HOUR_SECONDS = 3600

T = TypeVar("T")

log = structlog.get_logger("supsupd.learning")


class Knowledge:
    """The engine, once there is one, and what else the learning thread keeps in memory beside the store.

    Only that thread changes it, `predictor_without` aside. Everything that it does to the masks goes through one
    transaction; only after it the predictor is replaced, so that nothing is ever served that a crash could take back.

    Args:
        settings: the whole configuration.
        database, spool: the store.

    Attributes:
        engine: None before there is a network.
        standing: answers queries while all is rebuilt.
        stale: memory may be behind the store, or before it.
        learned: batches that tasks took up, since the start.
    """

    def __init__(self, settings: Settings, database: Database, spool: Spool) -> None:
        self.engine: Engine | None = None
        self.standing: Predictor | None = None
        self.stale = False
        self.learned = 0
        self._settings = settings
        self._database = database
        self._spool = spool
        self._watched: set[str] = set()
        self._found: deque[tuple[float, str]] = deque()
        """When tasks were found, in monotonic seconds (the wall clock may jump), and whose batches proved them. A start
        begins anew."""

    def forget(self) -> None:
        """Everything in memory is about to be rebuilt from the store."""
        self.engine = None
        self._watched = set()

    def start_engine(self, network: Network, normaliser: Normaliser, classes: ClassList) -> Engine:
        """One without tasks, which is the engine from now on."""
        self.engine = Engine.start(self._settings, self._database, network, normaliser, classes)
        self.engine.load_features(self._database)
        return self.engine

    @property
    def loaded(self) -> Engine:
        """The engine, where there must be one."""
        assert self.engine is not None
        return self.engine

    @property
    def predictor(self) -> Predictor | None:
        """What answers queries; None before there is a network."""
        if self.standing is not None:
            return self.standing
        return None if self.engine is None else self.engine.predictor

    def predictor_without(self, error: MaskCorrupt, predictor: Predictor) -> Predictor:
        """What answers instead of `predictor`, which came upon a damaged mask. Any thread may call it."""
        if self.engine is not None:
            self.engine.take_out(error.task_id, error.version, str(error))
        newest = self.predictor
        return predictor.without_task(error.task_id) if newest is None or newest is predictor else newest

    def found_lately(self, origin: str) -> int:
        """The tasks found in the last hour by what one source or sender sent."""
        while self._found and time.monotonic() - self._found[0][0] >= HOUR_SECONDS:
            self._found.popleft()
        return sum(whose == origin for _, whose in self._found)

    def sound(self, work: Callable[[], T]) -> T:
        """What `work` gives, done again without every task whose mask it finds damaged."""
        while True:
            try:
                return work()
            except MaskCorrupt as error:
                if not self._leave_out(error):
                    raise

    def _leave_out(self, error: MaskCorrupt) -> bool:
        """Takes a task with a damaged mask out of service, or forgets the earlier one that it might be set back to.

        False where nobody had it.
        """
        learner = self.loaded.learner
        taken = self.loaded.take_out(error.task_id, error.version, str(error))
        task = learner.tasks.get(error.task_id)
        if task is None or task.version != error.version:
            return learner.forget_guard(error.task_id) or taken
        learner.forget_task(error.task_id)
        return True

    def reconsider(self) -> None:
        """Decides the unsure batches that the tasks explain by now."""
        engine = self.loaded
        while (change := self.sound(lambda: engine.learner.reconsider(len(engine.classes)))) is not None:
            self.sound(partial(self.store, change, engine.classes))

    def store(self, change: Change, classes: ClassList, newest: bool = False) -> None:
        """One transaction, then the engine and the served snapshot take it over.

        `newest`: the batch is the stream's last one, not one that had been waiting.
        """
        engine = self.loaded
        self.stale = True  # until memory and store agree again
        with self._database.write() as session:
            hit("learn.begun")
            if classes != engine.classes:
                networks.extend_classes(session, list(classes.labels))
            change = persistence.store_change(session, change, engine.network, engine.learner.learner.active_tasks)
            features = engine.features
            if features is not None:
                features = persistence.store_features(session, features, change)
            reservoir = self._finish_left(session, change) if newest else None
            hit("learn.commit")
        hit("learn.committed")
        if change.kind == "new":
            self._found.append((time.monotonic(), change.assigned[-1].batch.origin))
        engine.classes, engine.features = classes, features
        engine.learner.apply(change)
        if reservoir is not None:
            engine.hold(reservoir)
            attractors.warn_of_load(reservoir, self._settings.reservoir)
        if change.task is not None:
            engine.serve(change.task)
            self.learned += len(change.assigned)
        self.stale = False
        hit("learn.swapped")
        self._forget_done(change)
        hit("learn.cleaned")
        _log_change(change)

    def _finish_left(self, session: Session, change: Change) -> Reservoir | None:
        """The reservoir with the masks of the tasks that the stream has gone on from; None where nothing changes."""
        engine = self.loaded
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
        learner = self.loaded.learner
        done = {member.batch.sha256 for member in change.assigned} | self._watched
        self._watched = done & learner.guarded()
        waiting = {m.batch.sha256 for p in learner.provisionals.values() for m in p.members}
        discard(self._database, self._spool, done - self._watched - waiting)


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
        log.warning("batch_given_up", batch=given_up.batch_id, reason=why(change, "quarantined"))
