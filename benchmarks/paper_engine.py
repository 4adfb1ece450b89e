"""The product's own engine in process: what the experiments of `paper.py` train and ask.

Nothing of the method is here. `found` makes the network as the daemon does, `begin_task` is its scenario of given
tasks and `ask` its predictor; `paper_stream` feeds its continual learner.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from mnist_tasks import Images
from rich.progress import track

from streams.batch import Batch
from supsupd.choices import Method, Objective
from supsupd.founding import found_network
from supsupd.learning.device import pick_device, use_threads
from supsupd.learning.features import FeatureModel
from supsupd.learning.given import GivenLearner
from supsupd.learning.inference import Scorer
from supsupd.learning.labels import ClassList
from supsupd.learning.learner import Samples
from supsupd.learning.network import Network
from supsupd.learning.normalise import Normaliser
from supsupd.learning.predictor import Predictor
from supsupd.learning.queries import ServedTask
from supsupd.learning.records import LabelledBatch, TaskRecord
from supsupd.sections import LearningSettings, NetworkSettings, RecognitionSettings

T = TypeVar("T")
NORMALISED_ROWS = 10_000
"""Rows standardised at a time: they pass through float64."""


@dataclass(frozen=True)
class Setup:
    """The settings of an experiment, as the daemon's configuration has them."""

    network: NetworkSettings
    learning: LearningSettings
    recognition: RecognitionSettings

    def to_json(self) -> dict[str, Any]:
        return {
            name: getattr(self, name).model_dump(mode="json", exclude_unset=True)
            for name in ("network", "learning", "recognition")
        }


@dataclass(frozen=True)
class Engine:
    """A founded network with its settings."""

    setup: Setup
    network: Network
    normaliser: Normaliser
    classes: ClassList

    def samples(self, x: np.ndarray, y: np.ndarray) -> Samples:
        """Raw rows x (n, ...) and labels (n,) as training takes them."""
        parts = [self.normaliser(x[start : start + NORMALISED_ROWS]) for start in range(0, len(x), NORMALISED_ROWS)]
        return self.prepared(np.concatenate(parts), y)

    def prepared(self, x: np.ndarray, y: np.ndarray) -> Samples:
        """Rows that are normalised already, float32 (n, inputs)."""
        return Samples.of(x, self.classes.encode(y), self.network.device)

    def predictor(self, tasks: Sequence[TaskRecord], features: FeatureModel | None = None) -> Predictor:
        """What answers queries from these masks; `features` is what recognition.features would keep of their rows."""
        served = (
            ServedTask(t.task_id, t.version, t.mask, t.reference.evidence, frozenset(t.reference.labels)) for t in tasks
        )
        recognition = self.setup.recognition
        return Predictor(
            scorer=Scorer(self.network, self.setup.learning.threads),
            normaliser=self.normaliser,
            classes=self.classes,
            method=recognition.inference,
            objective=recognition.objective,
            false_alarm=recognition.false_alarm,
            tasks=tuple(served),
            labels_shared=recognition.labels_shared,
            features=features,
        )


def found(setup: Setup, x: np.ndarray, y: np.ndarray) -> Engine:
    """The network for rows like x (n, ...) and labels y (n,), which must show every class."""
    use_threads(setup.learning.threads)
    network, normaliser, classes = found_network(setup.network, [Batch(x, y.astype(np.int64))], pick_device("cpu"))
    return Engine(setup, network, normaliser, classes)


def begin_task(engine: Engine, samples: Samples, number: int, name: str) -> TaskRecord:
    """A given task learned from one labelled batch; `name` seeds its training. Numbers count from 1."""
    setup = engine.setup
    scorer = Scorer(engine.network, setup.learning.threads)
    transforms = engine.normaliser.transforms
    learner = GivenLearner(engine.network, scorer, setup.learning, setup.recognition, transforms)
    content = hashlib.sha256(name.encode()).hexdigest()
    change = learner.consider(LabelledBatch(number, content, samples, given=name), len(engine.classes))
    assert change.task is not None
    return replace(change.task, task_id=number, state=None)


def in_processes(work: Callable[[int], T], count: int, what: str) -> list[T]:
    """work(0) ... work(count - 1) in as many processes as this one may use CPUs; the results do not depend on it."""
    workers = min(len(os.sched_getaffinity(0)), count)
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        return list(track(pool.map(work, range(count)), what, total=count))


@cache
def mnist(data: Path, part: str) -> Images:
    """MNIST's images of `part`, train or test, in one fixed random order."""
    return Images.load(data / "mnist.npz", part).shuffled(np.random.default_rng(0))


@dataclass(frozen=True)
class Tested:
    """Test rows of one task, raw x (n, ...) with labels (n,), the id of the mask that is theirs, and the ids of others
    that were learned from the same task."""

    task: int
    x: np.ndarray
    y: np.ndarray
    also: tuple[int, ...] = ()


@dataclass(frozen=True)
class Right:
    """Shares of the rows: task inferred right; task and label both right."""

    task: float
    both: float

    def to_json(self) -> dict[str, float]:
        return {"task": round(self.task, 5), "accuracy": round(self.both, 5)}


def accuracy_given(predictor: Predictor, tests: Iterable[Tested]) -> list[float]:
    """Share of labels right under each task's own mask."""
    found = []
    for test in tests:
        place = predictor.place_of(test.task)
        if place is None:
            found.append(0.0)
            continue
        answer = predictor.predict(test.x, place, per_sample=True)
        found.append(float((_labels(predictor, answer.predicted) == test.y).mean()))
    return found


def ask(
    predictor: Predictor, tests: Sequence[Tested], rows: int, method: Method = "exact", objective: Objective = "entropy"
) -> Right:
    """Queries of `rows` images of one task each (the last ones of a task that do not fill a query are left out)."""
    task, both = [], []
    for test in tests:
        whole = len(test.x) - len(test.x) % rows
        parts = [slice(0, whole)] if rows == 1 else [slice(s, s + rows) for s in range(0, whole, rows)]
        for part in parts:
            answer = predictor.predict(test.x[part], None, rows == 1, method, objective)
            right = np.isin(answer.task, (test.task, *test.also))
            task.append(right)
            both.append(right & (_labels(predictor, answer.predicted) == test.y[part]))
    return Right(float(np.concatenate(task).mean()), float(np.concatenate(both).mean()))


def _labels(predictor: Predictor, places: np.ndarray) -> np.ndarray:
    return np.asarray(predictor.classes.labels)[places]
