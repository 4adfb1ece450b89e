"""Open Inference Protocol v2 over REST: bodies to requests, answers to bodies, in JSON with or without raw tensors
behind it. Pure functions; what a request and an answer are is the same for gRPC.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
import orjson

from supsupd.choices import METHODS, OBJECTIVE_ALIASES, OBJECTIVES
from supsupd.serving.engine import ExtensionNotSupported, Question
from supsupd.serving.oip import strict_json
from supsupd.serving.oip.long_data import PIECE_BYTES, Numbers, parse_long_object
from supsupd.serving.oip.strict_json import ProtocolError, parse_object
from supsupd.serving.oip.tensors import Tensor, from_json, from_raw, to_json, to_raw

Word = TypeVar("Word", bound=str)
INPUT = "x"
HEADS, HEAD_BYTES = 256, 1 << 12
"""Heads of raw tensors that are remembered, and how long one may be: a client asks with the same head again and again,
and to read it takes a tenth of a small request's time."""


PIECE_VALUES = 1 << 14
"""Of a tensor, that are written as JSON at once: about a millisecond."""
_PLACE = {"data": None}
_PLACE_JSON = orjson.dumps(_PLACE)


@dataclass(frozen=True, slots=True)
class RequestedOutput:
    """An output that is asked for. parameters: `binary_data` (REST only), `classification`."""

    name: str
    parameters: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class InferRequest:
    """A request to predict, from either wire. outputs: none means all of them."""

    inputs: tuple[Tensor, ...]
    parameters: Mapping[str, Any] = field(default_factory=dict)
    outputs: tuple[RequestedOutput, ...] = ()
    id: str | None = None


@dataclass(frozen=True, slots=True)
class _RawInput:
    """An input whose bytes follow the JSON, as it was told."""

    name: str
    datatype: Any
    shape: Any
    size: int


@dataclass(frozen=True, slots=True)
class _Head:
    """What the JSON of a request says."""

    inputs: tuple[Tensor | _RawInput, ...]
    parameters: Mapping[str, Any]
    outputs: tuple[RequestedOutput, ...]
    id: str | None


@dataclass(frozen=True, slots=True)
class InferAnswer:
    """What a request is answered with: the outputs in the order in which they were asked for."""

    model_name: str
    model_version: str
    id: str | None
    outputs: list[Tensor] = field(default_factory=list)


def decode_request(body: bytes, json_bytes: int | None = None) -> InferRequest:
    """The request in the body of POST /v2/models/MODEL/infer.

    json_bytes: how much of it is JSON, as Inference-Header-Content-Length says; raw tensors follow in the order of the
    inputs. None: all of it. Raises ProtocolError.
    """
    if json_bytes is None:
        json_bytes = len(body)
    elif not 0 <= json_bytes <= len(body):
        raise ProtocolError(
            f"bad_request: Inference-Header-Content-Length says {json_bytes} bytes, the body has {len(body)}"
        )
    head, raw = body[:json_bytes], memoryview(body)[json_bytes:]
    told = _known_head(head) if raw and len(head) <= HEAD_BYTES else _decode_head(head)
    return InferRequest(_take_raw(told.inputs, raw), told.parameters, told.outputs, told.id)


def _decode_head(head: bytes) -> _Head:
    """The JSON of a request. Raises ProtocolError."""
    request = parse_object(head) if len(head) <= PIECE_BYTES else parse_long_object(head)
    outputs = strict_json.field(request, "outputs", list, [])
    parameters = strict_json.field(request, "parameters", dict, {})
    strict_json.field(parameters, "binary_data_output", bool, None)
    return _Head(
        tuple([_decode_input(told) for told in strict_json.field(request, "inputs", list, [])]),
        parameters,
        tuple([_decode_output(output) for output in outputs]),
        strict_json.field(request, "id", str, None),
    )


_known_head = lru_cache(HEADS)(_decode_head)


