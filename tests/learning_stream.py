"""A stream through the continual learner alone, in memory: what it decides about each batch."""

import hashlib
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from supsupd.learning.inference import Scorer
from supsupd.learning.learner import Samples
from supsupd.learning.network import Architecture, Network
from supsupd.learning.normalise import Normaliser
from supsupd.learning.records import LabelledBatch
from supsupd.learning.rules import pick_learner
from supsupd.sections import LearningSettings, RecognitionSettings


def small_network(inputs=64, hidden=(100,), outputs=100, seed=0):
    return Network(Architecture((inputs,), hidden, outputs), seed)


def samples_of(x, y):
    x = Normaliser("sample", x.shape[1:])(x)
    return Samples(torch.from_numpy(x), torch.from_numpy(np.asarray(y, dtype=np.int64)))


@dataclass
class Stream:
    """Feeds batches one by one; `task_of` says where each went (batch id -> task id)."""

    classes: int = 10
    learning: LearningSettings = field(default_factory=LearningSettings)
    recognition: RecognitionSettings = field(default_factory=RecognitionSettings)
    task_of: dict = field(default_factory=dict)
    given_up: list = field(default_factory=list)
    released: list = field(default_factory=list)
    changes: list = field(default_factory=list)
    count: int = 0

    def __post_init__(self):
        network = small_network()
        scorer = Scorer(network, threads=1)
        self.learner = pick_learner(self.recognition)(network, scorer, self.learning, self.recognition)

    def feed(self, x, y, found=0, origin=""):
        """The kind of the decision about this batch, which `origin` sent."""
        self.count += 1
        digest = hashlib.sha256(x.tobytes() + np.asarray(y).tobytes()).hexdigest()
        batch = LabelledBatch(self.count, digest, samples_of(x, y), origin=origin)
        change = self.learner.consider(batch, self.classes, found)
        self._take(change)
        asked_again = change.may_explain_more
        while asked_again and (again := self.learner.reconsider(self.classes)) is not None:
            self._take(again)
        return change.kind

    def _take(self, change):
        if change.task is not None and change.task.task_id == 0:
            change = replace(change, task=replace(change.task, task_id=len(self.learner.tasks) + 1))
        self.changes.append(change)
        for member in change.recalled:
            self.task_of.pop(member.batch.batch_id, None)
        self.task_of |= {member.batch.batch_id: change.task.task_id for member in change.assigned}
        self.given_up += [batch.batch_id for batch in change.given_up]
        self.released += [batch.batch_id for batch in change.released]
        self.learner.apply(change)

    def accuracy(self, task_id, x, y):
        samples = samples_of(x, y)
        logits = self.learner.network.forward(samples.x, self.learner.tasks[task_id].packed)
        return float((logits[:, : self.classes].argmax(dim=1) == samples.y).float().mean())
