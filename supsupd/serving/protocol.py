"""Open Inference Protocol v2 in its JSON form: bytes to arrays, predictions to JSON. Pure functions."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any, TypeVar

import numpy as np

from supsupd.choices import METHODS, OBJECTIVE_ALIASES, OBJECTIVES
from supsupd.serving.engine import MODEL_NAME, Prediction, Question

Word = TypeVar("Word", bound=str)
MAX_DIMENSIONS = 8
DATATYPES = {
    "BOOL": np.bool_,
    "UINT8": np.uint8,
    "UINT16": np.uint16,
    "UINT32": np.uint32,
    "UINT64": np.uint64,
    "INT8": np.int8,
    "INT16": np.int16,
    "INT32": np.int32,
    "INT64": np.int64,
    "FP16": np.float16,
    "FP32": np.float32,
    "FP64": np.float64,
}
DATATYPE_OF = {np.dtype(dtype): name for name, dtype in DATATYPES.items()}
OUTPUTS = ("label", "probabilities", "task", "entropy", "known")


class ProtocolError(ValueError):
    """The request breaks the protocol; its text is "code: what is wrong" and it is the caller's to mend."""


@dataclass(frozen=True, slots=True)
class InferRequest:
    """One decoded request to predict."""

    question: Question
    outputs: tuple[str, ...] = OUTPUTS
    id: str | None = None


def parse_json(body: bytes) -> Any:
    """The value that `body` holds, strictly: UTF-8, no NaN, no key twice. Raises ProtocolError."""
    try:
        return json.loads(body.decode(), parse_constant=_refuse_constant, object_pairs_hook=_unique_keys)
    except RecursionError:
        raise ProtocolError("bad_json: nested too deep") from None
    except ValueError as error:
        raise ProtocolError(f"bad_json: {error}") from None


def parse_object(body: bytes) -> dict[str, Any]:
    """The JSON object that `body` holds. Raises ProtocolError."""
    value = parse_json(body)
    if not isinstance(value, dict):
        raise ProtocolError("bad_json: expected a JSON object")
    return value


def decode_request(body: bytes) -> InferRequest:
    """The request in the JSON of POST /v2/models/supsup/infer. Raises ProtocolError."""
    request = parse_object(body)
    parameters = _field(request, "parameters", dict, {})
    question = Question(
        x=_decode_inputs(_field(request, "inputs", list, [])),
        task=_decode_task(parameters.get("task")),
        per_sample=_field(parameters, "per_sample", bool, False),
        method=_decode_word(parameters, "method", METHODS, {}),
        objective=_decode_word(parameters, "objective", OBJECTIVES, OBJECTIVE_ALIASES),
    )
    return InferRequest(
        question,
        outputs=_decode_outputs(_field(request, "outputs", list, [])),
        id=_field(request, "id", str, None),
    )


def _decode_task(task: Any) -> int | str | None:
    if type(task) is int and not 0 <= task < 2**63:
        raise ProtocolError(f"bad_request: task must be a task's id, not {task}")
    if type(task) not in (int, str, type(None)):
        raise ProtocolError("bad_request: task must be an integer, a task's id, or a string, its key, name or id")
    return task


def encode_response(prediction: Prediction, request: InferRequest) -> dict[str, Any]:
    """The answer to `request`: its outputs in its order, data flat and row-major."""
    tensors: dict[str, Callable[[], dict[str, Any]]] = {
        "label": lambda: _tensor(prediction.labels, [len(prediction.labels)], _label_datatype(prediction.classes)),
        "probabilities": lambda: _array(prediction.probabilities, "FP32"),
        "task": lambda: _array(prediction.task, "INT64"),
        "entropy": lambda: _array(prediction.entropy, "FP32"),
        "known": lambda: _array(prediction.known, "BOOL"),
    }
    echo = {} if request.id is None else {"id": request.id}
    outputs = [{"name": name, **tensors[name]()} for name in request.outputs]
    return {"model_name": MODEL_NAME, **echo, "outputs": outputs}


def server_metadata(version: str) -> dict[str, Any]:
    """The answer to GET /v2."""
    return {"name": "supsupd", "version": version, "extensions": []}


def model_metadata(model: dict[str, Any]) -> dict[str, Any]:
    """The answer to GET /v2/models/supsup, for what `Engine.model` says; -1 stands for any number of rows."""
    label = "INT64" if model["label_kind"] == "int" else "BYTES"
    shapes = {"label": (label, [-1]), "probabilities": ("FP32", [-1, len(model["classes"])])}
    shapes |= {"task": ("INT64", [-1]), "entropy": ("FP32", [-1]), "known": ("BOOL", [-1])}
    return {
        "name": MODEL_NAME,
        "platform": "supsupd",
        "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, *model["input_shape"]]}],
        "outputs": [{"name": name, "datatype": datatype, "shape": shape} for name, (datatype, shape) in shapes.items()],
    }


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError("an object has a key twice")
    return value


