"""Several queries answered in one pass: rows of different queries share the normalisation and their masks' runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from supsupd.choices import Objective
from supsupd.learning.inference import EVIDENCE, ObjectiveUnavailable
from supsupd.learning.kernels import outcomes
from supsupd.learning.normalise import ShapeMismatch, TooFewRows, TooManyRows
from supsupd.learning.queries import ROUTING_ROWS, Answer, Query

if TYPE_CHECKING:
    from supsupd.learning.predictor import Predictor

Refused = ShapeMismatch | ObjectiveUnavailable
"""Why a single query of several has no answer."""


SLICE_ROWS, SLICE_VALUES = 256, 1 << 18
"""Of a large query, that are answered at once: rows, and their inputs."""
DEPENDENT_VALUES = 1 << 23
"""Inputs of all rows of a query that can't be sliced."""


def answer_together(predictor: Predictor, asked: Sequence[tuple[np.ndarray, Query]]) -> list[Answer | Refused]:
    """What each (raw rows (n, ...), query) is answered with alone, up to the rounding of sums.

    A query of several rows still names its task by its own rows only. Rows that depend on each other (batch
    normalisation) stay with their query altogether.
    """
    answers: dict[int, Answer | Refused] = {}
    ready: list[_Part] = []
    row_alone = predictor.scorer.network.architecture.row_alone
    for index, rows in enumerate(_normalised(predictor, asked)):
        query = asked[index][1]
        if isinstance(rows, ShapeMismatch):
            answers[index] = rows
        elif not row_alone and (query.per_sample or len(rows) == 1):
            answers[index] = TooFewRows(
                "one row came, units normalised by the batch take at least 2 together (network.norm)"
            )
        else:
            ready.append(_Part(index, rows, query))
    for parts in [ready] if row_alone else [[part] for part in ready]:
        answers |= _route(predictor, parts)
        answers |= _run([part for part in parts if part.index not in answers], predictor)
    return [answers[index] for index in range(len(asked))]


def answer_in_slices(
    predictor: Predictor, x: np.ndarray, query: Query, brief: bool = False
) -> Iterator[Answer | Refused | None]:
    """What raw rows x (n, ...) are answered with by `answer_together`, up to the rounding of sums, in steps that take
    little memory and time each: None after a step, at last the answer. Rows that depend on each other are one step.

    brief: the answer has no probabilities, which take most of its room where there are many classes.
    """
    if not predictor.scorer.network.architecture.row_alone:
        most = DEPENDENT_VALUES // max(1, x[0].size)
        if len(x) > most:
            yield TooManyRows(f"{len(x)} rows came, {most} at most are normalised together (network.norm)")
            return
        yield from answer_together(predictor, [(x, query)])
        return
    try:
        yield from _in_slices(predictor, x, query, brief)
    except (ShapeMismatch, ObjectiveUnavailable) as error:
        yield error


def _in_slices(predictor: Predictor, x: np.ndarray, query: Query, brief: bool) -> Iterator[Answer | None]:
    """Raises ShapeMismatch, ObjectiveUnavailable."""
    asked, recovered = query, None
    if not query.per_sample:  # its first rows name the task of all
        first = _routed(predictor, x[:ROUTING_ROWS], query)
        asked = replace(query, place=int(first.places[0]))
        recovered = None if first.recovered is None else np.full(len(x), first.recovered[0])
    size = max(1, min(SLICE_ROWS, SLICE_VALUES // max(1, x[0].size)))
    places: list[np.ndarray] = []
    found: list[np.ndarray] = []
    columns: list[tuple[np.ndarray, ...]] = []
    for start in range(0, len(x), size):
        part = _routed(predictor, x[start : start + size], asked)
        probabilities, *others = _forward(predictor, part.rows, part.places, query.judged)
        columns.append((probabilities.argmax(axis=1), probabilities[:, :0] if brief else probabilities, *others))
        places.append(part.places)
        found += [] if part.recovered is None else [part.recovered]
        yield None
    recovered = np.concatenate(found) if found else recovered
    whole = _Part(0, x, query, np.concatenate(places), recovered)
    yield _answer(predictor, whole, *(np.concatenate(column) for column in zip(*columns, strict=True)))


def _routed(predictor: Predictor, x: np.ndarray, query: Query) -> _Part:
    """Some raw rows with the places of their masks. Raises ShapeMismatch, ObjectiveUnavailable."""
    part = _Part(0, predictor.normaliser(x), query)
    for refused in _route(predictor, [part]).values():
        assert isinstance(refused, Exception)
        raise refused
    return part


@dataclass(slots=True)
class _Part:
    """One of the queries: its normalised rows and, once they are known, the places of their masks."""

    index: int
    rows: np.ndarray  # (n, inputs) float32
    query: Query
    places: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))  # (n,)
    recovered: np.ndarray | None = None

    @property
    def is_each(self) -> bool:
        """Whether every row is routed by itself, under all masks."""
        is_exact = self.query.place is None and self.query.method == "exact"
        return is_exact and (self.query.per_sample or len(self.rows) == 1)


