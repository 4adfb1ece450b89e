"""NNs: a stream of labelled batches whose task is never told, through the continual learner in process."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from mnist_tasks import as_they_are
from paper_engine import Engine, Tested, accuracy_given, ask
from rich.progress import track
from sklearn.metrics import adjusted_rand_score

from supsupd.learning.inference import Scorer
from supsupd.learning.records import Change, LabelledBatch
from supsupd.learning.rules import pick_learner
from supsupd.learning.tasks import TaskLearner

GROUP_ROWS = 32


@dataclass(frozen=True)
class TrueTask:
    """Training rows of a task, float32 (n, inputs) normalised, which `view` makes its own, with labels; and its test
    rows, raw."""

    x: np.ndarray
    y: np.ndarray
    test_x: np.ndarray
    test_y: np.ndarray
    view: Callable[[np.ndarray], np.ndarray] = as_they_are


@dataclass(frozen=True)
class Piece:
    """A batch with the true task (n,) of each row, which only the judge sees."""

    x: np.ndarray
    y: np.ndarray
    truth: np.ndarray

    @property
    def task(self) -> int:
        """The true task of most of its rows."""
        values, counts = np.unique(self.truth, return_counts=True)
        return int(values[counts.argmax()])


def iter_pieces(tasks: Sequence[TrueTask], rows: int, aligned: bool) -> Iterator[Piece]:
    """Every row of each task once, task after task, in batches of `rows`.

    Aligned: an odd end of a task is left out; else the next task goes on in the same batch. The odd end of the last
    one is left out.
    """
    held: list[Piece] = []
    for number, task in enumerate(tasks):
        held = [] if aligned else held
        start = 0
        while start < len(task.y):
            part = slice(start, start + rows - sum(len(piece.y) for piece in held))
            labels = task.y[part]
            held.append(Piece(task.view(task.x[part]), labels, np.full(len(labels), number)))
            start = part.stop
            if sum(len(piece.y) for piece in held) == rows:
                yield _joined(held)
                held = []


def _joined(pieces: list[Piece]) -> Piece:
    x, y, truth = (np.concatenate(column) for column in zip(*((p.x, p.y, p.truth) for p in pieces), strict=True))
    return Piece(x, y, truth)


@dataclass
class Feeder:
    """A continual learner and what it made of the batches so far."""

    engine: Engine
    learner: TaskLearner
    truth: dict[int, int] = field(default_factory=dict)
    found: dict[int, int] = field(default_factory=dict)

    @classmethod
    def of(cls, engine: Engine) -> Feeder:
        setup = engine.setup
        scorer = Scorer(engine.network, setup.learning.threads)
        learner = pick_learner(setup.recognition)(engine.network, scorer, setup.learning, setup.recognition)
        return cls(engine, learner)

    def feed(self, piece: Piece) -> None:
        """One batch: recognised, learned, and the unsure ones asked again where a task was found or set back."""
        number = len(self.truth) + 1
        self.truth[number] = piece.task
        content = hashlib.sha256(piece.x.tobytes() + piece.y.tobytes()).hexdigest()
        batch = LabelledBatch(number, content, self.engine.prepared(piece.x, piece.y))
        classes = len(self.engine.classes)
        change: Change | None = self.learner.consider(batch, classes)
        again = False
        while change is not None:
            again |= change.may_explain_more
            self._take(change)
            change = self.learner.reconsider(classes) if again else None

    def _take(self, change: Change) -> None:
        if change.kind == "new" and change.task is not None:
            change = replace(change, task=replace(change.task, task_id=len(self.learner.tasks) + 1))
        for member in change.recalled:
            self.found.pop(member.batch.batch_id, None)
        if change.task is not None:
            self.found |= {member.batch.batch_id: change.task.task_id for member in change.assigned}
        self.learner.apply(change)

    def owners(self) -> dict[int, int]:
        """Mask -> the true task that most of its batches are of."""
        counts: dict[int, list[int]] = {}
        for number, mask in self.found.items():
            counts.setdefault(mask, []).append(self.truth[number])
        return {mask: int(np.bincount(truths).argmax()) for mask, truths in counts.items()}


@dataclass(frozen=True)
class Outcome:
    """How a stream ended. Shares in 0..1.

    Args:
        purity: batches whose majority task is that of their mask; rand: adjusted Rand index of the same.
        undecided: batches that no task got.
        given, single, group: labels right on test rows, the mask given, or inferred from 1 or 32 images.
        task_single, task_group: that mask right.
    """

    true_tasks: int
    masks: int
    batches: int
    undecided: int
    purity: float
    rand: float
    given: float
    worst: float
    single: float
    group: float
    task_single: float
    task_group: float

    def to_json(self) -> dict[str, Any]:
        return {k: round(v, 5) if isinstance(v, float) else v for k, v in asdict(self).items()}


def run_stream(engine: Engine, tasks: Sequence[TrueTask], rows: int, aligned: bool, what: str) -> Outcome:
    """Feeds the whole stream, then asks the test rows of every task."""
    feeder = Feeder.of(engine)
    total = sum(len(task.y) for task in tasks) // rows
    for piece in track(iter_pieces(tasks, rows, aligned), what, total=total):
        feeder.feed(piece)
    return judge(feeder, tasks)


def judge(feeder: Feeder, tasks: Sequence[TrueTask]) -> Outcome:
    """A task without a mask of its own has nothing right; of several, the one with the most batches is given, and any
    may be inferred."""
    owners = feeder.owners()
    sizes = {mask: sum(found == mask for found in feeder.found.values()) for mask in owners}
    own = {owner: max((m for m in owners if owners[m] == owner), key=lambda m: sizes[m]) for owner in owners.values()}
    masks = {number: tuple(m for m, owner in owners.items() if owner == number) for number in range(len(tasks))}
    tests = [Tested(own.get(n, 0), task.test_x, task.test_y, masks[n]) for n, task in enumerate(tasks)]
    predictor = feeder.engine.predictor(list(feeder.learner.tasks.values()))
    given = accuracy_given(predictor, tests)
    single, group = ask(predictor, tests, 1), ask(predictor, tests, GROUP_ROWS)
    found, truth = list(feeder.found.values()), [feeder.truth[number] for number in feeder.found]
    return Outcome(
        true_tasks=len(tasks),
        masks=len(owners),
        batches=len(feeder.truth),
        undecided=len(feeder.truth) - len(feeder.found),
        purity=float(np.mean([owners[m] == t for m, t in zip(found, truth, strict=True)])) if found else 0.0,
        rand=float(adjusted_rand_score(truth, found)),
        given=float(np.mean(given)),
        worst=min(given),
        single=single.both,
        group=group.both,
        task_single=single.task,
        task_group=group.task,
    )
