"""Streams of small MNIST through the learner in process, and how its recognition did on them."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mnist_tasks import Images
from paper_stream import Piece
from scipy.ndimage import rotate
from sklearn.metrics import adjusted_rand_score

from supsupd.learning.inference import Scorer
from supsupd.learning.learner import Samples
from supsupd.learning.network import Architecture, Network
from supsupd.learning.normalise import Normaliser
from supsupd.learning.records import Change, LabelledBatch, Member
from supsupd.learning.rules import pick_learner
from supsupd.sections import LearningSettings, RecognitionSettings

SIDE, CLASSES, OUTPUTS = 14, 10, 100
TRAINING_ROWS = 12_000
JUNK = -1
NEAR = 1
"""Batches that a found boundary may be off."""


@dataclass(frozen=True)
class Source:
    """Rows of a true task, float32 (n, 196), with labels int64 (n,)."""

    x: np.ndarray
    y: np.ndarray

    def draw(self, rows: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        chosen = rng.choice(len(self.x), rows, replace=False)
        return self.x[chosen], self.y[chosen]


class SmallMnist:
    """MNIST at 14x14 pixels, and the tasks that are made of it."""

    def __init__(self, data: Path) -> None:
        images = Images.load(data / "mnist.npz", "train").shuffled(np.random.default_rng(0))
        self._images = images.x[:TRAINING_ROWS].astype(np.float32) / 255.0
        self._labels = images.y[:TRAINING_ROWS].astype(np.int64)
        self._plain = _halved(self._images)

    def permuted(self, number: int) -> Source:
        order = np.random.default_rng([7, number]).permutation(SIDE * SIDE)
        return Source(self._plain[:, order], self._labels)

    def rotated(self, degrees: int) -> Source:
        return Source(_halved(rotate(self._images, degrees, axes=(1, 2), reshape=False, order=1)), self._labels)

    def relabelled(self, number: int) -> Source:
        names = np.random.default_rng([9, number]).permutation(CLASSES) if number else np.arange(CLASSES)
        return Source(self._plain, names[self._labels])

    def inverted(self) -> Source:
        return Source(1.0 - self._plain, self._labels)

    def pair(self, number: int) -> Source:
        """Two digits, labelled 0 and 1."""
        mine = self._labels // 2 == number
        return Source(self._plain[mine], self._labels[mine] % 2)


def _halved(images: np.ndarray) -> np.ndarray:
    return images.reshape(len(images), SIDE, 2, SIDE, 2).mean(axis=(2, 4)).reshape(len(images), -1)


# -- streams ----------------------------------------------------------------------------------------------------------


def iter_visits(
    sources: Sequence[Source], order: Sequence[int], batches: int, rows: int, rng: np.random.Generator, aligned: bool
) -> Iterator[Piece]:
    """Tasks in this order, each `batches` long; unless `aligned` a boundary falls anywhere within a batch."""
    spread = 0 if aligned else rows // 2
    truth = np.concatenate([np.full(batches * rows + rng.integers(-spread, spread + 1), task) for task in order])
    for start in range(0, len(truth) - rows + 1, rows):
        part = truth[start : start + rows]
        runs = np.split(part, np.flatnonzero(np.diff(part)) + 1)
        x, y = zip(*(sources[run[0]].draw(len(run), rng) for run in runs), strict=True)
        yield Piece(np.concatenate(x), np.concatenate(y), part)


def iter_mixing(first: Source, second: Source, over: int, rows: int, rng: np.random.Generator) -> Iterator[Piece]:
    """12 batches of the first, `over` in which the share of the second grows to all, 12 of the second."""
    for share in np.concatenate([np.zeros(12), np.arange(1, over + 1) / over, np.ones(12)]):
        count = rng.binomial(rows, share)
        x, y = zip(first.draw(rows - count, rng), second.draw(count, rng), strict=True)
        order = rng.permutation(rows)
        truth = (np.arange(rows) >= rows - count).astype(int)
        yield Piece(np.concatenate(x)[order], np.concatenate(y)[order], truth[order])


def with_junk(pieces: Iterator[Piece], every: int, real: bool, rng: np.random.Generator) -> Iterator[Piece]:
    """Every so many batches one with random labels, of uniform noise or of the stream's own inputs."""
    for number, piece in enumerate(pieces, start=1):
        if number % every == 0:
            x = piece.x if real else rng.random(piece.x.shape, dtype=np.float32)
            yield Piece(x, rng.integers(0, CLASSES, len(x)), np.full(len(x), JUNK))
        else:
            yield piece


# -- the learner ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setup:
    """The learner of a stream."""

    hidden: int = 100
    classes: int = CLASSES
    learning: LearningSettings = field(default_factory=LearningSettings)
    recognition: RecognitionSettings = field(default_factory=RecognitionSettings)

    def to_json(self) -> dict[str, Any]:
        return {
            "widths": [SIDE * SIDE, self.hidden, OUTPUTS],
            "learning": self.learning.model_dump(mode="json"),
            "recognition": self.recognition.model_dump(mode="json"),
        }


