"""What little bytes may become: every format is held to the same budget, and to memory that goes by it."""

import io
import json
import struct
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from daemon_process import until
from PIL import Image
from test_shards import shard
from test_tables import parquet

from streams.batch import BatchRejected
from streams.budget import RATIO_MATTERS_FROM, Budget, most_unpacked, working_bytes
from streams.decoder import ProcessDecoder, ProcessLimits
from streams.formats import Limits, Reading, pack_images, read
from streams.wire import Malformed, check_reply

LONG, MANY = "l" * 256, 300_000
SPARSE = [LONG] + ["a"] * (MANY - 1)  # one long label among many short ones
SMALL = 1_500_000  # bytes: no hostile file here is larger
LIBRARY = 64 << 20  # bytes that pyarrow's code takes, once


def ipc(table, compression="zstd", new=pa.ipc.new_file, **options):
    target = io.BytesIO()
    with new(target, table.schema, options=pa.ipc.IpcWriteOptions(compression=compression)) as writer:
        writer.write_table(table, **options)
    return target.getvalue()


def packed(**arrays):
    target = io.BytesIO()
    np.savez_compressed(target, **arrays)
    return target.getvalue()


def one_colour(height, width, form="PNG", value=7):
    target = io.BytesIO()
    Image.fromarray(np.full((height, width, 3), value, np.uint8)).save(target, form, optimize=True, quality=1)
    return target.getvalue()


def zeros(rows, columns, dtype=np.int8):
    column = pa.array(np.zeros(rows, dtype))
    return pa.table({f"c{i}": column for i in range(columns)})


def lists(rows, width):
    return pa.table({"x": pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(rows * width, np.int8)), width)})


def labelled(labels):
    return pa.table({"a": np.zeros(len(labels), np.int8), "y": labels})


def overstated(payload):
    """An Arrow file whose first compressed buffer says that it unpacks to a terabyte."""
    size = struct.pack("<q", 8 * 100_000)
    assert payload.count(size) >= 1
    return payload.replace(size, struct.pack("<q", 1 << 40), 1)


def understated(payload, *told):
    """A Parquet file whose footer says 100 wherever it says one of these numbers."""
    length = int.from_bytes(payload[-8:-4], "little")
    pages, footer = payload[: -8 - length], payload[-8 - length :]
    for number in told:
        said = varint(number)
        assert said in footer
        footer = footer.replace(said, varint(100, len(said)))
    return pages + footer


def varint(number, length=0):
    """As Thrift writes it, in at least so many bytes."""
    rest, parts = 2 * number, []
    while rest or not parts:
        parts.append(rest & 0x7F)
        rest >>= 7
    parts += [0] * (length - len(parts))
    return bytes([part | 0x80 for part in parts[:-1]] + [parts[-1]])


HOSTILE = {
    "npz of one value": ("npz", lambda: packed(x=np.zeros((1_000_000, 64), np.int8))),
    "npz with a long label": ("npz", lambda: packed(x=np.zeros((MANY, 1), np.int8), y=np.array(SPARSE))),
    "npz whose labels grow": (
        "npz",
        lambda: packed(x=np.zeros((1_000_000, 12), np.int8), y=np.zeros(1_000_000, np.int8)),
    ),
    "npz of a task for each row": (
        "npz",
        lambda: packed(x=np.zeros((MANY, 1), np.int8), task=np.array(["t" * 255] * MANY)),
    ),
    "parquet of one value": ("parquet", lambda: parquet(zeros(1_000_000, 64), compression="zstd")),
    "parquet of bools": ("parquet", lambda: parquet(zeros(1_000_000, 64, bool), compression="zstd")),
    "parquet of lists": ("parquet", lambda: parquet(lists(1_000_000, 64), compression="zstd")),
    "parquet with a long label": ("parquet", lambda: parquet(labelled(SPARSE), compression="zstd")),
    "parquet of one long label": ("parquet", lambda: parquet(labelled([LONG] * MANY))),
    "parquet of plain labels": (
        "parquet",
        lambda: parquet(labelled([LONG] * MANY), compression="zstd", use_dictionary=False),
    ),
    "arrow file": ("arrow", lambda: ipc(zeros(1_000_000, 64))),
    "arrow stream": ("arrow", lambda: ipc(zeros(1_000_000, 64), new=pa.ipc.new_stream)),
    "arrow by LZ4": ("arrow", lambda: ipc(zeros(1_000_000, 32), "lz4", max_chunksize=200_000)),
    "arrow beyond its memory": ("arrow", lambda: ipc(zeros(1_000_000, 64, np.int64))),
    "arrow that overstates": ("arrow", lambda: overstated(ipc(zeros(100_000, 1, np.int64)))),
    "arrow of lists": ("arrow", lambda: ipc(lists(1_000_000, 64))),
    "arrow with a long label": ("arrow", lambda: ipc(labelled(SPARSE))),
    "arrow of one long label": ("arrow", lambda: ipc(labelled([LONG] * MANY))),
    "csv with a long label": ("csv", lambda: f"a,y\n0,{LONG}\n".encode() + b"0,a\n" * MANY),
    "one PNG": ("images", lambda: pack_images([("a/1.png", one_colour(4096, 4096))])),
    "many PNGs": ("images", lambda: pack_images([(f"a/{i}.png", one_colour(512, 512)) for i in range(40)])),
    "many JPEGs": ("images", lambda: pack_images([(f"a/{i}.jpg", one_colour(4000, 4000, "JPEG")) for i in range(2)])),
    "shard of PNGs": ("tar", lambda: shard(*((f"{i}.png", one_colour(512, 512)) for i in range(40)))),
}


