"""Whether a file of masks fits: that its network can be, that it is the one here, and that each mask is one of it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from safetensors import SafetensorError

from storage import packing
from storage.models import NetworkRow
from supsupd import scenarios
from supsupd.learning.index import InputMoments
from supsupd.learning.modules import UnsupportedNetwork
from supsupd.learning.network import Architecture
from supsupd.learning.normalise import Normaliser
from supsupd.learning.reference import Reference
from supsupd.learning.transforms import ShapeMismatch
from supsupd.portable import FileRefused, MaskFile, NetworkIdentity, PortableMask


class NetworkDiffers(ValueError):
    """The masks of a file belong to another network than that of the state directory; the text says how it differs."""


def architecture_of(network: NetworkIdentity, normalisation_data: bytes | None) -> Architecture:
    """Raises FileRefused unless there is such a network, with such classes and inputs."""
    try:
        architecture = Architecture.from_json(network.architecture)
        normaliser = _normaliser(network.normalisation, normalisation_data)
        if normaliser.output_shape != architecture.input_shape:
            raise ValueError(f"inputs of {normaliser.output_shape}, expected {architecture.input_shape}")
        if len(set(network.classes)) != len(network.classes) or len(network.classes) > architecture.outputs:
            raise ValueError(f"{len(network.classes)} classes, expected up to {architecture.outputs} different ones")
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError, UnsupportedNetwork, ShapeMismatch) as error:
        raise FileRefused(f"network: {' '.join(str(error).split())}") from None
    return architecture


def _normaliser(stored: dict[str, Any], data: bytes | None) -> Normaliser:
    """Raises ValueError for frozen arrays that are none, and what else `from_stored` does."""
    try:
        normaliser = Normaliser.from_stored(stored, data)
    except SafetensorError as error:
        raise ValueError(f"normalisation: {error}") from None
    if normaliser.rule not in ("sample", "feature", "none"):
        raise ValueError(f"normalisation: {normaliser.rule!r} is unknown")
    inputs = (math.prod(normaliser.output_shape),)
    for array in (normaliser.mean, normaliser.sd):
        wanted = None if normaliser.rule != "feature" else inputs
        if (None if array is None else array.shape) != wanted or (array is not None and not np.isfinite(array).all()):
            raise ValueError(f"normalisation: expected arrays of {wanted} finite numbers")
    return normaliser


def check_same(row: NetworkRow, file: MaskFile) -> None:
    """Raises NetworkDiffers unless masks of the file's network mean the same under the stored one."""
    theirs = file.network
    kinds = [config.get("scenario", scenarios.DEFAULT) == scenarios.DEFAULT for config in (row.config, theirs.config)]
    shapes = [Architecture.from_json(stored).to_json() for stored in (row.architecture, theirs.architecture)]
    shared = min(len(row.classes), len(theirs.classes))
    agree = {
        "weights": row.signs_sha256 == theirs.signs_sha256 and row.seed == theirs.seed,
        "architecture": shapes[0] == shapes[1],
        "normalisation": row.normalisation == theirs.normalisation
        and row.normalisation_data == file.normalisation_data,
        "kind of labels": row.label_kind == theirs.label_kind,
        "order of classes": row.classes[:shared] == theirs.classes[:shared],
        "kind of scenario (tasks given, or found)": kinds[0] == kinds[1],
    }
    if different := [name for name, same in agree.items() if not same]:
        raise NetworkDiffers(f"the masks are those of another network: its {', '.join(different)} differ")


def check_mask(mask: PortableMask, architecture: Architecture, classes: int) -> None:
    """Raises FileRefused unless it is a mask of this architecture with a record of so many classes."""
    try:
        _check_bits(mask, architecture)
        _check_reference(mask.record.reference, classes)
        if mask.inputs is not None:
            _check_inputs(mask.inputs, architecture.inputs)
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError, SafetensorError) as error:
        raise FileRefused(f"task.{mask.record.task}: {' '.join(str(error).split())}") from None


def _check_bits(mask: PortableMask, architecture: Architecture) -> None:
    record, statistics = mask.record, mask.statistics or b""
    sizes = (record.nbits, len(mask.bits), len(statistics))
    wanted = (architecture.weights, architecture.bit_bytes, architecture.statistic_bytes)
    if sizes != wanted:
        raise ValueError(f"{sizes} weights, bytes of bits and of statistics, expected {wanted}")
    if packing.popcount(mask.bits) / record.nbits != record.density:
        raise ValueError(f"{packing.popcount(mask.bits)} bits are set, recorded is a density of {record.density}")
    packed = np.frombuffer(mask.bits, np.uint8)
    for layer in architecture.layers:
        last = packed[layer.offset : layer.offset + layer.nbytes].reshape(layer.rows, layer.row_bytes)[:, -1]
        if layer.columns % 8 and (last >> layer.columns % 8).any():
            raise ValueError("bits are set that belong to no weight")
    if not np.isfinite(np.frombuffer(statistics, "<f4")).all():
        raise ValueError("statistics that are not finite")


def _check_reference(stored: dict[str, Any], classes: int) -> None:
    reference = Reference.from_json(stored)
    gauges = [*reference.denied.values(), *reference.evidence.values()]
    numbers = [
        reference.errors,
        reference.hits,
        *reference.labels.values(),
        *(g for each in gauges for g in each.to_json()),
    ]
    if not all(type(number) in (int, float) and math.isfinite(number) for number in numbers):
        raise ValueError("reference: expected finite numbers")
    if "entropy" not in reference.evidence or reference.to_json() != stored:
        raise ValueError("reference: it is no record of a task")
    if any(not 0 <= label < classes for label in (*reference.denied, *reference.labels)):
        raise ValueError(f"reference: a class beyond the {classes} there are")


def _check_inputs(stored: bytes, inputs: int) -> None:
    moments = InputMoments.from_bytes(stored)
    arrays = (moments.mean, moments.square)
    if any(array.shape != (inputs,) or array.dtype != np.float32 or not np.isfinite(array).all() for array in arrays):
        raise ValueError(f"inputs: expected the mean and the mean square of {inputs} inputs")
    if not (math.isfinite(moments.count) and moments.count > 0):
        raise ValueError("inputs: of no rows")