def decode_raw(body: bytes, row_shape: Sequence[int]) -> InferRequest:
    """The request whose body is one row in FP32 and nothing else; its outputs go back raw. Raises ProtocolError."""
    return InferRequest((from_raw(INPUT, "FP32", (1, *row_shape), body),), {"binary_data_output": True})


def encode_answer(answer: InferAnswer, request: InferRequest) -> tuple[bytes, list[bytes]]:
    """The JSON of an answer, and the raw tensors that follow it: those that are asked for so."""
    all_raw = request.parameters.get("binary_data_output") is True
    raw: list[bytes] = []
    outputs: list[dict[str, Any]] = []
    long: list[Tensor] = []
    for place, tensor in enumerate(answer.outputs):
        told: dict[str, Any] = {"name": tensor.name, "datatype": tensor.datatype, "shape": tensor.shape}
        if request.outputs[place].parameters.get("binary_data", all_raw) if request.outputs else all_raw:
            raw.append(to_raw(tensor))
            told["parameters"] = {"binary_data_size": len(raw[-1])}
        elif tensor.elements > PIECE_VALUES:
            told["data"] = _PLACE
            long.append(tensor)
        else:
            told["data"] = to_json(tensor)
        outputs.append(told)
    echo = {} if answer.id is None else {"id": answer.id}
    head = {"model_name": answer.model_name, "model_version": answer.model_version, **echo, "outputs": outputs}
    return _with_data(orjson.dumps(head, option=orjson.OPT_SERIALIZE_NUMPY), long), raw


def _with_data(head: bytes, long: Sequence[Tensor]) -> bytes:
    """The JSON with the data of tensors in their places: no string can hold what stands there, for its quotes."""
    parts = []
    for tensor in long:
        before, _, head = head.partition(_PLACE_JSON)
        parts += [before, b"[", b",".join(_in_pieces(tensor)), b"]"]
    return b"".join([*parts, head])


def _in_pieces(tensor: Tensor) -> Iterator[bytes]:
    values = to_json(tensor)
    for at in range(0, len(values), PIECE_VALUES):
        yield orjson.dumps(values[at : at + PIECE_VALUES], option=orjson.OPT_SERIALIZE_NUMPY)[1:-1]


def question_of(request: InferRequest, task: int | None = None) -> Question:
    """What a request asks the engine. task: the one that its model stands for. Raises ProtocolError."""
    parameters = request.parameters
    asked = _decode_task(parameters.get("task"))
    if None not in (task, asked) and asked not in (task, str(task), f"id:{task}"):
        raise ProtocolError(f"bad_request: this model is task {task}; parameter task names another")
    return Question(
        x=_rows(request.inputs),
        task=asked if task is None else task,
        per_sample=strict_json.field(parameters, "per_sample", bool, False),
        method=_decode_word(parameters, "method", METHODS, {}),
        objective=_decode_word(parameters, "objective", OBJECTIVES, OBJECTIVE_ALIASES),
    )


def timeout_of(request: InferRequest) -> float | None:
    """Seconds that a request gives itself: parameter `timeout`, in microseconds; 0 is none. Raises ProtocolError."""
    microseconds = strict_json.field(request.parameters, "timeout", int, 0)
    if microseconds < 0:
        raise ProtocolError("bad_request: timeout must be 0 or more microseconds")
    return microseconds / 1e6 or None


def classes_wanted(output: RequestedOutput) -> int | None:
    """How many of the most probable classes an output is to be told as; None: all, as numbers. Raises ProtocolError."""
    wanted: int | None = strict_json.field(output.parameters, "classification", int, None)
    if wanted is not None and wanted < 1:
        raise ProtocolError("bad_request: classification must be 1 or more classes")
    return wanted


