"""Tasks in the making: unsure batches that look alike, and a mask that has to prove itself on each next one."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import numpy as np

from supsupd.learning.bank import Mask
from supsupd.learning.learner import TrainingState
from supsupd.learning.records import Member, pooled
from supsupd.learning.reference import Reference
from supsupd.learning.statistics import (
    VARIANCE_FLOOR,
    InputStatistics,
    far_outside,
    input_distance,
    input_limit,
    log_wealth,
    mixed,
)
from supsupd.learning.transfer import Earlier, start_scores
from supsupd.learning.workshop import Workshop, of_first


@dataclass(frozen=True)
class Provisional:
    """A task in the making.

    Args:
        wins: log wealth of each bettor on "the mask knows the labels", for each member but the first (stakes,).
        tested: probability of the label before training, for each member but the first (rows of its part,).
    """

    provisional_id: int
    members: tuple[Member, ...]
    state: TrainingState
    mask: Mask
    reference: Reference
    inputs: InputStatistics
    wins: tuple[np.ndarray, ...] = ()
    tested: tuple[np.ndarray, ...] = ()

    def wealth(self, newest: int | None = None) -> float:
        """Log wealth over the `newest` members, or over all of them but the first."""
        counted = self.wins if newest is None else self.wins[len(self.wins) - newest :]
        return mixed(np.sum(counted, axis=0)) if counted else 0.0

    @property
    def nbytes(self) -> int:
        """What it holds: its training state, and its members' rows, or their bytes on the disk if these are more."""
        held = sum(max(m.batch.samples.nbytes, m.batch.size) for m in self.members)
        return self.state.nbytes + self.mask.nbytes + held

    @property
    def origin(self) -> str:
        """Who sent most of its rows."""
        rows: Counter[str] = Counter()
        for member in self.members:
            rows[member.batch.origin] += len(member.samples)
        return rows.most_common(1)[0][0]

    @property
    def labels(self) -> np.ndarray:
        return np.concatenate([m.samples.y.cpu().numpy() for m in self.members])

    def proof(self, promote_error: float) -> dict[str, Any]:
        """What it has proved so far, as evidence."""
        return {
            "provisional": self.provisional_id,
            "provisional_batches": len(self.members),
            "provisional_log_wealth": round(self.wealth(), 3),
            "promotion_log_wealth_needed": round(-math.log(promote_error), 3),
            "provisional_accuracy": self.reference.accuracy,
        }


