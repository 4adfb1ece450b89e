"""A stream of labelled batches whose task changes without notice, and what a daemon made of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

SPREAD = 0.25
"""Visits last this share more or less than their mean: boundaries fall anywhere in a batch."""


@dataclass(frozen=True)
class StreamTask:
    """One true task: its name, `transform` from images (n, H, W) to its own images, and its training rows."""

    name: str
    transform: Callable[[np.ndarray], np.ndarray]
    x: np.ndarray
    y: np.ndarray

    def sample(self, count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """`count` different rows, at random."""
        rows = rng.choice(len(self.x), count, replace=False)
        return self.transform(self.x[rows]), self.y[rows]


@dataclass(frozen=True)
class StreamBatch:
    """A batch with the true task (n,) of each of its rows, which only the judge sees."""

    name: str
    x: np.ndarray
    y: np.ndarray
    truth: np.ndarray

    @property
    def task(self) -> int:
        """The true task of most of its rows."""
        return int(np.bincount(self.truth).argmax())


def order_visits(tasks: int, times: int, rng: np.random.Generator) -> np.ndarray:
    """Each task `times` times, in rounds of their own random order and never twice in a row."""
    rounds = [rng.permutation(tasks)]
    while len(rounds) < times:
        following = rng.permutation(tasks)
        rounds.append(np.roll(following, 1) if following[0] == rounds[-1][-1] else following)
    return np.concatenate(rounds)


def iter_batches(
    tasks: list[StreamTask], visits: np.ndarray, visit_batches: float, rows: int, rng: np.random.Generator
) -> Iterator[StreamBatch]:
    """The visits in turn, `visit_batches` batches long in the mean, cut every `rows` rows; an odd end is left out."""
    mean = visit_batches * rows
    lengths = rng.uniform((1 - SPREAD) * mean, (1 + SPREAD) * mean, len(visits)).astype(int)
    truth = np.repeat(visits, lengths)
    for number, start in enumerate(range(0, len(truth) - rows + 1, rows), start=1):
        part = truth[start : start + rows]
        runs = np.split(part, np.flatnonzero(np.diff(part)) + 1)
        samples = [tasks[run[0]].sample(len(run), rng) for run in runs]
        x, y = (np.concatenate(column) for column in zip(*samples, strict=True))
        yield StreamBatch(f"batch-{number:04d}", x, y, part)


def batch_name(row: Mapping[str, Any]) -> str:
    """The stream's name of a row of the ledger."""
    return str(row["name"]).removesuffix(".npz")


def count_overlap(rows: list[dict[str, Any]], batches: Mapping[str, StreamBatch]) -> dict[int, dict[int, int]]:
    """Found task -> true task -> batches, of the ledger's rows that have a task."""
    overlap: dict[int, dict[int, int]] = {}
    for row in rows:
        if row["state"] == "committed":
            counts = overlap.setdefault(row["task"], {})
            true = batches[batch_name(row)].task
            counts[true] = counts.get(true, 0) + 1
    return overlap


def name_owners(overlap: Mapping[int, Mapping[int, int]]) -> dict[int, int]:
    """Found task -> the true task that most of its batches are of."""
    return {found: max(counts, key=lambda true: counts[true]) for found, counts in overlap.items()}
