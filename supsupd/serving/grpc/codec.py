"""Requests and answers of ModelInfer: messages of gRPC to what REST and gRPC share, and back. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from supsupd.serving.grpc.messages import MESSAGE
from supsupd.serving.oip.protocol import InferAnswer, InferRequest, RequestedOutput
from supsupd.serving.oip.strict_json import ProtocolError
from supsupd.serving.oip.tensors import Tensor, as_array, check_shape, dtype_of, from_raw, miscounted, to_raw

TYPED = {
    "BOOL": "bool_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}
"""Where the values of a datatype are that are not sent raw."""
PIECE_VALUES = 1 << 14
"""That are taken out of a message at once."""
RAW_FIELD, LENGTH_DELIMITED, MOST_FIELDS = 7, 2, 1000
RAW_RATIO, TYPED_RATIO = 2, 16


def decode_request(message: Any, seconds: float | None) -> InferRequest:
    """The request in a ModelInferRequest.

    seconds: what is left of the call's own deadline, which bounds its `timeout`. Raises ProtocolError.
    """
    parameters = decode_parameters(message.parameters)
    timeout = parameters.get("timeout", 0)
    if seconds is not None and type(timeout) is int and timeout >= 0:  # what is wrong is refused later
        left = max(1, int(seconds * 1e6))
        parameters["timeout"] = min(timeout or left, left)
    return InferRequest(
        _decode_inputs(message),
        parameters,
        tuple([RequestedOutput(output.name, decode_parameters(output.parameters)) for output in message.outputs]),
        message.id or None,
    )


def needed_bytes(payload: bytes) -> int:
    """About the most that a ModelInferRequest takes beside its own bytes once it is read: its raw tensors twice, in the
    message and of their own, and of all else what a number of one byte becomes."""
    raw = sum(size for number, size in _fields(payload) if number == RAW_FIELD)
    return RAW_RATIO * raw + TYPED_RATIO * (len(payload) - raw)


def _fields(payload: bytes) -> Iterator[tuple[int, int]]:
    """Number and length of each field of a message, up to what can't be one."""
    at = 0
    for _ in range(MOST_FIELDS):
        tag, at = _varint(payload, at)
        if tag & 7 != LENGTH_DELIMITED:  # it has no others
            return
        size, at = _varint(payload, at)
        at += size
        if at > len(payload):
            return
        yield tag >> 3, size


def _varint(payload: bytes, at: int) -> tuple[int, int]:
    value, shift = 0, 0
    while at < len(payload) and shift < 64:
        byte, at = payload[at], at + 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            break
    return value, at


def decode_parameters(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Values of whichever type was set; None where none was."""
    return {key: _value_of(choice) for key, choice in parameters.items()}


def encode_answer(answer: InferAnswer) -> Any:
    """A ModelInferResponse, with the bytes of each output in their order: Triton's clients read no others."""
    message = MESSAGE["ModelInferResponse"](
        model_name=answer.model_name, model_version=answer.model_version, id=answer.id or ""
    )
    for tensor in answer.outputs:
        message.outputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
        message.raw_output_contents.append(to_raw(tensor))
    return message


def _value_of(choice: Any) -> Any:
    name = choice.WhichOneof("choice")
    return None if name is None else getattr(choice, name)


def _decode_inputs(message: Any) -> tuple[Tensor, ...]:
    inputs, raw = message.inputs, message.raw_input_contents
    if not raw:
        return tuple([_decode_typed(told) for told in inputs])
    if any(told.HasField("contents") for told in inputs):
        raise ProtocolError("bad_request: the inputs come in contents or in raw_input_contents, not in both")
    if len(raw) != len(inputs):
        raise ProtocolError(f"bad_request: {len(inputs)} inputs take as many raw_input_contents, {len(raw)} came")
    pairs = zip(inputs, raw, strict=True)
    return tuple([from_raw(told.name[:64], told.datatype, tuple(told.shape), data) for told, data in pairs])


def _decode_typed(told: Any) -> Tensor:
    name, datatype, shape = told.name[:64], told.datatype, tuple(told.shape)
    if datatype in ("FP16", "BF16"):
        raise ProtocolError(f"bad_datatype: {datatype} data of {name} comes in raw_input_contents only")
    shape, dtype = check_shape(name, shape), None if datatype == "BYTES" else dtype_of(name, datatype)
    values = getattr(told.contents, TYPED[datatype])
    if dtype is None:
        return Tensor(name, datatype, shape, list(values))
    if len(values) != math.prod(shape):
        raise miscounted(name, shape, len(values))
    array = np.empty(len(values), dtype)
    for at in range(0, len(values), PIECE_VALUES):
        piece = values[at : at + PIECE_VALUES]
        array[at : at + len(piece)] = as_array(name, datatype, dtype, piece, set(map(type, piece)))
    return Tensor(name, datatype, shape, array.reshape(shape))
