"""Parquet and Arrow IPC, by pyarrow, which comes with the extra `formats` and is imported only here, on first use.

What the metadata claims is checked before anything is read, and what really comes out is counted; that a library takes
no more memory than that meanwhile is the worker process's limit's to see to.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from streams import arrays
from streams.arrow_columns import (
    Words,
    check_nulls,
    check_words,
    chunks,
    is_integer,
    is_list,
    joined,
    lists,
    number_type,
    numbers,
    uneven,
    words_of,
)
from streams.batch import Batch, BatchRejected
from streams.budget import Budget
from streams.columns import Chosen, choose, lossless
from streams.names import printable
from streams.reading import Reading

_PARQUET, _ARROW = b"PAR1", b"ARROW1"
_SHORTEST_PARQUET = 12  # bytes: both magics and the footer's length
_PART_BYTES = 4 << 20  # of Parquet, that are there twice: as pyarrow has them, and in x
_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"


def decode_parquet(payload: bytes, reading: Reading, budget: Budget) -> Batch:
    """A Parquet file; only the chosen columns are read, some rows at a time."""
    _check_parquet_ends(payload)
    with _refusals("Parquet") as pa:
        from pyarrow import parquet

        metadata = parquet.read_metadata(pa.BufferReader(payload))
        table = _Table(metadata.schema.to_arrow_schema(), reading, budget)
        _check_parquet_claim(metadata, table, budget)
        names = list(table.chosen.all)
        file = parquet.ParquetFile(
            pa.BufferReader(payload), metadata=metadata, read_dictionary=table.worded, pre_buffer=False
        )
        table.expect(metadata.num_rows)
        rows = max(1, _PART_BYTES // (table.dtype.itemsize * len(table.chosen.x)))
        for part in file.iter_batches(rows, columns=names, use_threads=False):
            table.add(part)
        if budget.rows != metadata.num_rows:
            raise BatchRejected("bad_format", f"the footer tells of {metadata.num_rows} rows, {budget.rows} are there")
        return table.batch()


def decode_arrow(payload: bytes, reading: Reading, budget: Budget) -> Batch:
    """An Arrow IPC file (Feather 2 is one), or an Arrow IPC stream that ends with its mark; only the chosen columns."""
    is_file = payload.startswith(_ARROW[: len(payload)])
    _check_arrow_ends(payload, is_file)
    with _refusals("Arrow") as pa:
        opened = pa.ipc.open_file if is_file else pa.ipc.open_stream
        schema = opened(pa.BufferReader(payload)).schema
        table = _Table(schema, reading, budget)
        places = {name: place for place, name in enumerate(schema.names)}
        chosen = [places[name] for name in table.chosen.all]
        source = pa.BufferReader(payload)
        reader = opened(source, options=pa.ipc.IpcReadOptions(use_threads=False, included_fields=chosen))
        for part in _iter_parts(reader, is_file):
            part.validate(full=True)  # nothing else keeps offsets within their buffers
            table.add(part)
        if not is_file and source.tell() < len(payload):
            raise BatchRejected("trailing_bytes", f"{len(payload) - source.tell()} bytes after the end of the stream")
        return table.batch()


class _Table:
    """The chosen columns of a table, which come part by part."""

    def __init__(self, schema: Any, reading: Reading, budget: Budget) -> None:
        self._budget = budget
        types = {field.name: field.type for field in schema}
        lists = {name for name, kind in types.items() if is_list(kind)}
        self.chosen: Chosen = choose(schema.names, lists, reading)
        self.holds_lists = self.chosen.x[0] in lists
        self.dtype = np.result_type(*(number_type(name, types[name]) for name in self.chosen.x))
        check_words(self.chosen.y, types, "bad_labels")
        check_words(self.chosen.task, types, "bad_task")
        words = (name for name in (self.chosen.y, self.chosen.task) if name is not None)
        self.worded = [name for name in words if not is_integer(types[name])]
        self._expected = 0
        self._x: list[np.ndarray] = []
        self._y: list[Words] = []
        self._tasks: set[str] = set()

    def expect(self, rows: int) -> None:
        """So many rows are said to come, and room for them is made at once: `batch` then copies nothing."""
        self._expected = rows

    def add(self, part: Any) -> None:
        """A pyarrow Table or RecordBatch with at least the chosen columns."""
        if part.num_rows == 0:
            return
        self._budget.take(0, rows=part.num_rows)
        x = self._lists(part) if self.holds_lists else self._numbers(part)
        if self._x and x.shape[1] != self._x[0].shape[1]:
            text = f"x: rows of {x.shape[1]} values, those before have {self._x[0].shape[1]}"
            raise BatchRejected("schema_mismatch", text)
        self._keep(x)
        if self.chosen.y is not None:
            self._y += words_of(part.column(self.chosen.y), self.chosen.y, "bad_labels", self._budget)
        if self.chosen.task is not None:
            for words in words_of(part.column(self.chosen.task), self.chosen.task, "bad_task", self._budget):
                self._tasks.add(arrays.one_task(words.found()))

    def _keep(self, x: np.ndarray) -> None:
        if not self._expected:
            self._x.append(x)
            return
        if not self._x:
            self._x.append(np.empty((self._expected, x.shape[1]), x.dtype))
        at = self._budget.rows - len(x)
        if self._budget.rows > self._expected:
            raise BatchRejected("bad_format", f"more rows than the {self._expected} that the footer tells of")
        self._x[0][at : at + len(x)] = x

    def batch(self) -> Batch:
        if not self._x:
            raise BatchRejected("bad_shape", "x: no rows, expected 1 or more")
        y = self._labels() if self._y else None
        return arrays.checked(joined(self._x), y, arrays.same_task(self._tasks), self._budget)

    def _labels(self) -> np.ndarray:
        """All of y, which until now was held as what differs."""
        dtype = np.result_type(*(words.values for words in self._y))
        self._budget.take(max(dtype.itemsize, arrays.INTEGER_BYTES) * self._budget.rows)
        y, at = np.empty(self._budget.rows, dtype), 0
        for words in self._y:
            y[at : at + len(words)] = words.values if words.places is None else words.values[words.places]
            at += len(words)
        return y

    def _numbers(self, part: Any) -> np.ndarray:
        self._budget.take(part.num_rows * len(self.chosen.x) * self.dtype.itemsize)
        x = np.empty((part.num_rows, len(self.chosen.x)), self.dtype)
        for i, name in enumerate(self.chosen.x):
            column = part.column(name)
            check_nulls(column, name, "non_finite")
            x[:, i] = lossless(numbers(column), self.dtype, name)
        return x

    def _lists(self, part: Any) -> np.ndarray:
        name = self.chosen.x[0]
        rows = [lists(chunk, name, self._budget) for chunk in chunks(part.column(name)) if len(chunk)]
        if len({row.shape[1] for row in rows}) > 1:
            raise uneven(name)
        return joined(rows)


def _check_parquet_ends(payload: bytes) -> None:
    if not payload.startswith(_PARQUET[: len(payload)]):
        raise BatchRejected("bad_format", f"no Parquet: starts with {payload[:6]!r}")
    if len(payload) < _SHORTEST_PARQUET or not payload.endswith(_PARQUET):
        raise BatchRejected("truncated", f"{len(payload)} bytes, the end of the Parquet file is missing")


def _check_arrow_ends(payload: bytes, is_file: bool) -> None:
    if not is_file and not payload.startswith(_END_OF_STREAM[: min(4, len(payload))]):
        raise BatchRejected("bad_format", f"no Arrow IPC: starts with {payload[:6]!r}")
    last = _ARROW if is_file else _END_OF_STREAM
    if len(payload) < 2 * len(last) or (is_file and not payload.endswith(last)) or last not in payload:
        raise BatchRejected("truncated", f"{len(payload)} bytes, the end of the Arrow data is missing")


def _check_parquet_claim(metadata: Any, table: _Table, budget: Budget) -> None:
    """What the footer tells of the chosen columns: rows, values with repeated ones, bytes."""
    rows = values = told = 0
    names = set(table.chosen.all)
    for i in range(metadata.num_row_groups):
        group = metadata.row_group(i)
        rows += group.num_rows
        for j in range(group.num_columns):
            column = group.column(j)
            if column.path_in_schema.partition(".")[0] in names:
                values += column.num_values
                told += column.total_uncompressed_size
    if rows != metadata.num_rows or min(rows, values, told) < 0:
        raise BatchRejected("bad_format", f"the footer tells of {metadata.num_rows} rows, its row groups of {rows}")
    budget.check_rows(rows)
    budget.check(max(told, values * table.dtype.itemsize))


@contextmanager
def _refusals(what: str) -> Iterator[Any]:
    """pyarrow; what it raises about the bytes becomes a reason."""
    try:
        import pyarrow as pa
        import pyarrow.ipc  # pa.ipc
    except ImportError as error:
        raise BatchRejected("unsupported_format", f"{what} needs the extra supsupd[formats]") from error
    try:
        yield pa
    except (BatchRejected, MemoryError):
        raise
    except (pa.ArrowException, OSError, ValueError, TypeError, LookupError, OverflowError) as error:
        first = str(error).partition("\n")[0]
        raise BatchRejected("bad_format", f"damaged {what}: {printable(first)[:200]}") from error


def _iter_parts(reader: Any, is_file: bool) -> Iterator[Any]:
    if is_file:
        yield from (reader.get_batch(i) for i in range(reader.num_record_batches))
    else:
        yield from reader