class Nursery:
    """The provisional tasks, and how they grow. `earlier` gives what a new task's scores may start from."""

    def __init__(self, workshop: Workshop, earlier: Callable[[], list[Earlier]]) -> None:
        self._workshop = workshop
        self._earlier = earlier
        self.provisionals: dict[int, Provisional] = {}
        self._next = 1

    def restore(self, provisional: Provisional) -> None:
        """Puts one in as the latest touched."""
        self.provisionals.pop(provisional.provisional_id, None)
        self.provisionals[provisional.provisional_id] = provisional
        self._next = max(self._next, provisional.provisional_id + 1)

    def crowded_out(self, newest: Provisional) -> list[Provisional]:
        """Those that have to go so that all others and `newest`, the latest touched, fit into the room that there is.

        Whoever has sent most of what does not fit gives up first, and of that what was longest untouched: nobody pushes
        out what is others'.
        """
        kept = [p for p in self.provisionals.values() if p.provisional_id != newest.provisional_id] + [newest]
        room = self._workshop.learner.settings.memory_bytes + newest.state.nbytes  # one can always be begun
        gone = []
        while (many := len(kept) > self._workshop.settings.max_provisional) or sum(p.nbytes for p in kept) > room:
            held: Counter[str] = Counter()
            for provisional in kept:
                held[provisional.origin] += 1 if many else provisional.nbytes
            most = max(held.values())
            gone.append(next(p for p in kept if held[p.origin] == most))
            kept.remove(gone[-1])
        return gone

    def without_foreign(self, host: Provisional, member: Member) -> Member:
        """The member without the rows that lie far outside what its host has seen, unless most do."""
        samples, inputs = member.samples, host.inputs
        error = self._workshop.settings.false_alarm
        foreign = far_outside(samples.x.cpu().numpy(), inputs.mean, inputs.variance + VARIANCE_FLOOR, error)
        if not foreign.any() or 2 * foreign.sum() > len(foreign):
            return member
        taken = np.setdiff1d(np.arange(member.start, member.stop), member.left_out)
        left_out = np.union1d(member.left_out, taken[foreign]).astype(np.int64)
        return replace(member, left_out=tuple(left_out.tolist()))

    def host(self, member: Member, classes: int) -> Provisional | None:
        """The provisional task that the batch belongs to: the one whose mask wins on it, else the most alike."""
        hosts = list(self.provisionals.values())
        if not hosts:
            return None
        scores = self._workshop.score(member.samples, [p.mask for p in hosts], classes)
        wins = [mixed(_bets(p, member, each, classes)) for p, each in zip(hosts, scores.label_probability, strict=True)]
        error = self._workshop.settings.false_alarm
        if max(wins) >= math.log(len(hosts) / error):
            return hosts[int(np.argmax(wins))]
        inputs = InputStatistics.of(member.samples.x.cpu().numpy())
        distances = [(input_distance(p.inputs, inputs), p) for p in hosts]
        near = [(d, p) for d, p in distances if d <= input_limit(p.inputs, inputs, error)]
        return min(near, key=lambda pair: pair[0])[1] if near else None

    def joined(self, host: Provisional | None, member: Member, classes: int) -> Provisional:
        """The provisional task with one member more: tested on it first, then trained on all of its members.

        Without a host the member opens one.
        """
        if host is None:
            return self._opened(self._next, member)
        samples = member.samples
        scores = self._workshop.score(samples, [host.mask], classes)
        whole = self._workshop.score(member.part, [host.mask], classes) if member.left_out else scores
        labels = samples.y.cpu().numpy()
        errors = int((scores.predicted[0] != labels).sum())
        memory = self._workshop.settings.memory_rows
        reference = host.reference.tested(labels, errors, 1.0 - scores.label_probability[0], memory)
        members = (*host.members, member)
        learner = self._workshop.learner
        state = learner.train(host.state, pooled(members), self._workshop.seed(member))
        return Provisional(
            provisional_id=host.provisional_id,
            members=members,
            state=state,
            mask=Mask(learner.packed(state)),
            reference=reference.gauged(of_first(scores), len(labels)),
            inputs=host.inputs.joined(InputStatistics.of(samples.x.cpu().numpy())),
            wins=(*host.wins, _bets(host, member, scores.label_probability[0], classes)),
            tested=(*host.tested, whole.label_probability[0]),
        )

    def rebuilt(self, provisional_id: int, members: Iterable[Member], classes: int) -> Provisional:
        """A provisional task from its members alone, in order: the same as when they came one by one."""
        first, *rest = members
        start = self._opened(provisional_id, first)
        return reduce(lambda whole, member: self.joined(whole, member, classes), rest, start)

    def _opened(self, provisional_id: int, member: Member) -> Provisional:
        learner = self._workshop.learner
        seed = self._workshop.seed(member)
        start = start_scores(learner, member.samples, self._earlier(), member.batch.seed, seed)
        state = learner.train(start, member.samples, seed)
        inputs = InputStatistics.of(member.samples.x.cpu().numpy())
        return Provisional(provisional_id, (member,), state, Mask(learner.packed(state)), Reference(), inputs)


def _bets(host: Provisional, member: Member, probability: np.ndarray, classes: int) -> np.ndarray:
    """Log wealth won on the member's labels against the best constant guess in hindsight.

    The null knows the label frequencies of all members, this one included: a provisional task of one class, or
    of labels that do not depend on the inputs, never wins.
    """
    labels = member.samples.y.cpu().numpy()
    frequency = np.bincount(np.concatenate([host.labels, labels]), minlength=classes)
    return log_wealth(probability / (frequency / frequency.sum())[labels])
