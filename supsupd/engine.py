"""What exists once a network does: the learner, the served snapshot and the bank of masks, kept in step.

Only the learning thread changes an engine; queries read `predictor`, which is replaced whole. One thing any thread may
do is to take a task out of service whose mask it found damaged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from threading import RLock

import numpy as np
import structlog

from storage.db import Database
from supsupd import persistence, scenarios
from supsupd.config import Settings
from supsupd.learning import normalise
from supsupd.learning.bank import Key, MaskBank
from supsupd.learning.features import FeatureModel
from supsupd.learning.inference import Scorer
from supsupd.learning.labels import ClassList
from supsupd.learning.modules import UnsupportedNetwork
from supsupd.learning.network import Network
from supsupd.learning.normalise import Normaliser
from supsupd.learning.predictor import Predictor
from supsupd.learning.queries import ServedTask, Shortlist
from supsupd.learning.records import TaskRecord
from supsupd.learning.reservoir import Recovery, Reservoir
from supsupd.learning.rules import pick_learner
from supsupd.learning.tasks import TaskLearner
from supsupd.learning.transforms import Transforms

log = structlog.get_logger("supsupd.learning")


@lru_cache
def _shared(labels: frozenset[int]) -> frozenset[int]:
    """The same set for all tasks of the same labels: many tasks mostly have the same."""
    return labels


@dataclass
class Engine:
    """The parts; `start` puts them together.

    Args:
        bank: which masks are in memory.
        predictor: answers queries.
        features: what is known of the tasks' inputs, for objective features.
        reservoir: the finished masks as attractors.
        out_of_service: tasks in use that are not served since their newest mask is damaged, and what is wrong with it.
    """

    settings: Settings
    network: Network
    normaliser: Normaliser
    classes: ClassList
    learner: TaskLearner
    bank: MaskBank
    predictor: Predictor
    features: FeatureModel | None = None
    reservoir: Reservoir | None = None
    out_of_service: dict[int, str] = field(default_factory=dict)
    _changing: RLock = field(default_factory=RLock)

    @classmethod
    def start(
        cls, settings: Settings, database: Database, network: Network, normaliser: Normaliser, classes: ClassList
    ) -> Engine:
        """An engine without tasks, its kernels compiled."""
        recognition, learning = settings.recognition, settings.learning
        scorer = Scorer(network, learning.threads, settings.bank.ready_bytes)
        scorer.warm_up()
        normalise.warm_up()
        learner = pick_learner(recognition)(network, scorer, learning, recognition, normaliser.transforms)
        learner.learner.warm_up()
        room = network.architecture.outputs - scenarios.spare_outputs(recognition.objective)
        classes = replace(classes, outputs=room)

        def fetch(keys: Sequence[Key]) -> list[np.ndarray]:
            with database.read() as session:
                return persistence.load_packed(session, keys)

        predictor = Predictor(
            scorer,
            normaliser,
            classes,
            settings.inference,
            recognition.objective,
            recognition.false_alarm,
            labels_shared=recognition.labels_shared,
            shortlist=Shortlist(recognition.shortlist_above, recognition.shortlist),
        )
        bank = MaskBank(settings.bank.memory_bytes, fetch)
        return cls(settings, network, normaliser, classes, learner, bank, predictor)

    def warn_of_ignored_settings(self) -> None:
        """A network never changes, whatever the configuration says by now."""
        asked, architecture = self.settings.network, self.network.architecture
        in_use = {
            "kind": (architecture.kind, asked.kind),
            "hidden": (architecture.hidden, tuple(asked.hidden or architecture.hidden)),
            "channels": (architecture.channels, tuple(asked.channels)),
            "width": (architecture.width, asked.width),
            "norm": (architecture.norm, asked.norm or architecture.norm),
            "seed": (self.network.seed, asked.seed),
            "normalisation": (self.normaliser.rule, asked.normalisation),
            "transforms": (self.normaliser.transforms, Transforms.of(asked.transforms)),
        }
        ignored = {name: stored for name, (stored, wanted) in in_use.items() if stored != wanted}
        if ignored:
            log.warning("network_settings_ignored", reason="a network never changes", in_use=ignored)

    def load_features(self, database: Database) -> None:
        """What is known of the tasks' inputs, where that is kept and the network has features."""
        if not self.settings.recognition.features:
            return
        try:
            FeatureModel(self.network, self.normaliser.transforms).check()
        except UnsupportedNetwork as error:
            log.warning("features_not_kept", reason=str(error))
            return
        with database.read() as session:
            self.features = persistence.load_features(session, self.network, self.normaliser.transforms)

    def hold(self, reservoir: Reservoir) -> None:
        """The masks in the reservoir are finished from now on, and queries may recover them."""
        self.reservoir = self.learner.reservoir = reservoir
        recovery = Recovery(reservoir, self.network, self.settings.reservoir)
        with self._changing:
            self.predictor = replace(self.predictor, recovery=recovery)

    def begin_reservoir(self) -> None:
        """An empty one, where the settings want one."""
        if self.settings.reservoir.enabled:
            self.hold(Reservoir.empty(self.network))

    def serve(self, *tasks: TaskRecord) -> None:
        """Answers queries by these tasks' newest masks from now on."""
        served = [self._served(task) for task in tasks]
        with self._changing:
            self.predictor = replace(self.predictor, features=self.features).with_masks(served, self.classes)
            for task in tasks:
                self.out_of_service.pop(task.task_id, None)

    def _served(self, task: TaskRecord) -> ServedTask:
        if task.mask.key != (task.task_id, task.version):
            self.bank.keep(task.mask, (task.task_id, task.version))
        record = task.reference
        labels = _shared(frozenset(record.labels))
        return ServedTask(task.task_id, task.version, task.mask, record.evidence, labels, task.inputs)

    def withdraw(self, task_id: int, into: int | None = None) -> None:
        """Serves a task no longer; the task `into` answers for it, if there is one."""
        with self._changing:
            self.predictor = self.predictor.without_task(task_id, into)
            self.out_of_service.pop(task_id, None)
        self.bank.drop(task_id)

    def begin_without(self, damaged: Mapping[int, str]) -> None:
        """Records the tasks whose mask was found damaged as they were loaded."""
        self.out_of_service.update(damaged)
        for task_id, reason in damaged.items():
            _log_out_of_service(task_id, reason)

    def take_out(self, task_id: int, version: int, reason: str) -> bool:
        """Serves a task no longer whose newest mask is damaged, until it is served anew; any thread may call it.

        False where it is served by another version by now, or not at all: nothing is changed then.
        """
        with self._changing:
            served = {task.task_id: task.version for task in self.predictor.tasks}
            if served.get(task_id) != version:
                return False
            self.predictor = self.predictor.without_task(task_id)
            self.out_of_service[task_id] = reason
        self.bank.drop(task_id)
        _log_out_of_service(task_id, reason)
        return True


def _log_out_of_service(task_id: int, reason: str) -> None:
    log.error("task_out_of_service", task=task_id, reason=reason, advice=f"supsup-cli tasks history {task_id}")
