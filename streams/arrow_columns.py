"""One column of a pyarrow table: numbers, lists of numbers, or labels and tasks; all raise BatchRejected."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from streams import arrays
from streams.batch import BatchRejected
from streams.budget import Budget
from streams.columns import quoted
from streams.names import printable


def is_list(kind: Any) -> bool:
    from pyarrow import types

    return types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)


def number_type(name: str, kind: Any) -> np.dtype:
    from pyarrow import types

    value = kind.value_type if is_list(kind) else kind
    if not (types.is_integer(value) or types.is_floating(value) or types.is_boolean(value)):
        raise BatchRejected("bad_dtype", f"column {quoted(name)}: {printable(str(kind))[:80]}, expected numbers")
    return np.dtype(value.to_pandas_dtype())


def is_integer(kind: Any) -> bool:
    from pyarrow import types

    return bool(types.is_integer(kind))


def check_words(name: str | None, types: dict[str, Any], code: str) -> None:
    from pyarrow import types as kinds

    kind = None if name is None else types[name]
    if name and not (kinds.is_integer(kind) or kinds.is_string(kind) or kinds.is_large_string(kind)):
        text = f"column {quoted(name)}: {printable(str(kind))[:80]}, expected integers or strings"
        raise BatchRejected(code, text)


def check_nulls(column: Any, name: str, code: str) -> None:
    if column.null_count:
        raise BatchRejected(code, f"column {quoted(name)}: {column.null_count} of {len(column)} values are null")


@dataclass(frozen=True, slots=True)
class Words:
    """Labels or tasks: integers (n,); or strings, once each as '<U..', and in `places` (n,) which of them each row has:
    very many rows can share a long one."""

    values: np.ndarray
    places: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.values if self.places is None else self.places)

    def found(self) -> np.ndarray:
        """Those that rows have, once each."""
        return np.unique(self.values) if self.places is None else self.values[np.unique(self.places)]


def words_of(column: Any, name: str, code: str, budget: Budget) -> Iterator[Words]:
    """Those of each chunk of a column."""
    check_nulls(column, name, code)
    for chunk in filter(len, chunks(column)):
        if is_integer(chunk.type):
            yield Words(numbers(chunk))
            continue
        coded = chunk if hasattr(chunk, "dictionary") else chunk.dictionary_encode()
        check_nulls(coded.dictionary, name, code)
        texts = coded.dictionary.to_pylist()
        size = arrays.width(texts, code)
        budget.take(size * len(texts))
        yield Words(np.array(texts, f"<U{size // 4}"), numbers(coded.indices))


def numbers(column: Any) -> np.ndarray:
    """The values of an Array or ChunkedArray without nulls."""
    parts = [chunk.to_numpy(zero_copy_only=False) for chunk in chunks(column)]
    return joined(parts)


def joined(parts: list[np.ndarray]) -> np.ndarray:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def chunks(column: Any) -> Sequence[Any]:
    return column.chunks if hasattr(column, "chunks") else [column]


def lists(column: Any, name: str, budget: Budget) -> np.ndarray:
    """Lists of one length each, as (n, length)."""
    from pyarrow import compute

    check_nulls(column, name, "non_finite")
    lengths = compute.min_max(compute.list_value_length(column)).as_py()
    if lengths["min"] != lengths["max"]:
        raise uneven(name)
    values = column.flatten()
    budget.take(len(values) * np.dtype(values.type.to_pandas_dtype()).itemsize)
    check_nulls(values, name, "non_finite")
    return numbers(values).reshape(len(column), lengths["min"])


def uneven(name: str) -> BatchRejected:
    return BatchRejected("bad_shape", f"column {quoted(name)}: lists of different lengths")
