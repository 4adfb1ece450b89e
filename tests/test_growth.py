"""Four times the size costs about four times the work, whatever there is four times as many of.

What is measured is the processor time of this thread, the least of some runs, and a square would be sixteen times.
"""

import gc
import io
import json
import tarfile
import time
import zipfile

import numpy as np
import pyarrow as pa
import pytest
from folders import put
from test_expansion import ipc
from test_images import grey, image_bytes
from test_shards import ROW, shard
from test_tables import parquet

from streams.batch import BatchRejected
from streams.formats import Limits, Reading, pack_images, read
from streams.framing import is_closed, told_by
from streams.markers import check_sums
from streams.tree import walk
from supsupd.learning.labels import ClassList

MOST = 10.0  # times the work for four times the size: caches and sorting cost something
READING = Reading(Limits(bytes=2 << 30), with_task=True)
IMAGE = image_bytes(grey(7))


def work(task):
    """Seconds of this thread's processor time, the least of five runs."""
    times = []
    gc.disable()  # how often it looks through all the tests' objects is another matter
    try:
        for _ in range(5):
            began = time.thread_time()
            task()
            times.append(time.thread_time() - began)
    finally:
        gc.enable()
    return min(times)


def assert_linear(task_of, size):
    """task_of: what to do for a size. The larger one first, which warms up for both."""
    large = work(task_of(4 * size))
    assert large < MOST * work(task_of(size))


def names(count):
    return [f"column {i}" for i in range(count)]


def wide(columns):
    one = pa.array(np.zeros(1, np.int8))
    return pa.table(dict.fromkeys(names(columns), one))


def wide_csv(columns, last="y"):
    return f"{','.join(names(columns - 1))},{last}\n{'1,' * (columns - 1)}2\n".encode()


def extended(records):
    """A tar with so many records in extended headers of the largest size."""
    parts = []
    for _ in range(records // 8000):
        info = tarfile.TarInfo("h")
        info.type, info.size = tarfile.XHDTYPE, 8 * 8000
        parts.append(info.tobuf(tarfile.USTAR_FORMAT) + b"8 a=bcd\n" * 8000)
    return b"".join(parts) + shard(("1.npy", ROW))


def deflated(megabytes):
    """An .npz that deflates to nothing less."""
    x, target = io.BytesIO(), io.BytesIO()
    np.save(x, np.random.default_rng(0).integers(0, 255, (megabytes, 1 << 20), dtype=np.uint8))
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED, compresslevel=0) as archive:
        archive.writestr("x.npy", x.getvalue())
    return target.getvalue()


def texts(rows):
    return [f"class {i}" for i in range(rows)]


MANY = {
    "columns of a CSV file": ("csv", wide_csv, 20_000),
    "columns of a CSV file, one of them twice": ("csv", lambda n: wide_csv(n, "column 0"), 20_000),
    "rows of a CSV file": ("csv", lambda n: b"a,y\n" + b"1,u\n" * n, 20_000),
    "labels of a CSV file": ("csv", lambda n: "\n".join(["a,y", *(f"1,{text}" for text in texts(n))]).encode(), 20_000),
    "columns of a Parquet file": ("parquet", lambda n: parquet(wide(n)), 2000),
    "row groups of a Parquet file": (
        "parquet",
        lambda n: parquet(pa.table({"a": np.zeros(n, np.int8)}), row_group_size=1),
        1000,
    ),
    "labels of a Parquet file": ("parquet", lambda n: parquet(pa.table({"a": np.zeros(n), "y": texts(n)})), 50_000),
    "columns of an Arrow file": ("arrow", lambda n: ipc(wide(n)), 3000),
    "columns of an Arrow stream": ("arrow", lambda n: ipc(wide(n), new=pa.ipc.new_stream), 3000),
    "parts of an Arrow file": (
        "arrow",
        lambda n: ipc(pa.table({"a": np.zeros(n, np.int8), "y": ["a"] * n}), max_chunksize=1),
        1000,
    ),
    "values of a JSON object": ("json", lambda n: b'{"x":[[' + b"1," * n + b"1]]}", 200_000),
    "rows of a JSON object": ("json", lambda n: json.dumps({"x": [[1]] * n, "y": texts(n)}).encode(), 20_000),
    "keys of a JSON object": ("json", lambda n: json.dumps({"x": [[1]]} | dict.fromkeys(texts(n))).encode(), 50_000),
    "brackets of a JSON object": ("json", lambda n: b'{"x":[[1]],"z":' + b"[" * n + b"]" * n + b"}", 100_000),
    "JSON lines": ("jsonl", lambda n: b'{"x":[1],"y":"a"}\n' * n, 3000),
    "empty lines": ("jsonl", lambda n: b'{"x":[1]}\n' + b"\n" * n, 200_000),
    "deflated bytes": ("npz", deflated, 40),
    "samples of a shard": ("tar", lambda n: shard(*((f"{i}.npy", ROW) for i in range(n))), 1000),
    "files that a shard ignores": ("tar", lambda n: shard(("1.npy", ROW), *((f".{i}", b"") for i in range(n))), 3000),
    "records of a tar": ("tar", extended, 40_000),
    "bytes after a tar": ("tar", lambda n: shard(("1.npy", ROW)) + bytes(512 * n), 50_000),
    "images of a folder": ("images", lambda n: pack_images([(f"a/{i}.png", IMAGE) for i in range(n)]), 500),
}


@pytest.mark.parametrize(("form", "make", "size"), MANY.values(), ids=MANY.keys())
def test_reading_grows_no_faster_than_what_is_read(form, make, size):
    def task_of(count):
        payload = make(count)

        def task():
            try:
                read(payload, form, READING)
            except BatchRejected as rejection:
                assert rejection.code in ("bad_header", "bad_format")

        return task

    assert_linear(task_of, size)


def test_looking_at_a_marked_folder_grows_no_faster_than_its_images(tmp_path):
    def task_of(count):
        folder = tmp_path / f"{count}"
        paths = [put(folder / "b" / "a" / f"{i}.png", b"") for i in range(count)]
        sums = "".join(f"{'0' * 64}  a/{path.name}\n" for path in paths).encode()
        put(folder / "b.sha256", sums)
        (candidate,) = walk(str(folder))
        digests = {member.path: "0" * 64 for member in candidate.members}

        def task():
            assert candidate.is_marked
            check_sums(sums, candidate.markers[0], digests)

        return task

    assert_linear(task_of, 1000)


@pytest.mark.parametrize("text", [b'\\"', b'"', b"\\", b"[", b'"a":1,'])
def test_finding_a_line_s_name_grows_no_faster_than_the_line(text):
    def task_of(count):
        line = b"{" + text * count + b"}"
        return lambda: (told_by(line), is_closed(line))

    assert_linear(task_of, 30_000)


@pytest.mark.parametrize("known", [0, 1])
def test_taking_up_labels_grows_no_faster_than_the_labels(known):
    def task_of(count):
        y = np.arange(count)
        classes = ClassList(tuple(range(count // 2 * known)), 2 * count)
        return lambda: classes.extended(y).encode(y)

    assert_linear(task_of, 10_000)


@pytest.mark.parametrize("form", ["csv", "parquet", "arrow"])
def test_tables_of_very_many_columns_are_read(form):
    write = {
        "csv": lambda: wide_csv(60_000, "c"),
        "parquet": lambda: parquet(wide(60_000)),
        "arrow": lambda: ipc(wide(60_000)),
    }
    assert read(write[form](), form, Reading()).x.shape == (1, 60_000)
