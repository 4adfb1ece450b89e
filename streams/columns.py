"""Which columns of a table are samples, labels and task, and samples put together from columns."""

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from streams.batch import BatchRejected
from streams.names import printable
from streams.reading import Reading

_EXACT_IN_FLOAT64 = 1 << 53
_SHOWN = 8  # names, in a reason


@dataclass(frozen=True, slots=True)
class Chosen:
    """Names of the columns to read; x is one column of lists, or columns of numbers."""

    x: tuple[str, ...]
    y: str | None
    task: str | None

    @property
    def all(self) -> tuple[str, ...]:
        return tuple(name for name in (*self.x, self.y, self.task) if name is not None)


def choose(names: Sequence[str], lists: Collection[str], reading: Reading) -> Chosen:
    """The columns of a table with these `names` that `reading.columns` means; `lists` are those that hold lists.

    Raises BatchRejected bad_header, schema_mismatch.
    """
    known = Counter(names)
    if len(known) < len(names):
        twice = min(name for name, count in known.items() if count > 1)
        raise BatchRejected("bad_header", f"two columns are called {quoted(twice)}")
    wanted = reading.columns
    for name in (*wanted.x, wanted.y, wanted.task):
        if name is not None and name not in known:
            raise BatchRejected("schema_mismatch", f"no column {quoted(name)}, found {listed(names)}")
    y = wanted.y or next((name for name in ("y", "label") if name in known), None)
    task = wanted.task or ("task" if "task" in known else None)
    x = wanted.x or _default_x([name for name in names if name not in (y, task)], lists)
    if not x:
        raise BatchRejected("schema_mismatch", f"no columns of samples, found {listed(names)}")
    if len(x) > 1 and any(name in lists for name in x):
        raise BatchRejected(
            "schema_mismatch", f"several columns of x, expected one of lists or all of numbers: {listed(x)}"
        )
    return Chosen(x, y, task if reading.with_task else None)


def lossless(values: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    """The numbers of column `name` as `dtype`, if it holds all of them exactly."""
    wide = dtype.kind == "f" and values.dtype.kind in "iu" and values.dtype.itemsize == 8 and len(values) > 0
    if wide and max(int(values.max()), -int(values.min())) > _EXACT_IN_FLOAT64:
        text = f"column {quoted(name)}: integers beyond 2**53 beside floats, expected one type that holds all"
        raise BatchRejected("bad_dtype", text)
    return values.astype(dtype, copy=False)


def quoted(name: str) -> str:
    return f"'{printable(name)[:80]}'"


def listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return (", ".join(quoted(name) for name in names[:_SHOWN]) or "none") + more


def _default_x(names: list[str], lists: Collection[str]) -> tuple[str, ...]:
    return ("x",) if "x" in names and "x" in lists else tuple(names)
