"""Where the scores of a new task start: at random, or from what earlier tasks have learned.

The paper starts a new mask from the mean of the earlier scores (Supermasks in Superposition, section 4.1, Transfer).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from supsupd.learning.bank import Mask
from supsupd.learning.learner import Learner, Samples, TrainingState

START_SURENESS = 0.5
"""Of bits that another task begins with: they are to be changed."""


@dataclass(frozen=True)
class Earlier:
    """What is left of an earlier task: its mask, and its state if that was kept."""

    mask: Mask
    state: TrainingState | None


def start_scores(learner: Learner, samples: Samples, earlier: Sequence[Earlier], key: str, seed: int) -> TrainingState:
    """The start of a new task's training, by the setting `transfer`; random scores where there is no earlier task.

    auto trains every start on a part of the samples and takes the one with the least loss on the rest; of equals the
    first in the order random, mean, best.
    """
    transfer = learner.settings.transfer
    fresh = learner.fresh(key)
    if transfer == "none" or not earlier:
        return fresh
    starts: dict[str, Callable[[], TrainingState]] = {
        "none": lambda: fresh,
        "mean": lambda: _mean(learner, fresh, earlier),
        "best": lambda: _best(learner, samples, earlier),
    }
    if transfer != "auto":
        return starts[transfer]()
    training, held_out = learner.split(samples, seed)
    made = [make() for make in starts.values()]
    losses = [float(learner.losses(learner.train(start, training, seed), held_out).mean()) for start in made]
    return made[int(np.argmin(losses))]


def _mean(learner: Learner, fresh: TrainingState, earlier: Sequence[Earlier]) -> TrainingState:
    """The mean of all earlier scores, each layer scaled to the norm of random ones."""
    states = [_state(learner, task) for task in earlier]
    layers = zip(*(state.average for state in states), strict=True)
    means = [torch.stack(each).mean(dim=0) for each in layers]
    scores = [_matched(mean, start) for mean, start in zip(means, fresh.scores, strict=True)]
    return replace(fresh, scores=scores, average=[s.clone() for s in scores])


def _matched(scores: Tensor, like: Tensor) -> Tensor:
    norm = float(scores.norm())
    return scores * (float(like.norm()) / norm) if norm > 0 else like.clone()


def _best(learner: Learner, samples: Samples, earlier: Sequence[Earlier]) -> TrainingState:
    """The bits of the mask with the least loss on the samples; its scores are not taken, they are too sure."""
    losses = [float(learner.losses(_state(learner, task), samples).mean()) for task in earlier]
    return learner.from_mask(earlier[int(np.argmin(losses))].mask.packed, START_SURENESS)


def _state(learner: Learner, task: Earlier) -> TrainingState:
    return task.state if task.state is not None else learner.from_mask(task.mask.packed)
