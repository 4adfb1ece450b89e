"""Between the reservoir and its tables: finished masks become attractors in the transaction that finishes them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import structlog

from storage import masks, reservoir
from storage.masks import MaskCorrupt, MaskUnknown
from storage.reservoir import Matrix, ReservoirCorrupt
from supsupd.learning.network import Network
from supsupd.learning.predictor import Predictor
from supsupd.learning.records import TaskRecord
from supsupd.learning.reservoir import Reservoir, ReservoirMismatch, pattern_hash, recall
from supsupd.sections import ReservoirSettings

if TYPE_CHECKING:
    from storage.db import Session

TURNED = 0.1
"""The share of bits turned in a copy that a stored mask is recovered from."""
MEASURED = 64
"""Masks, the oldest, on which the recovery rate is measured: they go first; a second or two for the widest layers."""

log = structlog.get_logger("supsupd.learning")


def load_reservoir(session: Session, network: Network) -> Reservoir:
    """The stored matrices; made anew from the masks' bits where these or those are damaged, or where they hold what is
    no task's mask now."""
    heads = masks.list_head_hashes(session)
    stored, damaged = _patterns(session)
    stale = [mask for mask in stored if mask.sha256 not in heads]
    gone = [*damaged, *(mask.task_id for mask in stale)]
    try:
        held = _stored(session, network, stored)
        reason = f"{len(gone)} of its patterns are no task's mask any more" if gone else ""
    except (ReservoirCorrupt, ReservoirMismatch) as error:
        held, reason = Reservoir.empty(network), str(error)
    if not reason:
        return held
    for task_id in gone:
        reservoir.remove_pattern(session, task_id)
    anew = Reservoir.empty(network)
    for mask in stored:
        if mask not in stale:
            anew = anew.with_pattern(np.frombuffer(mask.packed, np.uint8), network)
    save_matrices(session, anew)
    log.warning("reservoir_made_anew", patterns=len(anew.patterns), reason=reason)
    return anew


def _patterns(session: Session) -> tuple[list[masks.MaskRow], list[int]]:
    """The masks that are recorded as attractors, and the tasks of those that are damaged."""
    stored, damaged = [], []
    for pattern in reservoir.list_patterns(session):
        try:
            stored.append(masks.load_mask(session, pattern.task_id, pattern.version))
        except (MaskCorrupt, MaskUnknown):
            damaged.append(pattern.task_id)
    return stored, damaged


def _stored(session: Session, network: Network, stored: list[masks.MaskRow]) -> Reservoir:
    """What the matrices hold, if that is these masks. Raises ReservoirCorrupt, ReservoirMismatch."""
    matrices = reservoir.load_matrices(session)
    if not matrices and not stored:
        return Reservoir.empty(network)
    held = Reservoir.from_bytes([matrix.payload for matrix in matrices], [mask.sha256 for mask in stored], network)
    if counts := {matrix.patterns for matrix in matrices} - {len(stored)}:
        raise ReservoirMismatch(f"reservoir: a matrix holds {min(counts)} patterns, {len(stored)} are recorded")
    return held


def finish(session: Session, held: Reservoir, tasks: Iterable[TaskRecord], network: Network) -> Reservoir:
    """With the masks of these tasks as attractors, stored; those beyond the capacity are left out."""
    new = held
    for task in tasks:
        if len(new.patterns) + 1 > new.capacity:
            log.warning("reservoir_full", task=task.task_id, patterns=len(new.patterns), capacity=int(new.capacity))
            break
        if (more := new.with_pattern(task.packed, network)) is not new:
            reservoir.add_pattern(session, task.task_id, task.version)
            new = more
    if new is not held:
        save_matrices(session, new)
    return new


def save_matrices(session: Session, held: Reservoir) -> None:
    for layer, (payload, total) in enumerate(zip(held.to_bytes(), held.totals, strict=True)):
        reservoir.save_matrix(session, Matrix(layer, len(total), len(held.patterns), payload))


def warn_of_load(held: Reservoir, settings: ReservoirSettings) -> None:
    """Says in the log that the reservoir is nearly full."""
    if held.load >= settings.warn_load:
        log.warning(
            "reservoir_near_capacity",
            patterns=len(held.patterns),
            load=round(held.load, 3),
            advice="masks are kept as bits as well; more of them are kept as bits alone",
        )


def describe(predictor: Predictor) -> dict[str, Any]:
    """The reservoir in figures; {"enabled": False} without one."""
    if predictor.recovery is None:
        return {"enabled": False}
    held, network = predictor.recovery.reservoir, predictor.scorer.network
    tasks = {pattern_hash(task.packed): task for task in predictor.tasks}
    served = [tasks[digest] for digest in held.patterns if digest in tasks]
    oldest = served[:MEASURED]
    back = recall(held, [task.packed for task in oldest], network, TURNED, seed=0)
    mask_bytes = network.architecture.bit_bytes
    return {
        "enabled": True,
        "patterns": len(held.patterns),
        "tasks": [task.task_id for task in served],
        "capacity": int(held.capacity),
        "load": round(held.load, 4),
        "units": [len(total) for total in held.totals],
        "matrix_bytes": held.nbytes,
        "raw_bytes": len(held.patterns) * mask_bytes,
        "break_even_patterns": -(-held.nbytes // mask_bytes),
        "bits_kept": True,
        "recovery_tried": len(back),
        "recovered": sum(back),
        "recovery_rate": round(sum(back) / len(back), 4) if back else None,
        "recovered_from": f"a copy with {TURNED:.0%} of its bits turned, by the energy alone",
    }
