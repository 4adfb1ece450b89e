"""The calibrated rule: the whole story of a labelled batch whose task nobody tells.

`consider` recognises it, goes on with its task, or takes a late alarm back, or gathers, proves and promotes. It is a
pure function of what has been applied so far and the batch: it changes nothing. The caller stores the `Change` it
gives in one transaction and then calls `apply`; a crash in between repeats the batch and gives the same.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from supsupd.learning.companion import Separation, suspected_companion
from supsupd.learning.guard import Guard
from supsupd.learning.learner import Samples
from supsupd.learning.provisional import Provisional
from supsupd.learning.recognition import Candidate, Part, Verdict
from supsupd.learning.records import Change, LabelledBatch, Member, TaskRecord, pooled
from supsupd.learning.shortlist import heard, likely
from supsupd.learning.statistics import mixed
from supsupd.learning.tasks import SHOWN_CANDIDATES, TaskLearner


@dataclass(frozen=True)
class Proof:
    """Whether a provisional task has proved itself, as what (rows of a known task may be left out), and why."""

    proved: Provisional | None = None
    evidence: dict[str, Any] = field(default_factory=dict)


class ContinualLearner(TaskLearner):
    """Tasks, provisional tasks, guards and the rules between them; the arguments are those of `TaskLearner`."""

    # -- steps ----------------------------------------------------------------------------------------------------

    def consider(self, batch: LabelledBatch, classes: int, found: int = 0) -> Change:
        verdict = self._recognise(batch.samples, classes)
        member = Member(batch, verdict.start, verdict.stop, verdict.left_out)
        if verdict.known is not None:
            return self._known(verdict.known, verdict, member, classes)
        host = self.nursery.host(member, classes)
        member = member if host is None else self.nursery.without_foreign(host, member)
        provisional = self.nursery.joined(host, member, classes)
        if host is not None and (absorbed := self._absorbed(provisional, classes)) is not None:
            return absorbed
        proof = self._prove(provisional, classes)
        cap = self.settings.max_new_per_hour
        if proof.proved is not None and cap and found >= cap:
            evidence = proof.evidence | {"found_last_hour": found, "max_new_per_hour": cap}
            return self._keep_unsure(provisional, verdict, Proof(proof.proved, evidence))
        if proof.proved is not None:
            return self._promote(proof, provisional, verdict, classes)
        return self._keep_unsure(provisional, verdict, proof)

    def reconsider(self, classes: int) -> Change | None:
        """The first unsure batches that the tasks explain by now; None when there are none.

        Called until it gives None whenever a task was found or set back: a batch that straddles two new tasks, say,
        can only be decided when both are known. What was taken back from a task may return to it together, once the
        stream has gone on to another, and never batch by batch.
        """
        latest = next(reversed(self.tasks), None)
        for provisional in self.provisionals.values():
            fresh = latest in {m.recalled_from for m in provisional.members}
            if not fresh and (absorbed := self._absorbed(provisional, classes)) is not None:
                return absorbed
            for member in provisional.members:
                verdict = self._recognise(member.batch.samples, classes, barred=member.recalled_from)
                if verdict.known is not None:
                    taken = Member(member.batch, verdict.start, verdict.stop, verdict.left_out)
                    change = self._go_on(verdict.known, verdict, (taken,), classes)
                    rest = [m for m in provisional.members if m is not member]
                    left = self.rebuild(provisional.provisional_id, rest, classes) if rest else None
                    return replace(change, provisional=left, closed=(provisional.provisional_id,))
        return None

    # -- known ----------------------------------------------------------------------------------------------------

    def _recognise(self, samples: Samples, classes: int, whole: bool = False, barred: int | None = None) -> Verdict:
        """What the tasks but the `barred` one make of the rows: of all if `whole`, else of those that decide."""
        tasks = [t for t in self.tasks.values() if t.task_id != barred]
        count = self.settings.batch_shortlist
        asked = likely(tasks, samples, count, self.workshop)
        verdict = self._weighed(samples, asked, classes, whole)
        if verdict.known is not None or len(asked) == len(tasks):
            return verdict
        wider = {t.task_id for t in asked} | heard(tasks, samples, count, self.workshop, classes)
        return self._weighed(samples, [t for t in tasks if t.task_id in wider], classes, whole)

    def _without_foreign(self, verdict: Verdict, samples: Samples, classes: int) -> Verdict:
        """Leaves out the rows that lie far outside what the known task has seen, whatever their labels say.

        A task to which most of the rows are foreign does not know the batch.
        """
        kept = np.setdiff1d(np.arange(verdict.start, verdict.stop), verdict.left_out)
        x = samples.take(kept).x.cpu().numpy()

        def looked_at(candidate: Candidate) -> Candidate:
            inputs = self.tasks[candidate.task].inputs
            if not candidate.known or inputs is None:
                return candidate
            foreign = kept[inputs.far_outside(x, self.settings.false_alarm)]
            return replace(candidate, foreign=tuple(foreign.tolist()))

        verdict = replace(verdict, candidates=[looked_at(candidate) for candidate in verdict.candidates])
        known = verdict.known
        if known is None or not known.foreign:
            return verdict
        task, left_out = self.tasks[known.task], np.union1d(verdict.left_out, known.foreign).astype(np.int64)
        part = Part(verdict.start, verdict.stop, tuple(left_out.tolist()))
        scores = self._score(samples, [task.mask], classes)
        recogniser = replace(self.recogniser, among=len(self.tasks))
        rest = recogniser.weigh_part(samples.y.cpu().numpy(), scores, task.reference, classes, part)
        rest = replace(rest, task=known.task, foreign=known.foreign)
        others = [candidate for candidate in verdict.candidates if candidate is not known]
        return replace(verdict, candidates=[rest, *others], left_out=part.left_out)

    def _weighed(self, samples: Samples, tasks: list[TaskRecord], classes: int, whole: bool) -> Verdict:
        scores = self._score(samples, [t.mask for t in tasks], classes)
        references = [t.reference for t in tasks]
        recogniser = replace(self.recogniser, among=len(self.tasks))
        verdict = recogniser.recognise(samples.y.cpu().numpy(), scores, references, classes, whole)
        ids = [t.task_id for t in tasks]
        verdict = replace(verdict, candidates=[replace(c, task=ids[c.task]) for c in verdict.candidates])
        return self._without_foreign(verdict, samples, classes)

    def _known(self, known: Candidate, verdict: Verdict, member: Member, classes: int) -> Change:
        """The task goes on with the batch, unless its guard says that this one and those before it are foreign."""
        task = self.tasks[known.task]
        guard = self._guards.get(known.task, Guard(task))
        denied = known.denied
        if guard.members:
            denied = 1.0 - self._score(member.samples, [guard.snapshot.mask], classes).label_probability[0]
        guard = guard.with_batch(member, member.samples.y.cpu().numpy(), denied)
        if guard.alarmed(self.settings.false_alarm):
            return self._set_back(task, guard, verdict, classes)
        change = self._go_on(known, verdict, (member,), classes)
        assert change.task is not None
        return replace(change, guard=guard.settled(change.task))

    def _set_back(self, task: TaskRecord, guard: Guard, verdict: Verdict, classes: int) -> Change:
        """A late alarm: the task returns to its snapshot, as a new version; the window joins a provisional task."""
        *learned, newest = (replace(m, recalled_from=task.task_id) for m in guard.members)
        host = self.nursery.host(newest, classes)
        provisional = host
        for member in (*learned, newest):
            provisional = self.nursery.joined(provisional, member, classes)
        assert provisional is not None
        back = replace(
            guard.snapshot,
            version=task.version + 1,
            batches=task.batches - len(learned),
            samples=task.samples - sum(len(m.samples) for m in learned),
        )
        alarm = {
            "task": task.task_id,
            "batches": len(guard.members),
            "log_wealth": round(guard.log_wealth, 3),
            "log_wealth_needed": round(-math.log(self.settings.false_alarm), 3),
        }
        evidence = {"alarm": alarm, "recalled_from": task.task_id}
        change = self._keep_unsure(provisional, verdict, Proof(evidence=evidence))
        return replace(change, task=back, trained=True, recalled=(*learned, newest), guard=Guard(back))

    # -- unsure and new -------------------------------------------------------------------------------------------

    def _absorbed(self, provisional: Provisional, classes: int) -> Change | None:
        """A known task goes on with all of it, if it explains all of its rows together by now.

        Small batches each say too little; together they are at home, or they are not.
        """
        again = self._recognise(pooled(provisional.members), classes, whole=True)
        if again.known is None:
            return None
        change = self._go_on(again.known, again, provisional.members, classes)
        return replace(change, closed=(provisional.provisional_id,))

    def _prove(self, provisional: Provisional, classes: int) -> Proof:
        """Whether its mask knows the labels, and better than the mask of any task does.

        The second keeps a task's own rare outliers from becoming a second mask for it: they gather here, but what was
        learned from a few of them never predicts the next one as well as the task does.
        """
        if provisional.wealth() < -math.log(self.settings.promote_error):
            return Proof()
        newest = (len(provisional.wins) + 1) // 2  # its first tests were those of a beginner
        rivals = self._recognise(pooled(provisional.members[-newest:]), classes, whole=True).candidates
        evidence = {
            "newer_batches": newest,
            "newer_log_wealth": round(provisional.wealth(newest), 3),
            "rivals": [{"task": r.task, "log_wealth": round(r.wealth, 3)} for r in _richest(rivals)],
        }
        companion = self.tasks.get(suspected_companion(provisional) or 0)
        if companion is not None:
            separation = Separation(self.workshop, self.nursery, classes)
            if (separated := separation.separated(provisional, companion)) is not None:
                return Proof(separated, evidence | {"separated_from": companion.task_id})
        if any(provisional.wealth(newest) <= rival.wealth for rival in rivals):
            return Proof(None, evidence)
        outliers = self._outliers(provisional, classes)
        if not outliers:
            return Proof(provisional, evidence)
        evidence["outliers"] = outliers
        kept = [m for m in provisional.members if m.batch.batch_id not in outliers]
        rest = self.rebuild(provisional.provisional_id, kept, classes) if kept else None
        proved = rest is not None and rest.wealth() >= -math.log(self.settings.promote_error)
        return Proof(rest if proved else None, evidence)

    def _outliers(self, provisional: Provisional, classes: int) -> list[int]:
        """Batches that a known task predicts better, row for row, than this one predicted any: its outliers, which
        waited here. A task is no rival for what was taken back from it, which it did predict."""
        tested = zip(provisional.members[1:], provisional.wins, strict=True)
        best = max(mixed(wins) / len(m.samples) for m, wins in tested)

        def rival(member: Member) -> float:
            found = self._recognise(member.samples, classes, whole=True, barred=member.recalled_from).candidates
            return max((c.wealth for c in found), default=-math.inf) / len(member.samples)

        return [m.batch.batch_id for m in provisional.members if rival(m) > best]

    def _promote(self, proof: Proof, provisional: Provisional, verdict: Verdict, classes: int) -> Change:
        """What has proved itself becomes a task; members that it has no row of stay behind."""
        proved = proof.proved
        assert proved is not None
        mask = self.learner.mask(proved.state)
        task = TaskRecord(
            task_id=0,
            version=1,
            mask=proved.mask,
            density=sum(int(m.sum()) for m in mask) / self.network.architecture.weights,
            reference=proved.reference.seen(proved.labels),
            batches=len(proved.members),
            samples=len(pooled(proved.members)),
            state=proved.state,
        )
        taken = {m.batch.batch_id for m in proved.members}
        rest = [m for m in provisional.members if m.batch.batch_id not in taken]
        return Change(
            "new",
            self._evidence(verdict) | proved.proof(self.settings.promote_error) | proof.evidence,
            task=task,
            trained=True,
            assigned=proved.members,
            provisional=self.rebuild(provisional.provisional_id, rest, classes) if rest else None,
            closed=(provisional.provisional_id,),
        )

    def _keep_unsure(self, provisional: Provisional, verdict: Verdict, proof: Proof) -> Change:
        evidence = self._evidence(verdict) | provisional.proof(self.settings.promote_error) | proof.evidence
        stale = self.nursery.crowded_out(provisional)
        if len(provisional.members) > self.settings.patience_batches and proof.proved is None:
            stale = [provisional]
        return Change(
            "unsure",
            evidence,
            provisional=None if provisional in stale else provisional,
            closed=tuple(p.provisional_id for p in stale),
            given_up=tuple(m.batch for p in stale for m in p.members if m.batch.origin == p.origin),
            released=tuple(m.batch for p in stale for m in p.members if m.batch.origin != p.origin),
        )


def _richest(rivals: list[Candidate]) -> list[Candidate]:
    return sorted(rivals, key=lambda rival: -rival.wealth)[:SHOWN_CANDIDATES]
