"""The network that fits the first labelled batches: made once, then never changed."""

from __future__ import annotations

import numpy as np

from streams.batch import Batch, BatchRejected
from supsupd.learning.device import Device
from supsupd.learning.labels import ClassList, LabelMismatch
from supsupd.learning.learner import state_bytes
from supsupd.learning.modules import UnsupportedNetwork, check_kind
from supsupd.learning.network import Architecture, Network
from supsupd.learning.normalise import Normaliser, ShapeMismatch
from supsupd.learning.pretrained import Pretrained, PretrainedMismatch
from supsupd.learning.transforms import Transforms
from supsupd.sections import LearningSettings, NetworkSettings

SMALLEST_OUTPUTS = 100
"""Fewest output neurons by default: entropy tells tasks apart only among enough superfluous ones."""


def check_network(settings: NetworkSettings) -> None:
    """What can be told before there is data. Raises UnsupportedNetwork, PretrainedMismatch."""
    check_kind(settings.kind)
    if settings.pretrained is not None:
        Pretrained.load(settings.pretrained)


def wants_more_rows(settings: NetworkSettings, batches: list[Batch]) -> bool:
    """Whether the normalisation needs more rows than these before it can be frozen."""
    return settings.normalisation == "feature" and sum(len(b.x) for b in batches) < settings.feature_rows


def found_network(
    settings: NetworkSettings, learning: LearningSettings, batches: list[Batch], device: Device, spare: int = 0
) -> tuple[Network, Normaliser, ClassList]:
    """From labelled batches of one shape, of which the last one's classes begin the class list.

    `spare` outputs are never given to a class. Raises BatchRejected when its rows or classes do not fit what is set.
    """
    newest = batches[-1]
    wanted = tuple(settings.input_shape)
    if wanted and newest.x.shape[1:] != wanted:
        raise BatchRejected("schema_mismatch", f"rows of shape {newest.x.shape[1:]} came, {wanted} is set")
    assert newest.y is not None
    outputs = settings.outputs or max(SMALLEST_OUTPUTS, settings.headroom * len(np.unique(newest.y)))
    try:
        classes = ClassList((), outputs - spare).extended(newest.y)
    except LabelMismatch as error:
        raise BatchRejected("bad_labels", str(error)) from None
    try:
        rows = np.concatenate([b.x for b in batches])
        normaliser = Normaliser.fitted(settings.normalisation, rows, Transforms.of(settings.transforms))
        architecture = _architecture(settings, normaliser.output_shape, outputs)
        _refuse_too_large(architecture, learning)
        pretrained = Pretrained.load(settings.pretrained) if settings.pretrained is not None else None
        network = Network(architecture, settings.seed, device, pretrained)
    except (ShapeMismatch, UnsupportedNetwork, PretrainedMismatch) as error:
        raise BatchRejected("schema_mismatch", str(error)) from None
    return network, normaliser, classes


def _refuse_too_large(architecture: Architecture, learning: LearningSettings) -> None:
    """Raises BatchRejected where there is no room to train the network."""
    inputs, outputs, weights = architecture.inputs, architecture.outputs, architecture.weights
    size = state_bytes(architecture, learning)
    if size > learning.memory_bytes:
        raise BatchRejected(
            "too_large",
            f"{inputs} inputs and {outputs} outputs make a network of {weights} weights, which takes {size} bytes to "
            f"train, at most {learning.memory_bytes} expected (learning.memory_bytes, network.outputs, network.hidden)",
        )


def _architecture(settings: NetworkSettings, shape: tuple[int, ...], outputs: int) -> Architecture:
    """Raises UnsupportedNetwork."""
    hidden = tuple(settings.hidden) if settings.hidden is not None else None
    channels = tuple(settings.channels)
    changes = {"hidden": hidden, "channels": channels, "width": settings.width, "norm": settings.norm}
    return Architecture.of_kind(settings.kind, shape, outputs, **changes)
