"""What the daemon and its decoding worker say to each other: a header of fixed length, JSON, and the bytes of arrays.

The worker has read hostile bytes, so nothing it says is believed: every reply is one of three closed forms.
"""

import json
import math
import re
import struct
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from streams import arrays
from streams.batch import Batch, BatchRejected, Summary
from streams.budget import Budget

HEADER = struct.Struct(
    "<8sIQ"
)  # magic, bytes of JSON, bytes of arrays after it (or in the descriptor that comes along)
MAGIC = b"supsupd1"
MAX_JSON_BYTES = 64 << 10
MAX_TEXT = 2000  # characters of a reason
CODES = frozenset(
    {
        "bad_dtype",
        "bad_format",
        "bad_header",
        "bad_labels",
        "bad_member_name",
        "bad_shape",
        "bad_task",
        "forbidden_pickle",
        "image_rejected",
        "image_too_large",
        "non_finite",
        "not_regular",
        "oom",
        "schema_mismatch",
        "too_large",
        "too_many_samples",
        "trailing_bytes",
        "truncated",
        "unsupported_format",
    }
)
"""Why bytes may be no batch; the words of `read`."""

_X_TYPE = re.compile(r"<[fiu][248]|[|][iub]1")
_Y_TYPE = re.compile(r"<i8|<U[1-9][0-9]{0,2}")


class Malformed(Exception):
    """The other end breaks the rules."""


class Readable(Protocol):
    """What bytes come from; a socket is one."""

    def recv_into(self, view: memoryview, /) -> int: ...


@dataclass(frozen=True, slots=True)
class Claim:
    """Type and shape of an array whose bytes are still to come."""

    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class BatchClaim:
    """A batch whose arrays are still to come."""

    x: Claim
    y: Claim | None
    task: str | None


def message(fields: dict[str, Any], size: int = 0) -> bytes:
    """Header and JSON; `size` counts the bytes that come after it."""
    text = json.dumps(fields).encode()
    return HEADER.pack(MAGIC, len(text), size) + text


def receive(connection: Readable, start: bytes = b"") -> tuple[Any, int]:
    """The JSON value of the next message, and how many bytes come after it; `start` was read already.

    Raises Malformed, EOFError, and what the socket raises.
    """
    magic, length, size = HEADER.unpack(_exactly(connection, HEADER.size, start[: HEADER.size]))
    if magic != MAGIC or length > MAX_JSON_BYTES:
        raise Malformed("no header")
    text = _exactly(connection, length, start[HEADER.size :])
    try:
        return json.JSONDecoder().decode(text.decode()), size
    except (ValueError, RecursionError) as error:
        raise Malformed("no JSON") from error


def receive_into(connection: Readable, view: memoryview) -> None:
    """Fills `view`; raises EOFError where the other end closes before."""
    while len(view):
        count = connection.recv_into(view)
        if count == 0:
            raise EOFError
        view = view[count:]


def describe(batch: Batch) -> tuple[dict[str, Any], list[np.ndarray]]:
    """The reply for a batch, and the arrays whose bytes come after it."""
    parts = [batch.x] if batch.y is None else [batch.x, batch.y]
    x, *y = ({"dtype": array.dtype.str, "shape": list(array.shape)} for array in parts)
    return {"x": x, "y": y[0] if y else None, "task": batch.task}, [np.ascontiguousarray(array) for array in parts]


def check_reply(reply: Any, size: int, budget: Budget) -> Summary | BatchClaim | BatchRejected:
    """The reply, if it is one and the bytes after it are those of its arrays; raises Malformed."""
    keys = reply.keys() if isinstance(reply, dict) else set()
    if keys == {"code", "text"}:
        answer: Summary | BatchClaim | BatchRejected = _rejection(reply["code"], reply["text"])
    elif keys == {"samples", "labelled", "task"}:
        answer = _summary(reply["samples"], reply["labelled"], reply["task"], budget)
    elif keys == {"x", "y", "task"}:
        answer = _batch_claim(reply["x"], reply["y"], reply["task"], budget)
    else:
        raise Malformed("no known reply")
    expected = answer.x.size + (answer.y.size if answer.y else 0) if isinstance(answer, BatchClaim) else 0
    if size != expected:
        raise Malformed(f"{size} bytes of arrays, expected {expected}")
    return answer


def receive_batch(connection: Readable, claim: BatchClaim, budget: Budget) -> Batch:
    """The batch whose claim was checked; raises Malformed where its values are none of a batch."""
    x = _receive_array(connection, claim.x)
    y = None if claim.y is None else _receive_array(connection, claim.y)
    try:
        return arrays.checked(x, y, claim.task, budget)
    except BatchRejected as rejection:
        raise Malformed(str(rejection)) from rejection


def _exactly(connection: Readable, size: int, start: bytes) -> bytes:
    data = bytearray(size)
    data[: len(start)] = start
    receive_into(connection, memoryview(data)[len(start) :])
    return bytes(data)


def _receive_array(connection: Readable, claim: Claim) -> np.ndarray:
    data = np.empty(claim.size, np.uint8)
    receive_into(connection, data.data)
    if claim.dtype.kind == "b":
        return (data != 0).reshape(claim.shape)
    return data.view(claim.dtype).reshape(claim.shape)


def _rejection(code: Any, text: Any) -> BatchRejected:
    if not isinstance(code, str) or code not in CODES or not isinstance(text, str):
        raise Malformed("no known reason")
    if len(text) > MAX_TEXT or not text.isprintable():
        raise Malformed("no known reason")
    return BatchRejected(code, text)


def _summary(samples: Any, labelled: Any, task: Any, budget: Budget) -> Summary:
    if type(samples) is not int or not 1 <= samples <= budget.limits.samples or type(labelled) is not bool:
        raise Malformed("no summary")
    return Summary(samples, labelled, _task(task))


def _batch_claim(x: Any, y: Any, task: Any, budget: Budget) -> BatchClaim:
    x_claim = _array_claim(x, _X_TYPE)
    y_claim = None if y is None else _array_claim(y, _Y_TYPE)
    try:
        budget.check(x_claim.size + (0 if y_claim is None else y_claim.size))
        arrays.check_x_claim(x_claim.dtype, x_claim.shape, budget)
        if y_claim is not None:
            arrays.check_y_claim(y_claim.dtype, y_claim.shape, x_claim.shape[0])
    except BatchRejected as rejection:
        raise Malformed(str(rejection)) from rejection
    return BatchClaim(x_claim, y_claim, _task(task))


def _array_claim(fields: Any, kind: re.Pattern[str]) -> Claim:
    if not isinstance(fields, dict) or fields.keys() != {"dtype", "shape"}:
        raise Malformed("no array")
    dtype, shape = fields["dtype"], fields["shape"]
    if not isinstance(dtype, str) or not kind.fullmatch(dtype):
        raise Malformed("no type of a batch")
    if not isinstance(shape, list) or len(shape) > 4 or not all(type(n) is int and 0 < n < 1 << 48 for n in shape):
        raise Malformed("no shape of a batch")
    return Claim(np.dtype(dtype), tuple(shape))


def _task(task: Any) -> str | None:
    if task is None:
        return None
    if not isinstance(task, str):
        raise Malformed("no task")
    try:
        return arrays.task_text(task)
    except BatchRejected as rejection:
        raise Malformed(str(rejection)) from rejection
