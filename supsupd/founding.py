"""The network that fits the first labelled batches: made once, then never changed."""

from __future__ import annotations

import numpy as np

from streams.batch import Batch, BatchRejected
from supsupd.config import NetworkSettings
from supsupd.learning.device import Device
from supsupd.learning.labels import ClassList, LabelMismatch
from supsupd.learning.network import Architecture, Network
from supsupd.learning.normalise import Normaliser

SMALLEST_OUTPUTS = 100
"""Fewest output neurons by default: entropy tells tasks apart only among enough superfluous ones."""


def wants_more_rows(settings: NetworkSettings, batches: list[Batch]) -> bool:
    """Whether the normalisation needs more rows than these before it can be frozen."""
    return settings.normalisation == "feature" and sum(len(b.x) for b in batches) < settings.feature_rows


def found_network(
    settings: NetworkSettings, batches: list[Batch], device: Device
) -> tuple[Network, Normaliser, ClassList]:
    """From labelled batches of one shape, of which the last one's classes begin the class list.

    Raises BatchRejected when its rows or classes do not fit what is set.
    """
    newest = batches[-1]
    wanted = tuple(settings.input_shape)
    if wanted and newest.x.shape[1:] != wanted:
        raise BatchRejected("schema_mismatch", f"rows of shape {newest.x.shape[1:]} came, {wanted} is set")
    assert newest.y is not None
    outputs = settings.outputs or max(SMALLEST_OUTPUTS, settings.headroom * len(np.unique(newest.y)))
    try:
        classes = ClassList((), outputs).extended(newest.y)
    except LabelMismatch as error:
        raise BatchRejected("bad_labels", str(error)) from None
    architecture = Architecture(newest.x.shape[1:], tuple(settings.hidden), outputs)
    normaliser = Normaliser.fitted(settings.normalisation, np.concatenate([b.x for b in batches]))
    return Network(architecture, settings.seed, device), normaliser, classes