def memory_of(decoder, field="VmHWM"):
    """What its one worker has taken at most, or holds (VmRSS), in bytes."""
    (pid,) = decoder.pids
    (line,) = (line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) << 10


@contextmanager
def bounded(decoder, payload):
    """Meanwhile its worker stays the same, and takes no more memory than these bytes may need."""
    pids = decoder.pids
    most = max(memory_of(decoder), memory_of(decoder, "VmRSS") + LIBRARY + working_bytes(len(payload), Limits()))
    yield
    assert decoder.pids == pids
    assert memory_of(decoder) <= most


@pytest.fixture(scope="module")
def worker():
    decoder = ProcessDecoder(Reading(with_task=True), ProcessLimits(memory_bytes=2 << 30))
    decoder.start()
    yield decoder
    decoder.close()


@pytest.mark.parametrize(("form", "make"), HOSTILE.values(), ids=HOSTILE.keys())
def test_what_unpacks_to_over_200_times_its_size_is_refused_before_it_is_unpacked(worker, form, make):
    payload = make()
    assert len(payload) < SMALL
    reason = r"^too_large: \d+ bytes (unpack to \d+, at most 200 times expected|take over \d+ while they are decoded)$"
    with bounded(worker, payload), pytest.raises(BatchRejected, match=reason):
        worker.inspect(payload, form)


@pytest.mark.parametrize(
    "told", [[20_000_000], [80_003_850], [20_000_000, 80_003_850]], ids=["values", "bytes", "both"]
)
def test_a_parquet_file_that_understates_is_refused_all_the_same(worker, told):
    honest = parquet(lists(100, 200_000), compression="zstd", use_dictionary=False)
    payload = understated(honest, *told)
    with bounded(worker, payload), pytest.raises(BatchRejected, match=r"^(too_large|bad_format): "):
        worker.inspect(payload, "parquet")


def text(form, rows):
    """So many rows, of which one has a long label."""
    if form == "json":
        return json.dumps({"x": [[0]] * rows, "y": [LONG] + [""] * (rows - 1)}, separators=(",", ":")).encode()
    return f'{{"x":[0],"y":"{LONG}"}}\n'.encode() + b'{"x":[0],"y":""}\n' * (rows - 1)


@pytest.mark.parametrize("form", ["json", "jsonl"])
def test_labels_in_text_count_as_they_are_held(form):
    payload = text(form, 50_000)
    assert read(payload, form, Reading()).y.nbytes == 50_000 * 4 * 256
    with pytest.raises(BatchRejected, match="at most 30 times expected"):
        read(payload, form, Reading(Limits(ratio=30)))
    with pytest.raises(BatchRejected, match=r"unpacks to \d+ bytes, at most 51200000 expected"):
        read(payload, form, Reading(Limits(bytes=51_200_000)))


