"""What a query is and what it is answered with, and what is served of a task."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from supsupd.choices import Method, Objective
from supsupd.learning.bank import Mask
from supsupd.learning.index import InputDensity
from supsupd.learning.reference import Gauge

ROUTING_ROWS = 128
"""Rows of a pooled query that name its task; more would cost time and no longer change the answer."""


@dataclass(frozen=True)
class Shortlist:
    """Beyond `above` tasks, queries are scored under the `queried` masks of the most likely inputs only."""

    above: int
    queried: int


@dataclass(frozen=True, slots=True)
class ServedTask:
    """One task's newest mask, and the records, by name, of the evidence that routes to it.

    `labels`: the class indices that the task has seen. `inputs`: what its inputs look like, where that is known.
    """

    task_id: int
    version: int
    mask: Mask
    evidence: Mapping[str, Gauge]
    labels: frozenset[int] = frozenset()
    inputs: InputDensity | None = None

    @property
    def packed(self) -> np.ndarray:
        """The mask's bits, uint8 (mask_bytes,)."""
        return self.mask.packed


@dataclass(frozen=True)
class Query:
    """How rows want to be answered.

    Args:
        place: of the mask to use; None: it is inferred.
        per_sample: of each row by itself; else one task for all rows together.
        method, objective: how it is inferred.
    """

    place: int | None
    per_sample: bool
    method: Method
    objective: Objective

    @property
    def judged(self) -> Objective:
        """What says whether rows are at home under their mask. Features name the task; this the mask says."""
        return "entropy" if self.objective == "features" else self.objective


@dataclass(frozen=True)
class Answer:
    """For n rows: class indices (n,), probabilities (n, classes), or (n, 0) where nobody wants them, task ids (n,),
    entropy in nats (n,), known (n,).

    `surprise` is the mean standardised evidence and `limit` what it may be for a known task. `recovered` (n,): whether
    the mask was found by descent in the reservoir; None where that was not tried.
    """

    predicted: np.ndarray
    probabilities: np.ndarray
    task: np.ndarray
    entropy: np.ndarray
    known: np.ndarray
    surprise: float
    limit: float
    recovered: np.ndarray | None = None
