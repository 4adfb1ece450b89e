"""The whole story of a labelled batch: recognise it, train its mask, and say what has to be stored.

`consider` is a pure function of what has been applied so far and the batch: it changes nothing. The caller stores the
`Change` it gives in one transaction and then calls `apply`; a crash in between repeats the batch and gives the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any, Literal

import numpy as np

from supsupd.config import LearningSettings, RecognitionSettings
from supsupd.learning.inference import MaskScores, Scorer
from supsupd.learning.learner import Learner, Samples, TrainingState, derive_seed
from supsupd.learning.network import Network
from supsupd.learning.recognition import Candidate, Recogniser, Reference, Verdict
from supsupd.learning.statistics import InputStatistics, input_distance, input_limit, log_wealth, mixed

SHOWN_CANDIDATES = 5


@dataclass(frozen=True)
class LabelledBatch:
    """A batch ready to learn: its ledger id, its content hash (the seed of its training) and its samples."""

    batch_id: int
    sha256: str
    samples: Samples


@dataclass(frozen=True)
class TaskRecord:
    """A task as it stands: its newest mask and its record. `state` is None when only the bits are kept."""

    task_id: int
    version: int
    packed: np.ndarray
    density: float
    reference: Reference
    batches: int
    samples: int
    state: TrainingState | None = None


@dataclass(frozen=True)
class Member:
    """An unsure batch in a provisional task; only its rows start:stop are taken."""

    batch: LabelledBatch
    start: int
    stop: int

    @property
    def samples(self) -> Samples:
        return self.batch.samples.rows(self.start, self.stop)


@dataclass(frozen=True)
class Provisional:
    """A task in the making: unsure batches that look alike, and a mask that has to prove itself on each next one.

    Args:
        wins: log wealth of each bettor on "the mask knows the labels", for each member but the first (stakes,).
    """

    provisional_id: int
    members: tuple[Member, ...]
    state: TrainingState
    packed: np.ndarray
    reference: Reference
    inputs: InputStatistics
    wins: tuple[np.ndarray, ...] = ()

    def wealth(self, newest: int | None = None) -> float:
        """Log wealth over the `newest` members, or over all of them but the first."""
        counted = self.wins if newest is None else self.wins[len(self.wins) - newest :]
        return mixed(np.sum(counted, axis=0)) if counted else 0.0

    @property
    def labels(self) -> np.ndarray:
        return np.concatenate([m.samples.y.cpu().numpy() for m in self.members])


@dataclass(frozen=True)
class Change:
    """What one step did; everything of it is stored together.

    Args:
        task: the task that learned, as it is now; task_id 0 when it is new.
        trained: whether the task's mask is a new version; False when the held-out rows refused the update.
        assigned: the batches that the task got, in order; the last one decided.
        kind: known, new or unsure.
        evidence: why, as JSON.
        provisional: the provisional task that took the batch, when it stays unsure, or what is left of one.
        closed: provisional tasks that are no more: promoted, absorbed or given up.
        given_up: batches of provisional tasks that were given up undecided.
    """

    kind: Literal["known", "new", "unsure"]
    evidence: dict[str, Any]
    task: TaskRecord | None = None
    trained: bool = False
    assigned: tuple[Member, ...] = ()
    provisional: Provisional | None = None
    closed: tuple[int, ...] = ()
    given_up: tuple[LabelledBatch, ...] = ()


class ContinualLearner:
    """Tasks, provisional tasks and the rules between them.

    Args:
        network: the fixed network.
        scorer: exact scoring of all masks.
        learning, recognition: the settings.
    """

    def __init__(
        self, network: Network, scorer: Scorer, learning: LearningSettings, recognition: RecognitionSettings
    ) -> None:
        self.network = network
        self.scorer = scorer
        self.learner = Learner(network, learning)
        self.settings = recognition
        self.recogniser = Recogniser(recognition.false_alarm, recognition.memory_rows)
        self.tasks: dict[int, TaskRecord] = {}
        self.provisionals: dict[int, Provisional] = {}
        self._next_provisional = 1

    # -- steps ----------------------------------------------------------------------------------------------------

    def consider(self, batch: LabelledBatch, classes: int) -> Change:
        """What this labelled batch does; `classes` is the length of the class list."""
        verdict = self._recognise(batch.samples, classes)
        if verdict.known is not None:
            return self._go_on(verdict.known, verdict, (Member(batch, verdict.start, verdict.stop),))
        member = Member(batch, verdict.start, verdict.stop)
        host = self._host(member, classes)
        provisional = self._joined(host, member, classes)
        if self._has_proved_itself(provisional, classes):
            return self._promote(provisional, verdict, classes)
        return self._keep_unsure(provisional, host is None, verdict)

    def reconsider(self, classes: int) -> Change | None:
        """The first unsure batch that the tasks explain by now; None when there is none.

        Called until it gives None whenever a task was found: a batch that straddles two new tasks, say, can only be
        decided when both are known.
        """
        for provisional in self.provisionals.values():
            for member in provisional.members:
                verdict = self._recognise(member.batch.samples, classes)
                if verdict.known is not None:
                    change = self._go_on(verdict.known, verdict, (Member(member.batch, verdict.start, verdict.stop),))
                    rest = [m for m in provisional.members if m is not member]
                    left = self.rebuild(provisional.provisional_id, rest, classes) if rest else None
                    return replace(change, provisional=left, closed=(provisional.provisional_id,))
        return None

    def apply(self, change: Change) -> None:
        """Takes a stored change over. A new task must carry its id by now."""
        for provisional_id in change.closed:
            self.provisionals.pop(provisional_id, None)
        if change.provisional is not None:
            self.restore_provisional(change.provisional)
        if change.task is not None:
            self.restore_task(change.task)

    def restore_task(self, task: TaskRecord) -> None:
        """Puts a task in as the latest used; the scores of those longest unused are dropped beyond `active_tasks`."""
        self.tasks.pop(task.task_id, None)
        self.tasks[task.task_id] = task
        active = [t for t in self.tasks.values() if t.state is not None]
        for stale in active[: -self.learner.settings.active_tasks]:
            self.tasks[stale.task_id] = replace(stale, state=None)

    def restore_provisional(self, provisional: Provisional) -> None:
        self.provisionals.pop(provisional.provisional_id, None)
        self.provisionals[provisional.provisional_id] = provisional
        self._next_provisional = max(self._next_provisional, provisional.provisional_id + 1)

    def rebuild(self, provisional_id: int, members: Iterable[Member], classes: int) -> Provisional:
        """A provisional task from its members alone, in order: the same as when they came one by one."""
        first, *rest = members
        start = self._opened(provisional_id, first)
        return reduce(lambda whole, member: self._joined(whole, member, classes), rest, start)

    # -- known ----------------------------------------------------------------------------------------------------

    def _recognise(self, samples: Samples, classes: int, whole: bool = False) -> Verdict:
        """What the tasks make of the rows: of all if `whole`, else of the part before or after a change."""
        tasks = list(self.tasks.values())
        scores = self._score(samples, [t.packed for t in tasks], classes)
        references = [t.reference for t in tasks]
        verdict = self.recogniser.recognise(samples.y.cpu().numpy(), scores, references, classes, whole)
        ids = [t.task_id for t in tasks]
        return replace(verdict, candidates=[replace(c, task=ids[c.task]) for c in verdict.candidates])

    def _score(self, samples: Samples, masks: list[np.ndarray], classes: int) -> MaskScores:
        bank = np.stack(masks) if masks else np.empty((0, self.network.architecture.mask_bytes), np.uint8)
        return self.scorer.score(samples.x.cpu().numpy(), bank, classes, samples.y.cpu().numpy())

    def _go_on(self, known: Candidate, verdict: Verdict, members: tuple[Member, ...]) -> Change:
        """A known task learns the members; its old mask stays if the held-out rows do better with it."""
        task = self.tasks[known.task]
        samples = _pool(members)
        state = task.state if task.state is not None else self.learner.from_mask(task.packed)
        update = self.learner.learn(state, samples, self._seed(members[-1]), task.reference.labels)
        labels = samples.y.cpu().numpy()
        packed = update.packed if update.taken else task.packed
        held_out = samples.take(update.held_out)
        scores = self._score(held_out, [packed], classes=1)
        memory = self.settings.memory_rows
        reference = task.reference.tested(labels, known.errors, known.denied, memory).seen(labels)
        learned = TaskRecord(
            task_id=task.task_id,
            version=task.version + update.taken,
            packed=packed,
            density=update.density if update.taken else task.density,
            reference=reference.gauged(_of_first(scores), memory),
            batches=task.batches + len(members),
            samples=task.samples + len(samples),
            state=update.state if update.taken else task.state,
        )
        evidence = self._evidence(verdict) | {
            "held_out": {
                "rows": len(held_out),
                "loss_before": round(update.loss_before, 4),
                "loss_after": round(update.loss_after, 4),
                "taken": update.taken,
            }
        }
        return Change("known", evidence, task=learned, trained=update.taken, assigned=members)

    # -- unsure and new -------------------------------------------------------------------------------------------

    def _host(self, member: Member, classes: int) -> Provisional | None:
        """The provisional task that the batch belongs to: the one whose mask wins on it, else the most alike."""
        hosts = list(self.provisionals.values())
        if not hosts:
            return None
        scores = self._score(member.samples, [p.packed for p in hosts], classes)
        wins = [mixed(self._bets(p, member, s, classes)) for p, s in zip(hosts, scores.label_probability, strict=True)]
        if max(wins) >= math.log(len(hosts) / self.settings.false_alarm):
            return hosts[int(np.argmax(wins))]
        inputs = InputStatistics.of(member.samples.x.cpu().numpy())
        near = [
            (input_distance(p.inputs, inputs), p)
            for p in hosts
            if input_distance(p.inputs, inputs) <= input_limit(p.inputs, inputs, self.settings.false_alarm)
        ]
        return min(near, key=lambda pair: pair[0])[1] if near else None

    def _opened(self, provisional_id: int, member: Member) -> Provisional:
        state = self.learner.train(self.learner.fresh(member.batch.sha256), member.samples, self._seed(member))
        inputs = InputStatistics.of(member.samples.x.cpu().numpy())
        return Provisional(provisional_id, (member,), state, self.learner.packed(state), Reference(), inputs)

    def _joined(self, host: Provisional | None, member: Member, classes: int) -> Provisional:
        """The provisional task with one member more: tested on it first, then trained on all of its members."""
        if host is None:
            return self._opened(self._next_provisional, member)
        samples = member.samples
        scores = self._score(samples, [host.packed], classes)
        labels = samples.y.cpu().numpy()
        errors = int((scores.predicted[0] != labels).sum())
        reference = host.reference.tested(labels, errors, 1.0 - scores.label_probability[0], self.settings.memory_rows)
        members = (*host.members, member)
        state = self.learner.train(host.state, _pool(members), self._seed(member))
        return Provisional(
            provisional_id=host.provisional_id,
            members=members,
            state=state,
            packed=self.learner.packed(state),
            reference=reference.gauged(_of_first(scores), len(labels)),
            inputs=host.inputs.joined(InputStatistics.of(samples.x.cpu().numpy())),
            wins=(*host.wins, self._bets(host, member, scores.label_probability[0], classes)),
        )

    def _bets(self, host: Provisional, member: Member, probability: np.ndarray, classes: int) -> np.ndarray:
        """Log wealth won on the member's labels against the best constant guess in hindsight.

        The null knows the label frequencies of all members, this one included: a provisional task of one class, or
        of labels that do not depend on the inputs, never wins.
        """
        labels = member.samples.y.cpu().numpy()
        frequency = np.bincount(np.concatenate([host.labels, labels]), minlength=classes)
        return log_wealth(probability / (frequency / frequency.sum())[labels])

    def _has_proved_itself(self, provisional: Provisional, classes: int) -> bool:
        """Whether its mask knows the labels, and better than the mask of any task does.

        The second keeps a task's own rare outliers from becoming a second mask for it: they gather here, but what was
        learned from a few of them never predicts the next one as well as the task does.
        """
        if provisional.wealth() < -math.log(self.settings.promote_error):
            return False
        newest = (len(provisional.wins) + 1) // 2  # its first tests were those of a beginner
        rivals = self._recognise(_pool(provisional.members[-newest:]), classes, whole=True).candidates
        return all(provisional.wealth(newest) > rival.wealth for rival in rivals)

    def _promote(self, provisional: Provisional, verdict: Verdict, classes: int) -> Change:
        """A provisional task has proved itself: it becomes a task, unless an old one explains all of it by now."""
        pool = _pool(provisional.members)
        again = self._recognise(pool, classes, whole=True)
        closed = (provisional.provisional_id,)
        if again.known is not None:
            return replace(self._go_on(again.known, again, provisional.members), closed=closed)
        mask = self.learner.mask(provisional.state)
        task = TaskRecord(
            task_id=0,
            version=1,
            packed=provisional.packed,
            density=sum(int(m.sum()) for m in mask) / self.network.architecture.weights,
            reference=provisional.reference.seen(provisional.labels),
            batches=len(provisional.members),
            samples=len(pool),
            state=provisional.state,
        )
        evidence = self._evidence(verdict) | self._proof(provisional)
        return Change("new", evidence, task=task, trained=True, assigned=provisional.members, closed=closed)

    def _keep_unsure(self, provisional: Provisional, opened: bool, verdict: Verdict) -> Change:
        evidence = self._evidence(verdict) | self._proof(provisional)
        excess = max(0, len(self.provisionals) + opened - self.settings.max_provisional)
        stale = list(self.provisionals.values())[:excess]
        if len(provisional.members) > self.settings.patience_batches:
            given_up = tuple(m.batch for m in provisional.members)
            return Change("unsure", evidence, closed=(provisional.provisional_id,), given_up=given_up)
        return Change(
            "unsure",
            evidence,
            provisional=provisional,
            closed=tuple(p.provisional_id for p in stale),
            given_up=tuple(m.batch for p in stale for m in p.members),
        )

    def _seed(self, member: Member) -> int:
        return derive_seed(self.learner.settings.seed, member.batch.sha256)

    # -- evidence -------------------------------------------------------------------------------------------------

    def _evidence(self, verdict: Verdict) -> dict[str, Any]:
        return {
            "rows": [verdict.start, verdict.stop],
            "batch_rows": verdict.count,
            "false_alarm": self.settings.false_alarm,
            "candidates": [c.to_json() for c in verdict.candidates[:SHOWN_CANDIDATES]],
        }

    def _proof(self, provisional: Provisional) -> dict[str, Any]:
        return {
            "provisional": provisional.provisional_id,
            "provisional_batches": len(provisional.members),
            "provisional_log_wealth": round(provisional.wealth(), 3),
            "promotion_log_wealth_needed": round(-math.log(self.settings.promote_error), 3),
            "provisional_accuracy": provisional.reference.accuracy,
        }


def _of_first(scores: MaskScores) -> dict[str, np.ndarray]:
    """The evidence (n,) by name of the first mask."""
    return {name: values[0] for name, values in scores.evidence.items()}


def _pool(members: tuple[Member, ...]) -> Samples:
    return reduce(Samples.joined, [m.samples for m in members])