def test_columns_that_are_not_chosen_take_nothing(worker):
    huge = pa.array(["u" * 30_000_000] * 10)
    for form, payload in (
        ("parquet", parquet(lists(10, 1).append_column("u", huge), compression="zstd", use_dictionary=False)),
        ("arrow", ipc(lists(10, 1).append_column("u", huge))),
    ):
        with bounded(worker, payload):
            assert worker.inspect(payload, form).samples == 10


def test_a_worker_that_waits_holds_nothing_of_what_it_has_decoded(worker):
    worker.inspect(b"a\n1\n", "csv")
    for form, payload in (("json", text("json", 100_000)), ("parquet", parquet(pa.table(sensors(300_000))))):
        held = memory_of(worker, "VmRSS")
        worker.inspect(payload, form)
        until(lambda: memory_of(worker, "VmRSS") < held + (32 << 20))  # noqa: B023 - asked here and now


# --- what is honest passes --------------------------------------------------------------------------------


def sensors(rows=100_000):
    """Values as they are measured, and a class in words."""
    order = np.random.default_rng(0)
    columns = {f"sensor {i}": order.normal(20, 5, rows).round(2) for i in range(8)}
    return columns | {
        "count": order.poisson(1, rows),
        "y": np.array(["idle", "running", "fault"])[order.integers(0, 3, rows)],
    }


def as_csv(columns):
    lines = zip(*(column.tolist() for column in columns.values()), strict=True)
    return "\n".join([",".join(columns), *(",".join(map(str, line)) for line in lines), ""]).encode()


def sparse(rows=20_000, columns=1000):
    """Mostly zeros, as words counted in texts are."""
    order = np.random.default_rng(0)
    x = np.zeros((rows, columns), np.float32)
    x[order.integers(0, rows, rows * 20), order.integers(0, columns, rows * 20)] = 1
    return x


HONEST = {
    "csv": ("csv", lambda: as_csv(sensors()), (100_000, 9)),
    "parquet": ("parquet", lambda: parquet(pa.table(sensors())), (100_000, 9)),
    "feather": ("arrow", lambda: ipc(pa.table(sensors()), "lz4"), (100_000, 9)),
    "npz of sparse rows": ("npz", lambda: packed(x=sparse(), y=np.zeros(20_000, np.int8)), (20_000, 1000)),
    "one-hot columns": (
        "parquet",
        lambda: parquet(pa.table({f"c{i}": np.arange(50_000) % 100 == i for i in range(100)})),
        (50_000, 100),
    ),
}


@pytest.mark.parametrize(("form", "make", "shape"), HONEST.values(), ids=HONEST.keys())
def test_honest_data_pass(worker, form, make, shape):
    payload = make()
    with bounded(worker, payload):
        assert worker.decode(payload, form).x.shape == shape


# --- the budget itself, and what a worker claims ----------------------------------------------------------


def test_small_batches_may_pack_as_they_like_and_no_batch_may_take_more_than_is_set():
    limits = Limits(bytes=100 << 20)
    assert most_unpacked(1, limits) == RATIO_MATTERS_FROM
    assert most_unpacked(1 << 17, limits) == 200 << 17
    assert most_unpacked(1 << 30, limits) == 100 << 20
    budget = Budget(1 << 17, limits)
    budget.take(200 << 16, rows=1)
    budget.take(200 << 16)
    with pytest.raises(BatchRejected, match="too_large: 131072 bytes unpack to 26214401, at most 200 times expected"):
        budget.take(1)


@pytest.mark.parametrize("dtype", ["|u1", "<U256"])
def test_a_worker_that_claims_more_than_the_bytes_may_become_is_not_believed(dtype):
    rows = 1 << 15
    x, y = {"dtype": "|u1", "shape": [rows, 600]}, {"dtype": "<i8", "shape": [rows]}
    if dtype != "|u1":
        x, y = {"dtype": "|u1", "shape": [rows, 1]}, {"dtype": dtype, "shape": [rows]}
    size = rows * (np.dtype(x["dtype"]).itemsize * x["shape"][1] + np.dtype(y["dtype"]).itemsize)
    reply = {"x": x, "y": y, "task": None}
    assert check_reply(reply, size, Budget(size, Limits())).x.shape == tuple(x["shape"])
    with pytest.raises(Malformed, match="at most 200 times expected"):
        check_reply(reply, size, Budget(1000, Limits()))