def _normalised(predictor: Predictor, asked: Sequence[tuple[np.ndarray, Query]]) -> list[np.ndarray | ShapeMismatch]:
    """Rows as the network takes them; those that came in one shape and type are normalised together."""
    kinds: dict[tuple[object, ...], list[int]] = {}
    for index, (x, _) in enumerate(asked):
        kinds.setdefault((x.dtype, *x.shape[1:]), []).append(index)
    found: dict[int, np.ndarray | ShapeMismatch] = {}
    for alike in kinds.values():
        raw = [asked[index][0] for index in alike]
        try:
            rows = predictor.normaliser(_joined(raw))
        except ShapeMismatch as error:
            found |= dict.fromkeys(alike, error)
        else:
            found |= zip(alike, _split(rows, raw), strict=True)
    return [found[index] for index in range(len(asked))]


def _route(predictor: Predictor, parts: Sequence[_Part]) -> dict[int, Answer | Refused]:
    """Sets the places of all rows; returns what cannot be routed as it wants."""
    refused: dict[int, Answer | Refused] = {}
    for part in parts:
        try:
            if part.query.place is None and part.query.method == "recover":
                part.places, part.recovered = predictor.recovered(part.rows, part.query)
            elif not part.is_each:
                part.places = predictor.infer(part.rows, part.query)
        except ObjectiveUnavailable as error:
            refused[part.index] = error
    for objective in {part.query.objective for part in parts if part.is_each}:
        alike = [part for part in parts if part.is_each and part.query.objective == objective]
        query = Query(None, per_sample=True, method="exact", objective=objective)
        try:
            places = predictor.infer(_joined([part.rows for part in alike]), query)
        except ObjectiveUnavailable as error:
            refused |= {part.index: error for part in alike}
        else:
            for part, own in zip(alike, _split(places, [part.rows for part in alike]), strict=True):
                part.places = own
    return refused


def _run(parts: Sequence[_Part], predictor: Predictor) -> dict[int, Answer | Refused]:
    """Runs each row under its mask, once: the answer and what it says about being at home come from the same."""
    answers: dict[int, Answer | Refused] = {}
    for judged in {part.query.judged for part in parts}:
        alike = [part for part in parts if part.query.judged == judged]
        rows = [part.rows for part in alike]
        ran = _forward(predictor, _joined(rows), _joined([part.places for part in alike]), judged)
        for part, *own in zip(alike, *(_split(column, rows) for column in ran), strict=True):
            answers[part.index] = _answer(predictor, part, own[0].argmax(axis=1), *own)
    return answers


def _forward(
    predictor: Predictor, rows: np.ndarray, places: np.ndarray, judged: Objective
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Probabilities (n, classes), entropy (n,) and surprise (n,) of each row under its mask."""
    count, classes = len(rows), len(predictor.classes)
    probabilities = np.empty((count, classes), np.float32)
    entropies, surprise = np.empty(count, np.float32), np.empty(count)
    found = set(places.tolist())
    for place in found:
        mine: np.ndarray | slice = places == place if len(found) > 1 else slice(None)
        logits = predictor.scorer.run(rows[mine], predictor.masks[place])
        probabilities[mine], raw = outcomes(logits.cpu().numpy(), predictor.allowed(place))
        entropies[mine] = raw
        if judged != "entropy":
            raw = EVIDENCE[judged](logits, classes).cpu().numpy()
        surprise[mine] = predictor.gauge(place, judged).surprise(raw)
    return probabilities, entropies, surprise


def _answer(
    predictor: Predictor,
    part: _Part,
    predicted: np.ndarray,
    probabilities: np.ndarray,
    entropies: np.ndarray,
    surprise: np.ndarray,
) -> Answer:
    query, count = part.query, len(part.rows)
    places = part.places.tolist()
    surprised = float(surprise.sum()) / count
    if not query.per_sample:  # all rows have one place
        surprise = np.full(count, surprised)
    averaged = 1 if query.per_sample else count
    error = predictor.false_alarm
    limit_of = {place: predictor.gauge(place, query.judged).limit(averaged, error) for place in set(places)}
    limits = np.array([limit_of[place] for place in places])
    return Answer(
        predicted=predicted,
        probabilities=probabilities,
        task=np.array([predictor.tasks[place].task_id for place in places], dtype=np.int64),
        entropy=entropies,
        known=surprise <= limits,
        surprise=surprised,
        limit=float(limits.sum()) / count,
        recovered=part.recovered,
    )


def _joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _split(values: np.ndarray, like: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Consecutive parts of `values`, as long as each of `like`."""
    if len(like) == 1:
        return [values]
    ends = np.cumsum([len(part) for part in like]).tolist()
    return [values[end - len(part) : end] for end, part in zip(ends, like, strict=True)]
