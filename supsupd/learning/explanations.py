"""Two sources in one batch: one after the other (a change point), or row by row in any order (a mixture).

Streams do not cut their batches at the change of a task, and may change slowly. Either is believed only if it beats
one explanation of all rows by the price of choosing it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from supsupd.learning.statistics import split_rows

FLOOR_SHARE = 0.1
PARTNERS = 8
"""Second masks tried for a mixture of rows."""


@dataclass(frozen=True)
class Explanation:
    """What two sources make of a batch.

    Args:
        start, stop: the rows of the larger source, but for those that are left_out.
        rest_explained: whether a mask explains the other rows.
        log_likelihood: of all rows, less the price of the choice.
    """

    start: int
    stop: int
    left_out: tuple[int, ...]
    rest_explained: bool
    log_likelihood: float


def change_point(probability: np.ndarray, null: np.ndarray, error: float) -> Explanation | None:
    """The best single change of explanation, if it is believed; label probabilities and their null, (k, n) each.

    Explanations are the k masks and "none of them". The price is that of choosing among k + 1 explanations and n cuts
    at `error`.
    """
    log_mask = np.log(floored(probability, null))
    log_none = np.log(null.max(axis=0, keepdims=True))
    prefix = np.cumsum(np.pad(np.concatenate([log_mask, log_none]), ((0, 0), (1, 0))), axis=1)
    suffix = prefix[:, -1:] - prefix
    both = prefix.max(axis=0) + suffix.max(axis=0)
    cut, rows = int(both.argmax()), probability.shape[1]
    price = math.log(len(prefix) * rows / error)
    if both[cut] - both[0] <= price:
        return None
    left, right = int(prefix[:, cut].argmax()), int(suffix[:, cut].argmax())
    none = len(prefix) - 1
    gained = float(both[cut]) - price
    if cut >= rows - cut:
        return Explanation(0, cut, (), right != none, gained)
    return Explanation(cut, rows, (), left != none, gained)


def mixture(probability: np.ndarray, null: np.ndarray, error: float) -> Explanation | None:
    """Two masks that share the rows out among themselves, if that is believed; arguments as of `change_point`.

    The price is that of choosing among k² pairs at `error`. The partner of the best mask is looked for among the
    PARTNERS that could gain most.
    """
    if len(probability) < 2:
        return None
    likelihood = floored(probability, null)
    logs = np.log(likelihood)
    first = int(logs.sum(axis=1).argmax())
    gain = np.maximum(logs - logs[first], 0.0).sum(axis=1)
    partners = np.argsort(-gain, kind="stable")[:PARTNERS].tolist()
    splits = [split_rows(likelihood[first], likelihood[partner]) for partner in partners if partner != first]
    posterior, together = max(splits, key=lambda split: split[1])
    price = math.log(len(logs) ** 2 / error)
    own = posterior > 0.5
    smaller = ~own if 2 * own.sum() >= len(own) else own
    if together - float(logs[first].sum()) <= price or not smaller.any():
        return None
    return Explanation(0, len(own), tuple(np.flatnonzero(smaller).tolist()), True, together - price)


def floored(probability: np.ndarray, null: np.ndarray) -> np.ndarray:
    """A mask's likelihood of the labels, with a share of the null, so that no row rules it out."""
    return (1.0 - FLOOR_SHARE) * probability + FLOOR_SHARE * null
