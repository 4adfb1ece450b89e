"""Unlabelled batches: what is predicted for them, whose they seem to be, and what a file says of it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal

from streams.batch import Batch, BatchRejected
from supsupd.learning.normalise import ShapeMismatch
from supsupd.learning.predictor import Predictor
from supsupd.learning.queries import Answer

FIELDS = ("label", "task", "entropy", "known")


@dataclass(frozen=True)
class Score:
    """The answer for a batch, taken as one task's, and the decision that goes into the ledger."""

    answer: Answer
    kind: Literal["known", "unsure"]
    task_id: int
    reason: str
    evidence: dict[str, Any]


def score(predictor: Predictor, batch: Batch, place: int | None = None) -> Score:
    """Under the mask at `place` if it is given. Raises BatchRejected for rows of another width."""
    try:
        answer = predictor.predict(batch.x, place, per_sample=False)
    except ShapeMismatch as error:
        raise BatchRejected("schema_mismatch", str(error)) from None
    known, task_id = bool(answer.known[0]), int(answer.task[0])
    word = "within" if known else "beyond"
    reason = f"{predictor.objective} {answer.surprise:.2f} sd from task {task_id}'s own, {word} {answer.limit:.2f}"
    evidence = {
        "evidence": predictor.objective,
        "entropy": round(float(answer.entropy.mean()), 4),
        "surprise": round(answer.surprise, 3),
        "surprise_limit": round(answer.limit, 3),
    }
    if answer.recovered is not None:
        evidence["recovered"] = bool(answer.recovered.all())
    return Score(answer, "known" if known else "unsure", task_id, reason, evidence)


def show(predictor: Predictor, answer: Answer) -> bytes:
    """The file of predictions: one object per row, as `supsup-cli predict --json` prints them."""
    columns = (
        predictor.classes.decode(answer.predicted),
        answer.task.tolist(),
        answer.entropy.tolist(),
        answer.known.tolist(),
    )
    text = json.dumps([dict(zip(FIELDS, row, strict=True)) for row in zip(*columns, strict=True)], indent=1)
    return f"{text}\n".encode()
