"""What every batch has to fulfil, whatever format it came in; all checks raise BatchRejected."""

from collections.abc import Collection, Iterable
from typing import TypeVar

import numpy as np

from streams.batch import Batch, BatchRejected, Summary
from streams.budget import Budget
from streams.names import printable

T = TypeVar("T")

MAX_LABEL_CHARACTERS = 256
MAX_TASK_CHARACTERS = 255
INTEGER_BYTES = 8  # of a label


def check_x_claim(dtype: np.dtype, shape: tuple[int, ...], budget: Budget) -> None:
    """Type, axes and number of samples that x claims, before memory is taken for it."""
    if dtype.kind not in "fiub" or dtype.itemsize > 8:
        raise BatchRejected("bad_dtype", f"x: {dtype}, expected float16/32/64, integers or bool")
    if not 2 <= len(shape) <= 4 or 0 in shape:
        raise BatchRejected("bad_shape", f"x: {shape}, expected (n, d), (n, H, W) or (n, H, W, C), n >= 1")
    budget.check_rows(shape[0])


def check_y_claim(dtype: np.dtype, shape: tuple[int, ...], samples: int) -> None:
    """Type and length that y claims."""
    if dtype.kind not in "iuU":
        raise BatchRejected("bad_labels", f"y: {dtype}, expected integers or strings")
    if shape != (samples,):
        raise BatchRejected("bad_labels", f"y: shape {shape}, expected ({samples},) as x has {samples} samples")
    if dtype.kind == "U" and not 0 < dtype.itemsize <= 4 * MAX_LABEL_CHARACTERS:
        raise BatchRejected("bad_labels", f"y: strings of 1 to {MAX_LABEL_CHARACTERS} characters expected")


def check_task_claim(dtype: np.dtype, shape: tuple[int, ...], samples: int) -> None:
    """Type and shape that `task` claims: one integer or string, or as many as there are samples."""
    if dtype.kind not in "iuU" or shape not in ((), (1,), (samples,)):
        raise BatchRejected(
            "bad_task", f"task: {dtype} of shape {shape}, expected one integer or string, or ({samples},) of it"
        )
    if dtype.kind == "U" and not 0 < dtype.itemsize <= 4 * MAX_TASK_CHARACTERS:
        raise BatchRejected("bad_task", f"task: expected 1 to {MAX_TASK_CHARACTERS} characters")


def finite(x: np.ndarray) -> np.ndarray:
    """x itself, if nothing in it is NaN or infinite."""
    if x.dtype.kind == "f":
        is_good = np.isfinite(x)
        bad = x.size - int(np.count_nonzero(is_good))
        if bad:
            first = tuple(int(i) for i in np.unravel_index(is_good.argmin(), x.shape))
            text = f"x: {bad} of {x.size} values are NaN or infinite, the first at {first}"
            raise BatchRejected("non_finite", text)
    return x


def labels(y: np.ndarray) -> np.ndarray:
    """y as int64, or as the strings that it holds."""
    if y.dtype.kind == "U":
        return _unicode(y, "bad_labels", "y")
    if y.dtype == np.uint64 and y.max() > np.iinfo(np.int64).max:
        raise BatchRejected("bad_labels", f"y: {y.max()} does not fit into int64")
    return y.astype(np.int64, copy=False)


def one_task(values: np.ndarray) -> str:
    """The one value of `task`; an integer becomes its decimal digits."""
    values = values.reshape(-1)
    if values.dtype.kind == "U":
        _unicode(values, "bad_task", "task")
    return task_text(str(same_task(set(np.unique(values)))))


def same_task(found: Collection[T]) -> T | None:
    """The one task that was found, if any."""
    if len(found) > 1:
        raise BatchRejected("bad_task", f"task: {len(found)} different ones, expected one for the whole batch")
    return next(iter(found), None)


def task_text(task: str) -> str:
    """A task's name itself, if it is one."""
    if not task or not task.isprintable():
        raise BatchRejected("bad_task", f"task: {printable(task)!r}, expected 1 or more printable characters")
    if len(task) > MAX_TASK_CHARACTERS:
        raise BatchRejected("bad_task", f"task: expected 1 to {MAX_TASK_CHARACTERS} characters")
    return task


def width(values: Iterable[str], code: str) -> int:
    """Bytes of each text in an array of them: the longest sets the size of all."""
    longest = max(map(len, values), default=0)
    most = MAX_TASK_CHARACTERS if code == "bad_task" else MAX_LABEL_CHARACTERS
    if longest > most:
        raise BatchRejected(code, f"{longest} characters, expected strings of 1 to {most}")
    return 4 * max(longest, 1)


def strings(values: list[str], code: str, budget: Budget) -> np.ndarray:
    """Texts as '<U..', taken from the budget."""
    size = width(values, code)
    budget.take(size * len(values))
    return np.array(values, f"<U{size // 4}")


def checked(x: np.ndarray, y: np.ndarray | None, task: str | None, budget: Budget) -> Batch:
    """The batch of these arrays, which lie in memory already."""
    check_x_claim(x.dtype, x.shape, budget)
    budget.check(x.nbytes + (0 if y is None else y.nbytes))
    finite(x)
    if y is not None:
        check_y_claim(y.dtype, y.shape, len(x))
        y = labels(y)
    return Batch(x, y, None if task is None else task_text(task))


def summary(batch: Batch) -> Summary:
    """What is kept of a batch when its arrays are not."""
    return Summary(len(batch.x), batch.y is not None, batch.task)


def _unicode(values: np.ndarray, code: str, where: str) -> np.ndarray:
    """numpy takes any 32 bits for a character; only real ones can be compared, stored and sent."""
    points = np.ascontiguousarray(values).view(np.uint32)
    bad = np.count_nonzero((points > 0x10FFFF) | ((points >= 0xD800) & (points <= 0xDFFF)))
    if bad:
        raise BatchRejected(code, f"{where}: {bad} characters are not Unicode")
    return values
