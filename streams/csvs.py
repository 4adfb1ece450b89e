"""CSV with a line of names first: columns of numbers, and a label and a task in words or numbers."""

import array
import csv
import io
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from streams import arrays
from streams.batch import Batch, BatchRejected
from streams.budget import Budget
from streams.columns import choose, quoted
from streams.names import printable
from streams.reading import Reading

_INTEGER = re.compile(r"[+-]?[0-9]{1,18}")
_DECIMAL = re.compile(r"[+-]?[0-9]{1,17}\.?[0-9]{0,30}([eE][+-]?[0-9]{1,3})?")
_MOST_EXACT = 2.0**53


def decode_csv(payload: bytes, reading: Reading, budget: Budget) -> Batch:
    """x is float64; y integers where all of them are whole numbers, else strings."""
    if b"\0" in payload:
        raise BatchRejected("bad_format", f"a NUL at byte {payload.index(0)}, expected text")
    text = io.TextIOWrapper(io.BytesIO(payload), encoding="utf-8-sig", newline="")
    rows = csv.reader(text, strict=True)
    try:
        names = next(rows, [])
        _check_names(names)
        return _read_rows(_whole_rows(rows, len(names), payload), names, reading, budget)
    except UnicodeDecodeError as error:
        raise BatchRejected("bad_format", f"not UTF-8 after line {rows.line_num}") from error
    except csv.Error as error:
        if "unexpected end" in str(error):
            raise BatchRejected("truncated", "a quoted value does not end") from error
        raise BatchRejected("bad_format", f"line {rows.line_num}: {printable(str(error))[:200]}") from error


def _check_names(names: list[str]) -> None:
    if names != [str(i) for i in range(len(names))] and all(map(_is_number, names)):
        raise BatchRejected("bad_header", "line 1 holds numbers or nothing, expected the columns' names")


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _whole_rows(rows: Any, width: int, payload: bytes) -> Iterator[tuple[int, list[str]]]:
    """Every row of a csv.reader that is not blank, with its line number."""
    for row in rows:
        line = rows.line_num
        if len(row) == width:
            yield line, row
        elif row:
            cut = len(row) < width and not payload.endswith((b"\n", b"\r")) and next(rows, None) is None
            text = f"line {line}: {len(row)} values, expected {width}"
            raise BatchRejected("truncated" if cut else "bad_format", text)


def _read_rows(rows: Iterator[tuple[int, list[str]]], names: list[str], reading: Reading, budget: Budget) -> Batch:
    chosen = choose(names, (), reading)
    places = {name: place for place, name in enumerate(names)}
    at = [places[name] for name in chosen.x]
    y_at, task_at = (None if name is None else places[name] for name in (chosen.y, chosen.task))
    x = array.array("d")
    y: list[str] = []
    tasks: set[str] = set()
    for line, row in rows:
        budget.take(x.itemsize * len(at), rows=1)
        try:
            x.extend([float(row[i]) for i in at])
        except ValueError:
            raise _no_number(line, [(names[i], row[i]) for i in at]) from None
        if y_at is not None:
            y.append(_label(row[y_at], line))
        if task_at is not None:
            tasks.add(row[task_at])
            arrays.same_task(tasks)
    values = np.frombuffer(x, np.float64).reshape(budget.rows, len(at))
    labels = None if y_at is None else _labels(y, budget)
    return arrays.checked(values, labels, arrays.same_task(tasks), budget)


def _no_number(line: int, cells: list[tuple[str, str]]) -> BatchRejected:
    name, text = next(cell for cell in cells if not _is_number(cell[1]))
    if not text.strip():
        return BatchRejected("non_finite", f"line {line}, column {quoted(name)}: nothing, expected a number")
    return BatchRejected("bad_dtype", f"line {line}, column {quoted(name)}: {quoted(text)}, expected a number")


def _label(text: str, line: int) -> str:
    if not 0 < len(text) <= arrays.MAX_LABEL_CHARACTERS:
        most = arrays.MAX_LABEL_CHARACTERS
        raise BatchRejected("bad_labels", f"line {line}: {len(text)} characters, expected a label of 1 to {most}")
    return text


def _whole(numbers: list[float]) -> np.ndarray:
    for line, number in enumerate(numbers, start=2):
        if not number.is_integer() or abs(number) > _MOST_EXACT:
            raise BatchRejected("bad_labels", f"line {line}: {number:g}, expected whole numbers or words")
    return np.array(numbers).astype(np.int64)


def _labels(y: list[str], budget: Budget) -> np.ndarray:
    is_integer = all(_INTEGER.fullmatch(text) for text in y)
    if not is_integer and not all(_DECIMAL.fullmatch(text) for text in y):
        return arrays.strings(y, "bad_labels", budget)
    budget.take(arrays.INTEGER_BYTES * len(y))
    if is_integer:
        return np.array([int(text) for text in y], np.int64)
    return _whole([float(text) for text in y])  # many tools write every column of numbers as 3.0 or 3e+00
