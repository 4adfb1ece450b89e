"""The scenarios in which every labelled batch says which task it belongs to (GG, GNs, GNu).

Nothing is recognised: a key that is known goes on with its task, any other begins one at once. What recognition would
have asked is still recorded, of the given task alone, so that a batch under the wrong key can be seen afterwards.
"""

from __future__ import annotations

from dataclasses import replace

from supsupd.learning.bank import Mask
from supsupd.learning.learner import Samples
from supsupd.learning.records import Change, LabelledBatch, Member, TaskRecord
from supsupd.learning.reference import Reference
from supsupd.learning.tasks import TaskLearner
from supsupd.learning.transfer import start_scores


class GivenLearner(TaskLearner):
    """A continual learner whose tasks are those that the user names: as many as there are keys."""

    def consider(self, batch: LabelledBatch, classes: int, found: int = 0) -> Change:
        """What this labelled batch, whose task is `given`, does; as many tasks are found as are given."""
        del found
        assert batch.given is not None
        member = Member(batch, 0, len(batch.samples))
        task = self._task_of(batch)
        change = self._begun(member, classes) if task is None else self._gone_on(task, member, classes)
        return replace(change, evidence=change.evidence | {"given": batch.given})

    def _task_of(self, batch: LabelledBatch) -> TaskRecord | None:
        if batch.given_id is not None:
            return self.tasks[batch.given_id]
        return next((task for task in self.tasks.values() if task.key == batch.given), None)

    def _gone_on(self, task: TaskRecord, member: Member, classes: int) -> Change:
        scores = self._score(member.samples, [task.mask], classes)
        labels = member.samples.y.cpu().numpy()
        verdict = self.recogniser.recognise(labels, scores, [task.reference], classes, whole=True)
        verdict = replace(verdict, candidates=[replace(c, task=task.task_id) for c in verdict.candidates])
        return self._go_on(verdict.candidates[0], verdict, (member,), classes)

    def _begun(self, member: Member, classes: int) -> Change:
        """A task of one batch. Its record begins with the rows that training did not see."""
        samples, seed = member.samples, self._seed(member)
        start = start_scores(self.learner, samples, self._earlier(), self._start_key(member), seed)
        update = self.learner.learn(start, samples, seed, seen={})
        mask = Mask(update.packed)
        task = TaskRecord(
            task_id=0,
            version=1,
            mask=mask,
            density=update.density,
            reference=self._first_record(mask, samples.take(update.held_out), samples, classes),
            batches=1,
            samples=len(samples),
            state=update.state,
            key=member.batch.given,
        )
        evidence = {"rows": [0, len(samples)], "batch_rows": len(samples), "candidates": []}
        return Change("new", evidence, task=task, trained=True, assigned=(member,))

    def _start_key(self, member: Member) -> str:
        """What names the random scores that a new task may start from."""
        return member.batch.seed

    def _first_record(self, mask: Mask, held_out: Samples, samples: Samples, classes: int) -> Reference:
        memory = self.settings.memory_rows
        scores = self._score(held_out, [mask], classes)
        labels = held_out.y.cpu().numpy()
        errors = int((scores.predicted[0] != labels).sum())
        record = Reference().tested(labels, errors, 1.0 - scores.label_probability[0], memory)
        first = {name: values[0] for name, values in scores.evidence.items()}
        return record.seen(samples.y.cpu().numpy()).gauged(first, memory)
