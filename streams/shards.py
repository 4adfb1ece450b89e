"""WebDataset shards: a tar whose files belong together by what their names begin with.

`key.png` and `key.cls` beside each other are one sample; the key ends at the first dot of the file's name. A sample has
one image or array (png, jpg, jpeg or npy, also as `key.x.png`, …) and, if the batch is labelled, a label: `cls`, text
that is an integer or a class's name, or `json`, an object with `y`, `label` or `cls`, and maybe `task`. Other files are
ignored.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from streams import arrays, jsons, tar
from streams.batch import Batch, BatchRejected
from streams.budget import Budget
from streams.images import decode_all
from streams.names import printable
from streams.npy import check_size, read_array, read_header
from streams.reading import Reading

_IMAGES, _ARRAY = ("png", "jpg", "jpeg"), "npy"
_NAME = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)", re.DOTALL)
_INTEGER = re.compile(r"[+-]?[0-9]{1,18}")


@dataclass(slots=True)
class _Sample:
    """x: name and bytes of its one image or array."""

    key: str
    x: tuple[str, memoryview] | None = None
    label: Any = None
    task: Any = None


def decode_shard(payload: bytes, reading: Reading, budget: Budget) -> Batch:
    """The samples in the shard's order; images as in `images.decode_all`, arrays as they are."""
    samples = list(_iter_samples(payload, budget))
    if not samples:
        raise BatchRejected("bad_shape", "no samples, expected `<key>.png`, .jpg or .npy and `<key>.cls` or .json")
    files = [_x_of(sample) for sample in samples]
    pictures = sum(not name.endswith(_ARRAY) for name, _ in files)
    if pictures not in (0, len(files)):
        raise BatchRejected(
            "schema_mismatch", f"{pictures} images and {len(files) - pictures} arrays, expected one kind"
        )
    x = decode_all(files, budget) if pictures else _stack(files, budget)
    task = _one_task(samples) if reading.with_task else None
    return arrays.checked(x, _labels(samples, budget), task, budget)


def _iter_samples(payload: bytes, budget: Budget) -> Iterator[_Sample]:
    sample: _Sample | None = None
    keys: set[str] = set()
    for name, data in tar.iter_files(payload):
        parts = _NAME.fullmatch(name)
        if parts is None:  # hidden, or without a suffix
            continue
        key, field = parts[1], parts[2].lower()
        if sample is None or key != sample.key:
            if sample is not None:
                yield sample
            if key in keys:
                raise BatchRejected("bad_member_name", f"{name[:200]}: its sample's other files are not beside it")
            keys.add(key)
            budget.check_rows(len(keys))
            sample = _Sample(key)
        _add(sample, name, field, data, budget)
    if sample is not None:
        yield sample


def _add(sample: _Sample, name: str, field: str, data: memoryview, budget: Budget) -> None:
    if field.removeprefix("x.") in (*_IMAGES, _ARRAY):
        if sample.x is not None:
            raise BatchRejected("schema_mismatch", f"{name[:200]}: a second x of its sample, expected one")
        sample.x = (name.lower() if field.endswith(_ARRAY) else name, data)
    elif field == "cls":
        sample.label = _class(bytes(data), name)
    elif field == "json":
        fields = jsons.parse(bytes(data), f"{name[:200]}: ", budget)
        sample.label = next((fields[key] for key in ("y", "label", "cls") if key in fields), sample.label)
        sample.task = fields.get("task")


def _class(data: bytes, name: str) -> int | str:
    if len(data) > 4 * arrays.MAX_LABEL_CHARACTERS + 2:
        raise BatchRejected("bad_labels", f"{name[:200]}: {len(data)} bytes, expected an integer or a class's name")
    try:
        text = data.decode().strip()
    except UnicodeDecodeError as error:
        raise BatchRejected("bad_labels", f"{name[:200]}: not UTF-8") from error
    return int(text) if _INTEGER.fullmatch(text) else text


def _x_of(sample: _Sample) -> tuple[str, memoryview]:
    if sample.x is None:
        raise BatchRejected("schema_mismatch", f"sample {printable(sample.key)[:200]} has no png, jpg or npy")
    return sample.x


def _stack(files: list[tuple[str, memoryview]], budget: Budget) -> np.ndarray:
    """.npy arrays of one type and shape as (n, …)."""
    rows: list[np.ndarray] = []
    for name, data in files:
        row = _row(data, name, budget)
        if rows and (row.shape != rows[0].shape or row.dtype != rows[0].dtype):
            text = f"{name[:200]}: {row.dtype} {row.shape}, the first sample has {rows[0].dtype} {rows[0].shape}"
            raise BatchRejected("schema_mismatch", text)
        rows.append(row)
    return np.stack(rows)


def _row(data: memoryview, name: str, budget: Budget) -> np.ndarray:
    where = name[:200]
    header = read_header(data, where)
    check_size(header, len(data), budget.limits.bytes, where)
    arrays.check_x_claim(header.dtype, (1, *header.shape), budget)
    budget.take(header.claimed)
    return read_array(data, header)


def _labels(samples: list[_Sample], budget: Budget) -> np.ndarray | None:
    labels = [sample.label for sample in samples if sample.label is not None]
    if not labels:
        return None
    if len(labels) < len(samples):
        raise BatchRejected("bad_labels", f"{len(labels)} of {len(samples)} samples have a label, expected all or none")
    return jsons.labels(labels, budget)


def _one_task(samples: list[_Sample]) -> str | None:
    return arrays.same_task({jsons.task(sample.task) for sample in samples})
