"""JSON: one batch in one object, or lines of one sample each."""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy as np

from streams import arrays
from streams.batch import Batch, BatchRejected
from streams.budget import Budget
from streams.names import printable
from streams.reading import Reading

_VALUE_BYTES = 32  # what one number takes as a Python object in a list
_LINE = re.compile(rb"([^\r\n]*)(\r\n|\r|\n|\Z)")


def decode_json(payload: bytes, reading: Reading, budget: Budget) -> Batch:
    """An object {"x": [[…], …], "y": […], "task": …}; y and task may be absent or null, other keys are ignored."""
    fields = parse(payload, "", budget)
    x = _numbers(fields.get("x"), "")
    budget.take(x.nbytes)
    told = fields.get("y")
    y = None if told is None else labels(told, budget)
    return arrays.checked(x, y, task(fields.get("task") if reading.with_task else None), budget)


def decode_jsonl(payload: bytes, reading: Reading, budget: Budget) -> Batch:
    """Lines {"x": […], "y": …, "task": …}; all have a y, or none has."""
    samples = _Samples()
    for number, found in enumerate(_LINE.finditer(payload), 1):
        line, end = found.groups()
        if line.strip():
            where = f"line {number}: "
            try:
                samples.add(parse(line, where, budget), where, reading, budget)
            except BatchRejected as rejection:
                if rejection.code == "truncated" and end:
                    raise BatchRejected("bad_format", rejection.text) from rejection
                raise
    return samples.batch(budget)


@dataclass(slots=True)
class _Samples:
    """What the lines so far say."""

    x: list[np.ndarray] = field(default_factory=list)
    y: list[Any] = field(default_factory=list)
    tasks: set[str | None] = field(default_factory=set)

    def add(self, fields: dict[str, Any], where: str, reading: Reading, budget: Budget) -> None:
        x = _numbers(fields.get("x"), where)
        first = self.x[0] if self.x else x
        if x.shape != first.shape or (x.dtype.kind == "b") != (first.dtype.kind == "b"):
            text = f"{where}x: {x.dtype} of shape {x.shape}, the first line has {first.dtype} of {first.shape}"
            raise BatchRejected("schema_mismatch", text)
        self.x.append(x)
        budget.take(x.nbytes, rows=1)
        label = fields.get("y")
        if label is not None:
            self.y.append(label)
        if len(self.y) not in (0, len(self.x)):
            raise BatchRejected("bad_labels", f"{where}expected a y in every line or in none")
        self.tasks.add(task(fields.get("task") if reading.with_task else None))
        arrays.same_task(self.tasks)

    def batch(self, budget: Budget) -> Batch:
        if not self.x:
            raise BatchRejected("bad_shape", "x: no samples, expected 1 or more")
        y = labels(self.y, budget) if self.y else None
        return arrays.checked(np.stack(self.x), y, arrays.same_task(self.tasks), budget)


def parse(text: bytes, where: str, budget: Budget) -> dict[str, Any]:
    """The one object in `text`; raises BatchRejected truncated, bad_format, trailing_bytes, non_finite, too_large."""
    stripped = text.strip()
    if not stripped.startswith(b"{"):
        raise BatchRejected("bad_format", f"{where}no JSON object: starts with {stripped[:6]!r}")
    if not stripped.endswith(b"}"):
        raise BatchRejected("truncated", f"{where}{len(text)} bytes, the end of the JSON object is missing")
    budget.check(budget.taken + text.count(b",") * _VALUE_BYTES)
    try:
        return _decoder(where).decode(stripped.decode())
    except BatchRejected:
        raise
    except json.JSONDecodeError as error:
        code = "trailing_bytes" if error.msg == "Extra data" else "bad_format"
        raise BatchRejected(code, f"{where}{error.msg} at character {error.pos}, expected one JSON object") from error
    except RecursionError as error:
        raise BatchRejected("bad_format", f"{where}nested too deeply") from error
    except ValueError as error:  # not UTF-8, or an integer of thousands of digits
        raise BatchRejected("bad_format", f"{where}{printable(str(error))[:200]}") from error


def _decoder(where: str) -> json.JSONDecoder:
    def constant(word: str) -> NoReturn:
        raise BatchRejected("non_finite", f"{where}{word}, expected finite numbers")

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        fields = dict(items)
        if len(fields) < len(items):
            raise BatchRejected("bad_format", f"{where}a JSON object has the same key twice")
        return fields

    return json.JSONDecoder(parse_constant=constant, object_pairs_hook=pairs)


def _numbers(values: Any, where: str) -> np.ndarray:
    """Nested lists of numbers, or of true and false, as an array."""
    if not isinstance(values, list):
        raise BatchRejected("bad_shape", f"{where}x: expected a list of numbers")
    found = set(_leaf_types(values, where, depth=1))
    if not (found <= {int, float} or found == {bool}):
        names = ", ".join(sorted(kind.__name__ for kind in found))
        raise BatchRejected("bad_dtype", f"{where}x: {names}, expected numbers, or true and false")
    try:
        array = np.array(values)
    except ValueError as error:
        raise BatchRejected("bad_shape", f"{where}x: lists of different lengths") from error
    if array.dtype.kind == "O":
        raise BatchRejected("bad_dtype", f"{where}x: integers beyond 64 bits")
    return array


def _leaf_types(values: list[Any], where: str, depth: int) -> Iterable[type]:
    found = set(map(type, values))
    if list not in found:
        return found
    if len(found) > 1 or depth == 4:
        raise BatchRejected("bad_shape", f"{where}x: lists of different depths, or deeper than 4")
    return {kind for value in values for kind in _leaf_types(value, where, depth + 1)}


def labels(values: Any, budget: Budget) -> np.ndarray:
    """A list of integers or of strings as an array; raises BatchRejected bad_labels."""
    found = set(map(type, values)) if isinstance(values, list) else set()
    if found not in ({int}, {str}):
        names = ", ".join(sorted(kind.__name__ for kind in found)) or "no list"
        raise BatchRejected("bad_labels", f"y: {names}, expected all integers or all strings")
    if found == {str}:
        return arrays.strings(values, "bad_labels", budget)
    budget.take(arrays.INTEGER_BYTES * len(values))
    array = np.array(values)
    if array.dtype.kind not in "iu":
        raise BatchRejected("bad_labels", "y: integers beyond 64 bits")
    return array


def task(told: Any) -> str | None:
    """What JSON says of the task, as text; None where it says nothing."""
    if told is None:
        return None
    if type(told) not in (int, str):
        raise BatchRejected("bad_task", f"task: {type(told).__name__}, expected one integer or string")
    return arrays.task_text(str(told))
