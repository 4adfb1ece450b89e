"""Whether the numbers in a store are fit to go on with: finite, and what another state directory would take in."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load

from storage import features, networks, tasks, training_states
from storage.masks import MaskCorrupt
from supsupd.admission import architecture_of, check_mask
from supsupd.learning.features import FeatureModel
from supsupd.moving import identity_of, portable_of
from supsupd.portable import FileRefused

if TYPE_CHECKING:
    from storage.db import Session


def list_unfit(session: Session) -> list[str]:
    """What is not, in words. The masks' hashes are looked at elsewhere."""
    network = networks.get_network(session)
    if network is None:
        return []
    try:
        architecture = architecture_of(identity_of(network), network.normalisation_data)
    except (FileRefused, ValueError) as error:
        return [" ".join(str(error).split())]
    problems = []
    for row in tasks.iter_tasks(session, retired=True):
        try:
            check_mask(portable_of(session, row), architecture, len(network.classes))
        except (FileRefused, MaskCorrupt) as error:
            problems.append(str(error))
        except ValueError as error:
            problems.append(f"task.{row.id}: {' '.join(str(error).split())}")
    return problems + [f"{where}: expected finite numbers" for where, data in _stored(session) if not _is_finite(data)]


def _stored(session: Session) -> Iterator[tuple[str, bytes | Iterable[np.ndarray]]]:
    """What only this state directory keeps: safetensors, or arrays."""
    for row in tasks.iter_tasks(session, retired=True):
        if row.statistics is not None:
            yield f"task.{row.id}: sums of features", row.statistics
    for state in training_states.iter_states(session):
        yield f"task.{state.task_id}: training state", state.payload
    if (products := features.get_products(session)) is not None:
        yield "features", [FeatureModel.products_from_bytes(products)]


def _is_finite(data: bytes | Iterable[np.ndarray]) -> bool:
    try:
        arrays = load(data).values() if isinstance(data, bytes) else data
    except SafetensorError:
        return False
    return all(np.isfinite(array).all() for array in arrays)
