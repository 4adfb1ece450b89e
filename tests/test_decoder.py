"""A worker process answers as this process would, and costs only a reason whatever the bytes do to it."""

import contextlib
import io
import os
import select
import signal
import subprocess
import sys
import threading
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from daemon_process import until
from hypothesis import given, settings
from hypothesis import strategies as st
from test_shards import TWO, shard
from test_tables import arrow_file, arrow_stream, feather, parquet

from streams.batch import Batch, BatchRejected
from streams.budget import Budget
from streams.decoder import DecoderUnavailable, InlineDecoder, ProcessDecoder, ProcessLimits
from streams.formats import Columns, Limits, Reading, encode, pack_images
from streams.wire import Malformed, check_reply

READING = Reading(Limits(bytes=64 << 20), with_task=True)
X = np.arange(12, dtype=np.float32).reshape(4, 3)
TABLE = pa.table({"a": [1, 2, 3], "b": [0.5, 1, 2], "y": ["u", "v", "u"]})


def npy(array):
    target = io.BytesIO()
    np.save(target, array)
    return target.getvalue()


def png(value):
    from PIL import Image

    target = io.BytesIO()
    Image.fromarray(np.full((4, 6), value, np.uint8)).save(target, "PNG")
    return target.getvalue()


GOOD = {
    "npz": ("npz", encode(Batch(X, np.arange(4), "line 3"))),
    "strings": ("npz", encode(Batch(X.astype(np.float16), np.array(["a", "dög", "", "🐦"])))),
    "bools": ("npz", encode(Batch(X > 3, None))),
    "npy": ("npy", npy(X.astype(">i8"))),
    "images": ("images", pack_images([("a/1.png", png(1)), ("b/1.png", png(2))])),
    "tar": ("tar", shard(*TWO)),
    "csv": ("csv", b"a,y,task\n1,2,t\n3,4,t\n"),
    "parquet": ("parquet", parquet(TABLE)),
    "arrow": ("arrow", arrow_file(TABLE)),
    "stream": ("arrow", arrow_stream(TABLE)),
    "feather": ("arrow", feather(TABLE)),
    "json": ("json", b'{"x": [[1, 2]], "y": ["u"], "task": "t"}'),
    "jsonl": ("jsonl", b'{"x": [1, 2]}\n'),
}
BAD = {
    "empty": ("npz", b""),
    "cut off": ("npz", encode(Batch(X, None))[:100]),
    "unknown": ("exe", b"MZ"),
    "NaN": ("csv", b"a\nnan\n"),
    "control characters": ("csv", b"a\n\x1b[31m\n"),
    "long names": ("csv", ",".join(f"column {i:0100}" for i in range(50)).encode() + b",z,z\n"),
    "bad table": ("parquet", parquet(pa.table({"a": ["x"]}))),
}


@pytest.fixture(scope="module")
def worker():
    decoder = ProcessDecoder(READING)
    yield decoder
    decoder.close()


def pid_of(decoder):
    """Of the only worker."""
    (pid,) = decoder.pids
    return pid


def answer(decoder, form, payload):
    """What a decoder makes of the bytes, in a form that can be compared."""
    try:
        batch = decoder.decode(payload, form)
        summary = decoder.inspect(payload, form)
    except BatchRejected as rejection:
        return rejection.code, rejection.text
    assert (len(batch.x), batch.y is not None, batch.task) == (summary.samples, summary.labelled, summary.task)
    y = None if batch.y is None else (batch.y.dtype, batch.y.tolist())
    assert batch.x.flags.writeable
    return batch.x.dtype, batch.x.shape, batch.x.tobytes(), y, batch.task


@pytest.mark.parametrize(("form", "payload"), [*GOOD.values(), *BAD.values()], ids=[*GOOD, *BAD])
def test_a_worker_answers_as_this_process_would(worker, form, payload):
    assert answer(worker, form, payload) == answer(InlineDecoder(READING), form, payload)


@settings(max_examples=60)
@given(
    st.sampled_from([case for case in GOOD.values() if case[0] not in ("parquet", "arrow")]),
    st.lists(st.tuples(st.integers(0, 5000), st.binary(min_size=1, max_size=4)), max_size=3),
)
def test_a_worker_answers_as_this_process_would_to_damage(worker, case, damage):
    form, payload = case[0], damaged(case[1], damage)
    assert answer(worker, form, payload) == answer(InlineDecoder(READING), form, payload)