def _field(table: dict[str, Any], key: str, kind: type, default: Any) -> Any:
    value = table.get(key, default)
    # Exact types: a JSON true is no number, though a Python True is an int.
    if value is not default and type(value) is not kind:
        names = {
            dict: "an object",
            list: "an array",
            int: "an integer",
            bool: "true or false",
            str: "a string",
        }
        raise ProtocolError(f"bad_request: {key} must be {names[kind]}")
    return value


def _decode_word(table: dict[str, Any], key: str, words: tuple[Word, ...], aliases: Mapping[str, Word]) -> Word | None:
    """One of the words, by itself or by an alias."""
    value = _field(table, key, str, None)
    word = next((word for word in words if word == aliases.get(value, value)), None)
    if word is None and value is not None:
        raise ProtocolError(f"bad_request: {key} must be one of {', '.join(words)}, not {value[:40]!r}")
    return word


def _decode_inputs(inputs: list[Any]) -> np.ndarray:
    if len(inputs) != 1 or type(inputs[0]) is not dict or inputs[0].get("name") != "x":
        raise ProtocolError('bad_request: expected exactly one input, an object with the name "x"')
    tensor = inputs[0]
    if "data" not in tensor:
        raise ProtocolError("bad_request: input x has no data (binary tensor data is not supported: send JSON numbers)")
    datatype = tensor.get("datatype")
    if type(datatype) is not str or datatype not in DATATYPES:
        raise ProtocolError("bad_datatype: input x must be one of " + ", ".join(DATATYPES))
    shape = _decode_shape(tensor.get("shape"))
    values, kinds = _flatten(_field(tensor, "data", list, []), shape)
    return _to_array(values, kinds, datatype).reshape(shape)


def _decode_shape(shape: Any) -> tuple[int, ...]:
    if type(shape) is not list or not all(type(size) is int and size >= 0 for size in shape):
        raise ProtocolError("bad_shape: the shape of x must be an array of integers of 0 or more")
    if not 2 <= len(shape) <= MAX_DIMENSIONS or 0 in shape:
        raise ProtocolError(f"bad_shape: x must be (n, ...) with 2 to {MAX_DIMENSIONS} axes, none of them empty")
    return tuple(shape)


def _flatten(data: list[Any], shape: tuple[int, ...]) -> tuple[list[Any], set[type]]:
    """The values of `data`, which is either flat or nested exactly as `shape` says, and of which types they are."""
    kinds = set(map(type, data))
    if list in kinds:
        for axis, size in enumerate(shape[1:], start=1):
            if kinds != {list} or any(len(row) != size for row in data):
                raise ProtocolError(f"shape_mismatch: the data of x is not nested as its shape says on axis {axis}")
            data = list(chain.from_iterable(data))
            kinds = set(map(type, data))
    if len(data) != math.prod(shape):
        raise ProtocolError(
            f"shape_mismatch: shape {list(shape)} wants {math.prod(shape)} values, data has {len(data)}"
        )
    return data, kinds


def _to_array(values: list[Any], kinds: set[type], datatype: str) -> np.ndarray:
    dtype = np.dtype(DATATYPES[datatype])
    fitting: dict[str, set[type]] = {"b": {bool}, "f": {int, float}}
    allowed = fitting.get(dtype.kind, {int})
    if not kinds <= allowed:
        names = " or ".join(sorted(kind.__name__ for kind in allowed))
        raise ProtocolError(f"bad_datatype: {datatype} data must be {names} values only")
    try:
        with np.errstate(over="ignore"):
            array = np.array(values, dtype=dtype)
    except OverflowError:
        raise ProtocolError(f"bad_datatype: a value does not fit in {datatype}") from None
    if not np.isfinite(array).all():
        raise ProtocolError(f"non_finite: value {np.isfinite(array).argmin()} of x is not finite as {datatype}")
    return array


def _decode_outputs(outputs: list[Any]) -> tuple[str, ...]:
    names = [str(output.get("name")) if type(output) is dict else "" for output in outputs]
    if not set(names) <= set(OUTPUTS) or len(set(names)) < len(names):
        raise ProtocolError("bad_request: outputs must be objects, each with another name of " + ", ".join(OUTPUTS))
    if any("classification" in _field(output, "parameters", dict, {}) for output in outputs):
        raise ProtocolError("bad_request: the classification extension is not supported")
    return tuple(names) or OUTPUTS


def _label_datatype(classes: list[int] | list[str]) -> str:
    return "BYTES" if any(isinstance(label, str) for label in classes) else "INT64"


def _array(values: np.ndarray, datatype: str) -> dict[str, Any]:
    return _tensor(values.ravel().tolist(), list(values.shape), datatype)


def _tensor(data: list[Any], shape: list[int], datatype: str) -> dict[str, Any]:
    return {"datatype": datatype, "shape": shape, "data": data}
