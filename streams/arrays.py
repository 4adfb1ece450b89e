"""What every batch has to fulfil, whatever format it came in; all checks raise BatchRejected."""

from collections.abc import Collection
from typing import TypeVar

import numpy as np

from streams.batch import Batch, BatchRejected, Summary
from streams.names import printable
from streams.reading import Limits

T = TypeVar("T")

MAX_LABEL_CHARACTERS = 256
MAX_TASK_CHARACTERS = 255


def check_x_claim(dtype: np.dtype, shape: tuple[int, ...], limits: Limits) -> None:
    """Type, axes and number of samples that x claims, before memory is taken for it."""
    if dtype.kind not in "fiub" or dtype.itemsize > 8:
        raise BatchRejected("bad_dtype", f"x: {dtype}, expected float16/32/64, integers or bool")
    if not 2 <= len(shape) <= 4 or 0 in shape:
        raise BatchRejected("bad_shape", f"x: {shape}, expected (n, d), (n, H, W) or (n, H, W, C), n >= 1")
    check_samples(shape[0], limits)


def check_samples(samples: int, limits: Limits) -> None:
    if samples > limits.samples:
        raise BatchRejected("too_many_samples", f"x: {samples}, at most {limits.samples} expected")


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
        bad = np.flatnonzero(~np.isfinite(x))
        if len(bad):
            first = tuple(int(i) for i in np.unravel_index(bad[0], x.shape))
            text = f"x: {len(bad)} of {x.size} values are NaN or infinite, the first at {first}"
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


def strings(values: list[str], code: str, limits: Limits) -> np.ndarray:
    """Texts as '<U..'; the longest of them, which sets the size of all, is looked at first."""
    longest = max(map(len, values), default=0)
    most = MAX_TASK_CHARACTERS if code == "bad_task" else MAX_LABEL_CHARACTERS
    if longest > most:
        raise BatchRejected(code, f"{longest} characters, expected strings of 1 to {most}")
    if 4 * longest * len(values) > limits.bytes:
        text = f"{len(values)} strings of up to {longest} characters take over {limits.bytes} bytes"
        raise BatchRejected("too_large", text)
    return np.array(values, f"<U{max(longest, 1)}")


def checked(x: np.ndarray, y: np.ndarray | None, task: str | None, limits: Limits) -> Batch:
    """The batch of these arrays, which lie in memory already."""
    check_x_claim(x.dtype, x.shape, limits)
    if x.nbytes > limits.bytes:
        raise BatchRejected("too_large", f"x takes {x.nbytes} bytes, at most {limits.bytes} expected")
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