@settings(max_examples=150)
@given(
    st.sampled_from([case for case in GOOD.values() if case[0] in ("parquet", "arrow")]),
    st.lists(st.tuples(st.integers(0, 5000), st.binary(min_size=1, max_size=4)), min_size=1, max_size=3),
)
def test_any_damage_to_a_binary_table_gives_a_batch_or_a_rejection(worker, case, damage):
    try:
        assert len(worker.decode(damaged(case[1], damage), case[0]).x) >= 1
    except BatchRejected as rejection:
        assert str(rejection).isprintable()


def damaged(payload, damage):
    target = bytearray(payload)
    for at, replacement in damage:
        start = at % len(target)
        target[start : start + len(replacement)] = replacement
    return bytes(target)


def test_columns_reach_the_worker():
    decoder = ProcessDecoder(Reading(columns=Columns(x=("b",), y="a")))
    try:
        batch = decoder.decode(b"a,b,c\n1,2,z\n", "csv")
        assert (batch.x.tolist(), batch.y.tolist()) == ([[2]], [1])
    finally:
        decoder.close()


def test_threads_get_their_own_answers(worker):
    payloads = [encode(Batch(np.full((i + 1, 2), i), None)) for i in range(40)]
    with ThreadPoolExecutor(4) as pool:
        batches = list(pool.map(lambda payload: worker.decode(payload, "npz"), payloads))
    assert [(len(batch.x), int(batch.x[0, 0])) for batch in batches] == [(i + 1, i) for i in range(40)]


# --- what a worker has ------------------------------------------------------------------------------------


def test_a_worker_has_one_socket_and_none_of_our_files_and_secrets(tmp_path, monkeypatch):
    monkeypatch.setenv("SUPSUPD_SECRET", "swordfish")
    decoder = ProcessDecoder(READING)
    with (tmp_path / "database").open("w") as file:
        os.set_inheritable(file.fileno(), True)
        decoder.inspect(*GOOD["npz"][::-1])
        process = Path(f"/proc/{pid_of(decoder)}")
        try:
            open_files = sorted(str(path.readlink()) for path in (process / "fd").iterdir())
            variables = (process / "environ").read_bytes()
        except PermissionError:
            pytest.skip("the system hides what a process without core dumps has open, except from root")
        finally:
            decoder.close()
    assert open_files[:3] == ["/dev/null"] * 3
    assert [name.partition(":")[0] for name in open_files[3:]] == ["socket"]
    assert b"swordfish" not in variables


def test_a_worker_is_limited(worker):
    worker.inspect(*GOOD["npz"][::-1])
    lines = Path(f"/proc/{pid_of(worker)}/limits").read_text().splitlines()
    hard = {line[:26].strip(): line[26:].split()[1] for line in lines[1:]}
    assert hard["Max file size"] == hard["Max core file size"] == "0"
    assert hard["Max open files"] == "16"
    assert int(hard["Max address space"]) < 4 << 30


def test_a_worker_has_no_network_where_the_system_can_take_it_away(worker):
    worker.inspect(*GOOD["npz"][::-1])
    if subprocess.run(["unshare", "-Un", "true"], capture_output=True).returncode:
        pytest.skip("this system lets nobody have a network of his own")
    assert worker_network(worker) != Path("/proc/self/ns/net").readlink()


def worker_network(worker):
    try:
        return Path(f"/proc/{pid_of(worker)}/ns/net").readlink()
    except PermissionError:
        pytest.skip("the system hides what a process without core dumps has, except from root")


