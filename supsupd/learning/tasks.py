"""What every rule of recognition shares: the tasks as they stand, going on with one, and the provisional ones."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from supsupd.learning.bank import Mask
from supsupd.learning.guard import Guard
from supsupd.learning.inference import MaskScores, Scorer
from supsupd.learning.learner import Learner, Samples
from supsupd.learning.network import Network
from supsupd.learning.provisional import Nursery, Provisional
from supsupd.learning.recognition import Candidate, Recogniser, Verdict
from supsupd.learning.records import Change, LabelledBatch, Member, TaskRecord, pooled
from supsupd.learning.reservoir import Reservoir, pattern_hash
from supsupd.learning.transfer import Earlier
from supsupd.learning.transforms import Transforms
from supsupd.learning.workshop import Workshop, of_first
from supsupd.sections import LearningSettings, RecognitionSettings

SHOWN_CANDIDATES = 5


class TaskLearner(ABC):
    """Learns labelled batches: the tasks, the one used last at the end, and a rule that says whose each batch is.

    Args:
        network: the fixed network.
        scorer: exact scoring of all masks.
        learning, recognition: the settings.
        transforms: of images, whose flips and crops vary the rows in training.
    """

    def __init__(
        self,
        network: Network,
        scorer: Scorer,
        learning: LearningSettings,
        recognition: RecognitionSettings,
        transforms: Transforms | None = None,
    ) -> None:
        self.network = network
        self.learner = Learner(network, learning, transforms)
        self.settings = recognition
        self.recogniser = Recogniser(recognition.false_alarm)
        self.tasks: dict[int, TaskRecord] = {}
        self._guards: dict[int, Guard] = {}
        self.workshop = Workshop(scorer, self.learner, recognition)
        self.nursery = Nursery(self.workshop, self._earlier)
        self.reservoir: Reservoir | None = None

    @property
    def provisionals(self) -> dict[int, Provisional]:
        return self.nursery.provisionals

    def _earlier(self) -> list[Earlier]:
        """What a new task's scores may start from."""
        return [Earlier(task.mask, task.state) for task in self.tasks.values()]

    @abstractmethod
    def consider(self, batch: LabelledBatch, classes: int, found: int = 0) -> Change:
        """What this labelled batch does: a pure function of what has been applied so far.

        `classes` is the length of the class list, `found` the tasks found in the last hour.
        """

    def reconsider(self, classes: int) -> Change | None:
        """The first unsure batch that the tasks explain by now; None when there is none."""
        del classes
        return None

    def is_finished(self, task: TaskRecord) -> bool:
        """Whether the reservoir holds the task's mask, which then never changes again."""
        return self.reservoir is not None and pattern_hash(task.packed) in self.reservoir.patterns

    def guarded(self) -> frozenset[str]:
        """Hashes of the batches that may yet be taken back: their bytes are still needed."""
        return frozenset(m.batch.sha256 for guard in self._guards.values() for m in guard.members)

    # -- what has been stored -------------------------------------------------------------------------------------

    def apply(self, change: Change) -> None:
        """Takes a stored change over. A new task must carry its id by now."""
        for provisional_id in change.closed:
            self.provisionals.pop(provisional_id, None)
        if change.provisional is not None:
            self.restore_provisional(change.provisional)
        if change.task is not None:
            self.restore_task(change.task)
            if change.guard is not None:
                self._guards[change.task.task_id] = change.guard

    def restore_task(self, task: TaskRecord) -> None:
        """Puts a task in as the latest used; the scores of those longest unused are dropped beyond `active_tasks`."""
        self.forget_task(task.task_id)
        self.tasks[task.task_id] = task
        self._drop_stale()

    def restore_tasks(self, tasks: Iterable[TaskRecord]) -> None:
        """The same for many, the one used last at the end."""
        for task in tasks:
            self.tasks[task.task_id] = task
        self._drop_stale()

    def _drop_stale(self) -> None:
        active = [t for t in self.tasks.values() if t.state is not None]
        for stale in active[: -self.learner.active_tasks]:
            self.tasks[stale.task_id] = replace(stale, state=None)

    def forget_task(self, task_id: int) -> None:
        """Neither recognises nor trains a task any more."""
        self.tasks.pop(task_id, None)
        self._guards.pop(task_id, None)

    def forget_guard(self, task_id: int) -> bool:
        """Watches a task anew from its next batch on; whether it was watched."""
        return self._guards.pop(task_id, None) is not None

    def restore_provisional(self, provisional: Provisional) -> None:
        self.nursery.restore(provisional)

    def forget_provisionals(self) -> None:
        """All are about to be rebuilt."""
        self.provisionals.clear()

    def rebuild(self, provisional_id: int, members: Iterable[Member], classes: int) -> Provisional:
        """A provisional task from its members alone, in order: the same as when they came one by one."""
        return self.nursery.rebuilt(provisional_id, members, classes)

    # -- going on -------------------------------------------------------------------------------------------------

    def _score(self, samples: Samples, masks: Sequence[Mask], classes: int) -> MaskScores:
        return self.workshop.score(samples, masks, classes)

    def _seed(self, member: Member) -> int:
        return self.workshop.seed(member)

    def _go_on(self, known: Candidate, verdict: Verdict, members: tuple[Member, ...], classes: int) -> Change:
        """A known task learns the members; its old mask stays if the held-out rows do better with it."""
        task = self.tasks[known.task]
        if self.is_finished(task):
            return self._count(task, known, verdict, members, classes)
        samples = pooled(members)
        state = task.state if task.state is not None else self.learner.from_mask(task.packed)
        update = self.learner.learn(state, samples, self._seed(members[-1]), task.reference.labels)
        labels = samples.y.cpu().numpy()
        mask = Mask(update.packed) if update.taken else task.mask
        held_out = samples.take(update.held_out)
        scores = self._score(held_out, [mask], classes)
        memory = self.settings.memory_rows
        reference = task.reference.tested(labels, known.errors, known.denied, memory).seen(labels)
        learned = replace(
            task,
            version=task.version + update.taken,
            mask=mask,
            density=update.density if update.taken else task.density,
            reference=reference.gauged(of_first(scores), memory),
            batches=task.batches + len(members),
            samples=task.samples + len(samples),
            state=update.state if update.taken else state,
        )
        check = {
            "rows": len(held_out),
            "loss_before": round(update.loss_before, 4),
            "loss_after": round(update.loss_after, 4),
            "taken": update.taken,
        }
        evidence = self._evidence(verdict) | {"held_out": check}
        return Change("known", evidence, task=learned, trained=update.taken, assigned=members)

    def _count(
        self, task: TaskRecord, known: Candidate, verdict: Verdict, members: tuple[Member, ...], classes: int
    ) -> Change:
        """A task whose mask is finished gets the members: its record goes on, its mask does not."""
        samples = pooled(members)
        labels = samples.y.cpu().numpy()
        scores = self._score(samples, [task.mask], classes)
        memory = self.settings.memory_rows
        reference = task.reference.tested(labels, known.errors, known.denied, memory).seen(labels)
        counted = replace(
            task,
            reference=reference.gauged(of_first(scores), memory),
            batches=task.batches + len(members),
            samples=task.samples + len(samples),
            state=None,
        )
        return Change("known", self._evidence(verdict) | {"finished": True}, task=counted, assigned=members)

    def _evidence(self, verdict: Verdict) -> dict[str, Any]:
        shown = verdict.candidates[:SHOWN_CANDIDATES]
        rest = {"left_out": list(verdict.left_out)} if verdict.left_out else {}
        ahead = {"ahead_of_next": round(shown[0].wealth - shown[1].wealth, 3)} if len(shown) > 1 else {}
        return {
            "rows": [verdict.start, verdict.stop],
            "batch_rows": verdict.count,
            "false_alarm": self.settings.false_alarm,
            "candidates": [c.to_json() for c in shown],
            **rest,
            **ahead,
        }
