"""What models take and give, in the protocol's words, and a prediction as its output tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from supsupd.config import ServingSettings
from supsupd.serving.engine import Prediction
from supsupd.serving.oip.protocol import INPUT, ProtocolError, RequestedOutput, classes_wanted
from supsupd.serving.oip.tensors import Tensor

PLATFORM = "supsupd"
ROW_BYTES, VALUE_BYTES, TOLD_BYTES = 160, 24, 160
"""What a row takes beside its probabilities; a probability, as an array and in JSON; and one as "value:index:label"."""
OUTPUTS = ("label", "probabilities", "task", "entropy", "known")
ALL = tuple(RequestedOutput(name) for name in OUTPUTS)
CLASSIFIED = "probabilities"
"""The output that can be told as the names of its largest values."""


def model_metadata(name: str, versions: Sequence[int], model: dict[str, Any]) -> dict[str, Any]:
    """Metadata, for what `Engine.model` says; -1 stands for any number of rows."""
    return {
        "name": name,
        "versions": [str(version) for version in versions],
        "platform": PLATFORM,
        "inputs": [{"name": INPUT, "datatype": "FP32", "shape": [-1, *model["input_shape"]]}],
        "outputs": [
            {"name": name, "datatype": datatype, "shape": [-1, *shape]}
            for name, (datatype, shape) in _described(model).items()
        ],
    }


def model_config(name: str, version: int, model: dict[str, Any], limits: ServingSettings) -> dict[str, Any]:
    """Triton's ModelConfig by its JSON names. `max_batch_size` is what is answered in one pass, not a limit."""
    return {
        "name": name,
        "platform": PLATFORM,
        "backend": PLATFORM,
        "version_policy": {"specific": {"versions": [version]}},
        "max_batch_size": limits.batch_rows,
        "input": [{"name": INPUT, "data_type": "TYPE_FP32", "dims": model["input_shape"]}],
        "output": [
            # One number a row: Triton wants an axis, and takes it away again.
            {"name": name, "data_type": _config_type(datatype), "dims": shape or [1]}
            | ({} if shape else {"reshape": {"shape": []}})
            for name, (datatype, shape) in _described(model).items()
        ],
        "dynamic_batching": {
            "preferred_batch_size": [limits.batch_rows],
            "max_queue_delay_microseconds": round(limits.batch_window_ms * 1000),
        },
    }


def _described(model: dict[str, Any]) -> dict[str, tuple[str, list[int]]]:
    """Datatype, and shape of one row, of every output."""
    label = "INT64" if model["label_kind"] == "int" else "BYTES"
    return {
        "label": (label, []),
        "probabilities": ("FP32", [len(model["classes"])]),
        "task": ("INT64", []),
        "entropy": ("FP32", []),
        "known": ("BOOL", []),
    }


def _config_type(datatype: str) -> str:
    return "TYPE_STRING" if datatype == "BYTES" else f"TYPE_{datatype}"


def wanted_outputs(asked: Sequence[RequestedOutput]) -> list[tuple[str, int | None]]:
    """Names, each with how many classes it is to be told as. Raises ProtocolError."""
    names = {output.name for output in asked}
    if not names <= set(OUTPUTS) or len(names) < len(asked):
        raise ProtocolError("bad_request: outputs must have names of " + ", ".join(OUTPUTS) + ", each once")
    wanted = [(output.name, classes_wanted(output)) for output in asked or ALL]
    if any(name != CLASSIFIED for name, classes in wanted if classes is not None):
        raise ProtocolError(f"bad_request: classification is there for output {CLASSIFIED} only")
    return wanted


def row_bytes(wanted: Sequence[tuple[str, int | None]], classes: Sequence[int | str]) -> int:
    """About the most that one row of these outputs takes while it is computed and written, as text or raw."""
    longest = max((len(str(label)) for label in classes), default=0)
    told = sum(most or 0 for _, most in wanted) * (TOLD_BYTES + 3 * longest)
    return ROW_BYTES + 3 * longest + VALUE_BYTES * len(classes) + told


def output_tensors(prediction: Prediction, wanted: Sequence[tuple[str, int | None]]) -> list[Tensor]:
    """The outputs that `wanted_outputs` gave."""
    return [
        _output(name, prediction) if classes is None else _classified(prediction, classes) for name, classes in wanted
    ]


def _output(name: str, prediction: Prediction) -> Tensor:
    rows = len(prediction.labels)
    match name:
        case "label":
            if isinstance(prediction.labels[0], str):
                return Tensor(name, "BYTES", (rows,), [str(label).encode() for label in prediction.labels])
            return Tensor(name, "INT64", (rows,), np.array(prediction.labels, np.int64))
        case "probabilities":
            return Tensor(name, "FP32", prediction.probabilities.shape, prediction.probabilities)
        case "task":
            return Tensor(name, "INT64", (rows,), prediction.task)
        case "entropy":
            return Tensor(name, "FP32", (rows,), prediction.entropy)
        case _:
            return Tensor(name, "BOOL", (rows,), prediction.known)


def _classified(prediction: Prediction, classes: int) -> Tensor:
    """The most probable classes of each row as "value:index:label", the most probable first."""
    probabilities = prediction.probabilities
    order = np.argsort(-probabilities, axis=1, kind="stable")[:, :classes]
    told = [
        f"{row[index]:f}:{index}:{prediction.classes[index]}".encode()
        for row, indices in zip(probabilities, order, strict=True)
        for index in indices
    ]
    return Tensor(CLASSIFIED, "BYTES", order.shape, told)
