"""Which learner the settings ask for."""

from __future__ import annotations

from supsupd.learning.continual import ContinualLearner
from supsupd.learning.given import GivenLearner
from supsupd.learning.paper_rule import PaperLearner
from supsupd.learning.tasks import TaskLearner
from supsupd.sections import RecognitionSettings


def pick_learner(recognition: RecognitionSettings) -> type[TaskLearner]:
    """By the scenario: tasks that are given; else by the rule of recognition."""
    if recognition.tasks_given:
        return GivenLearner
    return PaperLearner if recognition.rule == "paper" else ContinualLearner