def _decode_input(told: Any) -> Tensor | _RawInput:
    """An input whose data are here, or one whose bytes follow."""
    if type(told) is not dict or type(told.get("name")) is not str:
        raise ProtocolError("bad_request: each input must be an object with a name")
    size = strict_json.field(_parameters(told), "binary_data_size", int, None)
    if size is not None:
        if "data" in told:
            raise ProtocolError("bad_request: an input has both data and binary_data_size")
        return _RawInput(told["name"], told.get("datatype"), told.get("shape"), size)
    if isinstance(told.get("data"), Numbers):
        return told["data"].tensor(told["name"], told.get("datatype"), told.get("shape"))
    data = strict_json.field(told, "data", list, None)
    if data is None:
        raise ProtocolError("bad_request: an input has neither data nor binary_data_size")
    return from_json(told["name"], told.get("datatype"), told.get("shape"), data)


def _take_raw(inputs: Sequence[Tensor | _RawInput], raw: memoryview) -> tuple[Tensor, ...]:
    """Tensors, those that follow the JSON each of its part of `raw`."""
    tensors = []
    at = 0
    for told in inputs:
        if isinstance(told, Tensor):
            tensors.append(told)
            continue
        if not 0 <= told.size <= len(raw) - at:
            raise ProtocolError(f"shape_mismatch: an input takes {told.size} raw bytes, {len(raw) - at} are left")
        tensors.append(from_raw(told.name, told.datatype, told.shape, raw[at : at + told.size]))
        at += told.size
    if at != len(raw):
        raise ProtocolError(f"shape_mismatch: the inputs take {at} raw bytes, {len(raw)} came")
    return tuple(tensors)


def _decode_output(told: Any) -> RequestedOutput:
    if type(told) is not dict or type(told.get("name")) is not str:
        raise ProtocolError("bad_request: each output must be an object with a name")
    parameters = _parameters(told)
    strict_json.field(parameters, "binary_data", bool, None)
    return RequestedOutput(told["name"], parameters)


def _parameters(tensor: dict[str, Any]) -> dict[str, Any]:
    """Raises ExtensionNotSupported for a tensor in shared memory."""
    parameters: dict[str, Any] = strict_json.field(tensor, "parameters", dict, {})
    if any(name.startswith("shared_memory") for name in parameters):
        raise ExtensionNotSupported("there is no shared memory here")
    return parameters


def _rows(inputs: tuple[Tensor, ...]) -> np.ndarray:
    """x (n, ...), n >= 1, finite."""
    if len(inputs) != 1 or inputs[0].name != INPUT:
        raise ProtocolError(f"bad_request: expected exactly one input, with the name {INPUT}")
    x = inputs[0].data
    if isinstance(x, list):
        raise ProtocolError(f"bad_datatype: {INPUT} must be numbers, not BYTES")
    if x.ndim < 2:
        raise ProtocolError(f"shape_mismatch: {INPUT} must be rows, of shape (n, ...)")
    if x.dtype.kind == "f" and not (finite := np.isfinite(x)).all():
        raise ProtocolError(f"non_finite: value {finite.argmin()} of {INPUT} is not finite as {inputs[0].datatype}")
    return x


def _decode_task(task: Any) -> int | str | None:
    if type(task) is int and not 0 <= task < 2**63:
        raise ProtocolError("bad_request: task must be a task's id, an integer from 0 to 2**63 - 1")
    if type(task) not in (int, str, type(None)):
        raise ProtocolError("bad_request: task must be an integer, a task's id, or a string, its key, name or id")
    return task


def _decode_word(
    table: Mapping[str, Any], key: str, words: tuple[Word, ...], aliases: Mapping[str, Word]
) -> Word | None:
    """One of the words, by itself or by an alias."""
    value = strict_json.field(table, key, str, None)
    word = next((word for word in words if word == aliases.get(value, value)), None)
    if word is None and value is not None:
        raise ProtocolError(f"bad_request: {key} must be one of {', '.join(words)}, not {value[:40]!r}")
    return word
