"""The tools that tasks and provisional tasks are made with: scoring, training, seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from supsupd.learning.bank import Mask, Masks
from supsupd.learning.inference import MaskScores, Scorer
from supsupd.learning.learner import Learner, Samples, derive_seed
from supsupd.learning.records import Member
from supsupd.sections import RecognitionSettings


@dataclass(frozen=True)
class Workshop:
    scorer: Scorer
    learner: Learner
    settings: RecognitionSettings

    def score(self, samples: Samples, masks: Sequence[Mask], classes: int) -> MaskScores:
        """The samples under masks; there may be none."""
        return self.scorer.score(samples.x.cpu().numpy(), Masks(masks), classes, samples.y.cpu().numpy())

    def seed(self, member: Member) -> int:
        return derive_seed(self.learner.settings.seed, member.batch.seed)


def of_first(scores: MaskScores) -> dict[str, np.ndarray]:
    """The evidence (n,) by name of the first mask."""
    return {name: values[0] for name, values in scores.evidence.items()}
