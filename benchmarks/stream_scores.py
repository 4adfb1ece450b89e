"""What a daemon made of a stream, against the truth: how the batches were sorted, how queries are answered."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from common import StreamBatch, StreamTask, batch_name, count_overlap, name_owners
from sklearn.metrics import adjusted_rand_score

from supsupd.client import Client

SINGLE_ROWS = 500
GROUP_ROWS = 32
REQUEST_ROWS = 1000


@dataclass(frozen=True)
class Sorting:
    """How the batches went to masks.

    Args:
        assigned, unsure, refused: batches that got a task, that wait for more of their kind, that were given up.
        purity: of the assigned batches, those whose majority task is their mask's majority task.
        row_purity: of the rows of the assigned batches, those of their mask's majority task.
        row_ceiling: what `row_purity` would be if every batch went to its own majority task: batches straddle.
        rand: adjusted Rand index of masks against majority tasks, over the assigned batches.
    """

    batches: int
    assigned: int
    unsure: int
    refused: int
    purity: float
    row_purity: float
    row_ceiling: float
    rand: float

    @classmethod
    def of(cls, rows: list[dict[str, Any]], batches: Mapping[str, StreamBatch]) -> Sorting:
        owners = name_owners(count_overlap(rows, batches))
        assigned = [(row["task"], batches[batch_name(row)]) for row in rows if row["state"] == "committed"]
        states = [row["state"] for row in rows]
        return cls(
            batches=len(batches),
            assigned=len(assigned),
            unsure=states.count("unsure"),
            refused=states.count("quarantined"),
            purity=_mean(owners[mask] == batch.task for mask, batch in assigned),
            row_purity=_mean((batch.truth == owners[mask]).mean() for mask, batch in assigned),
            row_ceiling=_mean((batch.truth == batch.task).mean() for _, batch in assigned),
            rand=adjusted_rand_score([batch.task for _, batch in assigned], [mask for mask, _ in assigned]),
        )


@dataclass(frozen=True)
class Answers:
    """Queries of test images, over all true tasks; a task without a mask of its own has nothing right.

    Args:
        routed_single, routed_group: task inferred right, from one image and from `GROUP_ROWS` together.
        accuracy_given, accuracy_inferred: labels right on all test images, the mask given or inferred group by group.
    """

    routed_single: float
    routed_group: float
    accuracy_given: float
    accuracy_given_least: float
    accuracy_inferred: float
    accuracy_inferred_least: float

    @classmethod
    def ask(cls, client: Client, tests: list[StreamTask], overlap: dict[int, dict[int, int]]) -> Answers:
        """Queries the daemon; `overlap` says which mask is of which true task."""
        owners = name_owners(overlap)
        single, group, given, inferred = [], [], [], []
        for true, test in enumerate(tests):
            x = test.transform(test.x)
            rows = _spread(len(x), SINGLE_ROWS)
            single.append(_mean(owners[a["task"]] == true for a in client.predict(x[rows], per_sample=True)))
            given.append(_ask_given(client, x, test.y, _own_mask(overlap, true)))
            whole = len(x) - len(x) % GROUP_ROWS
            groups = [client.predict(x[part]) for part in _parts(whole, GROUP_ROWS)]
            group.append(_mean(owners[answer[0]["task"]] == true for answer in groups))
            inferred.append(_share_right(groups, test.y[:whole]))
        return cls(_mean(single), _mean(group), _mean(given), min(given), _mean(inferred), min(inferred))


def _ask_given(client: Client, x: np.ndarray, y: np.ndarray, mask: int | None) -> float:
    if mask is None:
        return 0.0
    return _share_right([client.predict(x[part], task=mask) for part in _parts(len(x), REQUEST_ROWS)], y)


def _share_right(answers: list[list[dict[str, Any]]], labels: np.ndarray) -> float:
    return _mean(np.array([row["label"] for answer in answers for row in answer]) == labels)


def _own_mask(overlap: dict[int, dict[int, int]], true: int) -> int | None:
    own = [mask for mask, owner in name_owners(overlap).items() if owner == true]
    return max(own, key=lambda mask: overlap[mask][true], default=None)


def score_before_training(client: Client, masks: Iterable[int]) -> float:
    """Prequential accuracy: the share of rows that their mask had right before it was trained on them.

    Over the batches that were recognised, of the newest decisions that the daemon shows for each task.
    """
    errors = rows = 0
    for decision in (d for mask in masks for d in client.task(mask)["decisions"] if d["decision"] == "known"):
        start, stop = decision["evidence"]["rows"]
        errors += decision["evidence"]["candidates"][0]["errors"]
        rows += stop - start
    return 1 - errors / rows if rows else 0.0


def _parts(count: int, size: int) -> Iterator[slice]:
    return (slice(start, start + size) for start in range(0, count, size))


def _spread(count: int, wanted: int) -> np.ndarray:
    """`wanted` of `count` row numbers, evenly."""
    return np.linspace(0, count - 1, min(wanted, count)).astype(int)


def _mean(values: Iterable[Any]) -> float:
    values = list(values)
    return float(np.mean(values)) if values else 0.0