def test_a_worker_ends_with_its_parent():
    code = (
        "import sys; from streams.decoder import *; from streams.formats import Reading\n"
        "decoder = ProcessDecoder(Reading()); decoder.inspect(b'a\\n1\\n', 'csv')\n"
        "print(*decoder.pids, flush=True); sys.stdin.read()"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with parent:
        descriptor = os.pidfd_open(int(parent.stdout.readline()))
        parent.kill()
        ended, _, _ = select.select([descriptor], [], [], 30)
    os.close(descriptor)
    assert ended


# --- a worker that breaks ---------------------------------------------------------------------------------


def test_a_worker_that_died_idle_is_replaced(worker):
    worker.inspect(*GOOD["npz"][::-1])
    os.kill(pid_of(worker), signal.SIGKILL)
    assert worker.inspect(*GOOD["npz"][::-1]).samples == 4


def test_a_worker_that_hangs_is_replaced():
    decoder = ProcessDecoder(READING, ProcessLimits(seconds=1))
    try:
        decoder.inspect(*GOOD["npz"][::-1])
        hanging = pid_of(decoder)
        os.kill(hanging, signal.SIGSTOP)
        assert decoder.inspect(*GOOD["npz"][::-1]).samples == 4
        assert pid_of(decoder) != hanging
    finally:
        decoder.close()


def test_bytes_that_kill_three_workers_are_refused_with_the_signal():
    decoder = ProcessDecoder(READING)
    over = threading.Event()

    def kill_each():
        killed = set()
        while not over.wait(0.001):
            for pid in decoder.pids - killed:
                os.kill(pid, signal.SIGSEGV)
                killed.add(pid)

    killer = threading.Thread(target=kill_each)
    killer.start()
    try:
        with pytest.raises(BatchRejected, match="worker_died: SIGSEGV, 3 times"):
            decoder.inspect(b"a\n" + b"1\n" * 900_000, "csv")
    finally:
        over.set()
        killer.join()
    assert decoder.inspect(*GOOD["npz"][::-1]).samples == 4
    decoder.close()


BIG = encode(Batch(np.zeros((180_000, 64), np.float32), None))  # 46 MB


@pytest.mark.parametrize(
    ("limits", "code"),
    [
        (ProcessLimits(memory_bytes=24 << 20), "oom"),
        (ProcessLimits(seconds=0.001), "timeout"),
        (ProcessLimits(descriptors=3), "worker_died: exit status 1"),
    ],
    ids=["memory", "time", "descriptors"],
)
def test_bytes_that_break_a_limit_three_times_are_refused(limits, code):
    decoder = ProcessDecoder(READING, limits)
    with pytest.raises(BatchRejected, match=f"{code}.*, 3 times"):
        decoder.decode(BIG, "npz")
    decoder.close()


def test_a_worker_is_replaced_after_its_requests():
    decoder = ProcessDecoder(READING, ProcessLimits(requests=2))
    pids = []
    for _ in range(4):
        decoder.inspect(*GOOD["npz"][::-1])
        pids.append(pid_of(decoder))
    decoder.close()
    assert pids[0] == pids[1] != pids[2] == pids[3]


def test_where_no_worker_starts_no_batch_is_to_blame(monkeypatch):
    for program in ("/bin/false", "/none"):
        monkeypatch.setattr(sys, "executable", program)
        with pytest.raises(DecoderUnavailable):
            ProcessDecoder(READING).inspect(*GOOD["npz"][::-1])


def test_a_closed_decoder_starts_no_worker():
    decoder = ProcessDecoder(READING)
    decoder.close()
    decoder.close()
    with pytest.raises(DecoderUnavailable, match="closed"):
        decoder.inspect(*GOOD["npz"][::-1])


# --- several askers ---------------------------------------------------------------------------------------

SLOW = b"a,y\n" + b"1.25,3\n" * 300_000


def several(**limits):
    return ProcessDecoder(READING, ProcessLimits(processes=3, **limits))


def test_who_has_a_slow_batch_keeps_nobody_else_waiting():
    decoder = several()
    decoder.start()
    stopped = pid_of(decoder)
    os.kill(stopped, signal.SIGSTOP)  # whoever gets this one decodes for ever
    try:
        with ThreadPoolExecutor(2) as pool:
            asked = {pool.submit(decoder.inspect, SLOW, "csv", who): who for who in "ab"}
            done, held = wait(asked, timeout=60, return_when=FIRST_COMPLETED)
            assert (len(done), len(held)) == (1, 1)
            for who in ("c", *(asked[one] for one in done)):
                assert decoder.inspect(*GOOD["npz"][::-1], who).samples == 4
            assert not any(one.done() for one in held)
            os.kill(stopped, signal.SIGCONT)
            assert all(one.result().samples == 300_000 for one in asked)
        assert stopped in decoder.pids
    finally:
        os.kill(stopped, signal.SIGCONT)
        decoder.close()


def test_idle_workers_end_but_for_one():
    decoder = several(idle_seconds=0.2)
    most = set()
    with ThreadPoolExecutor(3) as pool:
        asked = [pool.submit(decoder.inspect, SLOW, "csv", who) for who in "abc"]
        while not all(one.done() for one in asked):
            most = max(most, decoder.pids, key=len)
    assert 1 < len(most) <= 3
    until(lambda: len(decoder.pids) == 1)
    assert decoder.pids <= most
    decoder.close()
    assert decoder.pids == set()


def test_workers_that_died_idle_are_no_attempts():
    decoder = several()
    with ThreadPoolExecutor(3) as pool:
        assert [batch.samples for batch in pool.map(lambda who: decoder.inspect(SLOW, "csv", who), "abc")] == [
            300_000
        ] * 3
    for pid in decoder.pids:
        os.kill(pid, signal.SIGKILL)
    assert decoder.inspect(*GOOD["npz"][::-1]).samples == 4
    decoder.close()


# --- a worker that lies -----------------------------------------------------------------------------------


def array_of(dtype="<f4", shape=(2, 2)):
    return {"dtype": dtype, "shape": list(shape)}


LIES = {
    "no object": ([], 0),
    "other keys": ({"x": array_of()}, 16),
    "more keys": ({"code": "truncated", "text": "", "more": 1}, 0),
    "unknown code": ({"code": "run_this", "text": ""}, 0),
    "code of another type": ({"code": ["truncated"], "text": ""}, 0),
    "unprintable text": ({"code": "truncated", "text": "a\nb"}, 0),
    "long text": ({"code": "truncated", "text": "a" * 3000}, 0),
    "samples as text": ({"samples": "4", "labelled": True, "task": None}, 0),
    "samples as bool": ({"samples": True, "labelled": True, "task": None}, 0),
    "too many samples": ({"samples": 1 << 40, "labelled": True, "task": None}, 0),
    "unprintable task": ({"samples": 4, "labelled": True, "task": "a\x1b"}, 0),
    "long task": ({"samples": 4, "labelled": True, "task": "a" * 256}, 0),
    "arrays after a summary": ({"samples": 4, "labelled": True, "task": None}, 8),
    "object array": ({"x": array_of("|O"), "y": None, "task": None}, 32),
    "text as x": ({"x": array_of("<U4"), "y": None, "task": None}, 64),
    "float labels": ({"x": array_of(), "y": array_of("<f8", [2]), "task": None}, 32),
    "exabytes": ({"x": array_of(shape=(1 << 40, 1 << 40)), "y": None, "task": None}, 1 << 82),
    "over the limit": ({"x": array_of(shape=(1 << 20, 64)), "y": None, "task": None}, 1 << 28),
    "negative": ({"x": array_of(shape=(-2, -2)), "y": None, "task": None}, 16),
    "bool shape": ({"x": array_of(shape=(True, 4)), "y": None, "task": None}, 16),
    "no axes": ({"x": array_of(shape=()), "y": None, "task": None}, 4),
    "fewer bytes": ({"x": array_of(), "y": None, "task": None}, 15),
    "more bytes": ({"x": array_of(), "y": None, "task": None}, 17),
    "labels of another length": ({"x": array_of(), "y": array_of("<i8", [3]), "task": None}, 40),
}


@pytest.mark.parametrize(("reply", "size"), LIES.values(), ids=LIES.keys())
def test_a_lie_is_not_believed(reply, size):
    with pytest.raises(Malformed):
        check_reply(reply, size, Budget(size, READING.limits))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.sampled_from(["<f4", "<i8", "truncated"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.fixed_dictionaries({"dtype": inner, "shape": inner})
        | st.fixed_dictionaries({"x": inner, "y": inner, "task": inner})
        | st.fixed_dictionaries({"code": inner, "text": inner})
    ),
)


@given(json_values, st.integers(0, 100))
def test_any_reply_is_an_answer_or_malformed(reply, size):
    with contextlib.suppress(Malformed):
        check_reply(reply, size, Budget(size, READING.limits))
