"""The paper's rule for tasks that nobody tells (Supermasks in Superposition, section 3.5, scenario NNs).

Every `check_batches` batches ν = softmax(-∇_α H) over the k masks in superposition says whose the batch is, from its
inputs alone: a new task's if k max ν < 1 + ε, else the arg max's. In between every batch trains the current mask. How
many batches were learned and which task was the last follow from what is stored, so that a restart changes nothing.

As in the authors' code there is no test for the very first batch, and masks that nothing has trained yet fill the
superposition up to five: their gradients are what one mask would have nothing to be compared with. Where one of them
is the arg max, the batch begins a task, too. A new task starts from the scores that stood for it there.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from supsupd.learning.bank import Mask, Masks
from supsupd.learning.given import GivenLearner
from supsupd.learning.inference import Slopes
from supsupd.learning.records import Change, LabelledBatch, Member, TaskRecord
from supsupd.learning.tasks import SHOWN_CANDIDATES

LEAST_MASKS = 5
"""Masks in superposition, at least: `maxn` in the authors' code."""


class PaperLearner(GivenLearner):
    """As where tasks are given, only that ν gives them."""

    def consider(self, batch: LabelledBatch, classes: int, found: int = 0) -> Change:
        """What this labelled batch does; its labels train, they do not decide."""
        del found
        member = Member(batch, 0, len(batch.samples))
        task, evidence = self._task_for(batch, classes)
        change = self._begun(member, classes) if task is None else self._gone_on(task, member, classes)
        return replace(change, evidence=change.evidence | {"paper": evidence})

    def _task_for(self, batch: LabelledBatch, classes: int) -> tuple[TaskRecord | None, dict[str, Any]]:
        """The task that the batch trains, None for a new one, and why."""
        if not self.tasks:
            return None, {}
        learned = sum(task.batches for task in self.tasks.values())
        if learned % self.settings.check_batches:
            current = list(self.tasks.values())[-1]
            until = self.settings.check_batches - learned % self.settings.check_batches
            return current, {"current": current.task_id, "next_check_after": until}
        tasks = sorted(self.tasks.values(), key=lambda task: task.task_id)
        nu = self._nu(batch, [task.mask for task in tasks], classes)
        best, height = int(nu.argmax()), len(nu) * float(nu.max())
        threshold = 1.0 + self.settings.paper_epsilon
        order = np.argsort(-nu[: len(tasks)], kind="stable")[:SHOWN_CANDIDATES]
        evidence = {
            "masks": len(nu),
            "k_max_nu": round(height, 4),
            "threshold": threshold,
            "margin": round(height - threshold, 4),
            "nu": [{"task": tasks[place].task_id, "nu": round(float(nu[place]), 5)} for place in order.tolist()],
        }
        return (tasks[best] if height >= threshold and best < len(tasks) else None), evidence

    def _nu(self, batch: LabelledBatch, masks: list[Mask], classes: int) -> np.ndarray:
        """ν of each mask and of those not trained yet (k,)."""
        untrained = [self._untrained(number) for number in range(len(masks) + 1, LEAST_MASKS + 1)]
        bank = Masks([*masks, *untrained])
        slopes = Slopes(self.workshop.scorer, bank, "entropy", classes).descent(
            batch.samples.x.cpu().numpy(), np.arange(len(bank))
        )
        powers = np.exp(slopes.astype(np.float64) - float(slopes.max()))
        return powers / powers.sum()

    def _untrained(self, number: int) -> Mask:
        return Mask(self.learner.packed(self.learner.fresh(_key(number))))

    def _start_key(self, member: Member) -> str:
        del member
        return _key(len(self.tasks) + 1)


def _key(number: int) -> str:
    return f"paper {number}"
