"""Unlabelled batches: what is predicted for them, whose they seem to be, and what a file says of it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal

from streams.batch import Batch, BatchRejected
from supsupd.learning.joint import answer_in_slices
from supsupd.learning.normalise import ShapeMismatch
from supsupd.learning.predictor import Predictor
from supsupd.learning.queries import Answer

SHOWN_ROWS = 4096
"""Rows that are Python objects at once."""
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
    *_, answer = answer_in_slices(predictor, batch.x, predictor.query(place, per_sample=False), brief=True)
    if isinstance(answer, ShapeMismatch):
        raise BatchRejected("schema_mismatch", str(answer))
    if isinstance(answer, Exception):
        raise answer
    assert answer is not None
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
    parts = [_shown(predictor, answer, slice(at, at + SHOWN_ROWS)) for at in range(0, len(answer.task), SHOWN_ROWS)]
    return b"[\n " + b",\n ".join(parts) + b"\n]\n"


def _shown(predictor: Predictor, answer: Answer, rows: slice) -> bytes:
    """Some rows as objects, as `json.dumps` shows them in a list."""
    columns = (
        predictor.classes.decode(answer.predicted[rows]),
        answer.task[rows].tolist(),
        answer.entropy[rows].tolist(),
        answer.known[rows].tolist(),
    )
    shown = [dict(zip(FIELDS, row, strict=True)) for row in zip(*columns, strict=True)]
    return json.dumps(shown, indent=1)[3:-2].encode()