class Run:
    """A learner and what it made of the batches so far."""

    def __init__(self, setup: Setup, seed: int) -> None:
        network = Network(Architecture((SIDE * SIDE,), (setup.hidden,), OUTPUTS), seed)
        kind = pick_learner(setup.recognition)
        self.learner = kind(network, Scorer(network, 1), setup.learning, setup.recognition)
        self.classes = setup.classes
        self.truth: list[int] = []
        self.row_truth: list[np.ndarray] = []
        self.owner: dict[int, int] = {}
        self.taken: dict[int, np.ndarray] = {}
        self.live: list[int] = []
        """The task that each batch went to as soon as it came, 0 for none."""
        self.masks = 0
        self.alarms = 0
        self._normalise = Normaliser("sample", (SIDE * SIDE,))

    def feed(self, piece: Piece) -> None:
        number = len(self.truth)
        self.truth.append(piece.task)
        self.row_truth.append(piece.truth)
        digest = hashlib.sha256(str(number).encode() + piece.x.tobytes() + piece.y.tobytes()).hexdigest()
        samples = Samples(torch.from_numpy(self._normalise(piece.x)), torch.from_numpy(piece.y))
        change: Change | None = self.learner.consider(LabelledBatch(number, digest, samples), self.classes)
        again = False
        while change is not None:
            again |= change.may_explain_more
            self._take(change)
            change = self.learner.reconsider(self.classes) if again else None
        self.live.append(self.owner.get(number, 0))

    def _take(self, change: Change) -> None:
        if change.task is not None and change.task.task_id == 0:
            self.masks += 1
            change = replace(change, task=replace(change.task, task_id=self.masks))
        self.alarms += bool(change.recalled)
        for member in change.recalled:
            self.owner.pop(member.batch.batch_id, None)
        for member in change.assigned:
            assert change.task is not None
            self.owner[member.batch.batch_id] = change.task.task_id
            self.taken[member.batch.batch_id] = _rows_taken(member)
        self.learner.apply(change)


def _rows_taken(member: Member) -> np.ndarray:
    return np.setdiff1d(np.arange(member.start, member.stop), member.left_out).astype(int)


# -- the judge --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Score:
    """How a stream was recognised; junk batches count only as `junk_masks` and `junk_learned`.

    Args:
        assigned: share of the batches that a task got; purity: of these, those whose majority task is their mask's.
        row_purity: of the rows trained on, those of their mask's majority task; rand: adjusted Rand index.
        missed: true tasks without a mask of their own; junk_masks: masks made mostly of junk.
        delay: batches of a visit before one goes to the right mask at once, on average; the greatest too.
        boundary_precision, boundary_recall: of the changes of mask, those within a batch of a true one, and the other
            way round.
    """

    batches: int
    true_tasks: int
    masks: int
    missed: int
    assigned: float
    purity: float
    row_purity: float
    rand: float
    delay: float
    greatest_delay: int
    boundary_precision: float
    boundary_recall: float
    junk_masks: int
    junk_learned: int
    alarms: int

    def to_json(self) -> dict[str, Any]:
        return {key: round(value, 4) if isinstance(value, float) else value for key, value in asdict(self).items()}


def judge(run: Run) -> Score:
    """Holds what the learner found against the truth."""
    counts: dict[int, Counter[int]] = {}
    for number, mask in run.owner.items():
        counts.setdefault(mask, Counter())[run.truth[number]] += 1
    of = {mask: count.most_common(1)[0][0] for mask, count in counts.items()}
    real = [number for number, task in enumerate(run.truth) if task != JUNK]
    got = [number for number in real if number in run.owner]
    rows = [run.row_truth[number][run.taken[number]] == of[run.owner[number]] for number in got]
    delays = _delays(run, real, of)
    found = _changes([run.owner[number] for number in got])
    true = _changes([run.truth[number] for number in got])
    tasks = {run.truth[number] for number in real}
    return Score(
        batches=len(run.truth),
        true_tasks=len(tasks),
        masks=run.masks,
        missed=len(tasks - set(of.values())),
        assigned=len(got) / len(real),
        purity=float(np.mean([of[run.owner[n]] == run.truth[n] for n in got])),
        row_purity=float(np.concatenate(rows).mean()),
        rand=float(adjusted_rand_score([run.truth[n] for n in got], [run.owner[n] for n in got])),
        delay=float(np.mean(delays)),
        greatest_delay=max(delays),
        boundary_precision=_near(found, true),
        boundary_recall=_near(true, found),
        junk_masks=sum(task == JUNK for task in of.values()),
        junk_learned=sum(run.truth[number] == JUNK for number in run.owner),
        alarms=run.alarms,
    )


def _delays(run: Run, real: list[int], of: dict[int, int]) -> list[int]:
    """For each visit the batches before one goes to a mask of its task at once; all of them if none does."""
    delays = []
    for visit in np.split(np.array(real), np.flatnonzero(np.diff([run.truth[n] for n in real])) + 1):
        right = [of.get(run.live[n]) == run.truth[n] for n in visit]
        delays.append(right.index(True) if True in right else len(right))
    return delays


def _changes(values: list[int]) -> np.ndarray:
    return np.flatnonzero(np.diff(values)) + 1


def _near(these: np.ndarray, those: np.ndarray) -> float:
    """The share of these places that have one of those nearby; 1 if there are none."""
    hits = [bool(len(those)) and int(np.abs(those - place).min()) <= NEAR for place in these]
    return float(np.mean(hits)) if hits else 1.0
