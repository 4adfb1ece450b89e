"""Bytes become a Batch or a BatchRejected, and no claim of theirs is believed unchecked."""

import ast
import io
import os
import pickle
import struct
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streams.batch import Batch, BatchRejected
from streams.formats import (
    FORMATS,
    Limits,
    decode,
    encode,
    form_of_media_type,
    form_of_name,
    pack_pair,
    sniff,
)

X = np.arange(12, dtype=np.float32).reshape(4, 3)
Y = np.arange(4)


def savez(**arrays):
    target = io.BytesIO()
    np.savez(target, **arrays)
    return target.getvalue()


def npy(array):
    target = io.BytesIO()
    np.save(target, array)
    return target.getvalue()


def header(text, version=(1, 0)):
    raw = text.encode()
    length = struct.pack("<H" if version == (1, 0) else "<I", len(raw))
    return b"\x93NUMPY" + bytes(version) + length + raw


def claim(shape, descr="'<f8'", fortran=False):
    return header(f"{{'descr': {descr}, 'fortran_order': {fortran}, 'shape': {shape}, }}\n")


def archive(members, method=zipfile.ZIP_STORED):
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", method) as file:
        for name, data in members:
            file.writestr(zipfile.ZipInfo(name), data, compress_type=method)
    return target.getvalue()


def with_x(data):
    return archive([("x.npy", data)])


def with_y(y):
    return savez(x=X, y=y)


def rejection(payload, limits=None):
    with pytest.raises(BatchRejected) as caught:
        decode(payload, limits or Limits())
    return caught.value


class Canary:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


# --- good batches -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("kind", ["f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8"])
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_every_number_type_comes_back_native_with_equal_values(kind, order, save):
    x = np.arange(24).reshape(2, 3, 4).astype(order + kind)
    target = io.BytesIO()
    save(target, x=x, y=np.array([3, -1]))
    batch = decode(target.getvalue())
    assert batch.x.dtype == np.dtype(kind)
    assert batch.x.dtype.isnative
    assert batch.x.flags.c_contiguous
    np.testing.assert_array_equal(batch.x, x)
    np.testing.assert_array_equal(batch.y, [3, -1])


def test_bools_and_fortran_order_come_back_equal():
    flags = np.array([[True, False], [False, True]])
    np.testing.assert_array_equal(decode(savez(x=flags)).x, flags)
    fortran = np.asfortranarray(X)
    assert b"'fortran_order': True" in savez(x=fortran)
    np.testing.assert_array_equal(decode(savez(x=fortran)).x, X)


@pytest.mark.parametrize("kind", ["i1", "u2", ">i4", "<i8", ">u8"])
def test_integer_labels_become_int64(kind):
    y = decode(with_y(Y.astype(kind))).y
    assert y.dtype == np.int64
    np.testing.assert_array_equal(y, Y)


@pytest.mark.parametrize("order", ["<", ">"])
def test_string_labels_stay_strings(order):
    y = np.array(["cat", "dög", "", "🐦"])
    decoded = decode(with_y(y.astype(y.dtype.newbyteorder(order)))).y
    assert decoded.dtype == y.dtype
    assert decoded.tolist() == y.tolist()


def test_a_batch_without_labels_is_unlabelled_and_one_sample_is_enough():
    batch = decode(savez(x=X[:1]))
    assert batch.y is None
    assert batch.x.shape == (1, 3)


def test_constant_inputs_are_a_batch():
    assert not decode(savez(x=np.zeros((4, 3)), y=Y)).x.any()


def test_members_other_than_x_and_y_are_ignored_even_pickled_ones():
    payload = archive([("note.txt", b"hi"), ("z.npy", npy(np.array([{}]))), ("x.npy", npy(X))])
    np.testing.assert_array_equal(decode(payload).x, X)


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_every_npy_version_is_read(version):
    target = io.BytesIO()
    np.lib.format.write_array(target, X, version=version)
    np.testing.assert_array_equal(decode(with_x(target.getvalue())).x, X)


def test_canonical_bytes_are_what_numpy_reads_and_depend_on_nothing_else(monkeypatch):
    batch = Batch(X, np.array(["a", "b", "a", "b"]))
    payload = encode(batch)
    monkeypatch.setattr("time.time", lambda: 2e9)
    assert encode(Batch(np.asfortranarray(X), batch.y)) == payload
    loaded = np.load(io.BytesIO(payload), allow_pickle=False)
    np.testing.assert_array_equal(loaded["x"], X)
    assert decode(payload).y.tolist() == batch.y.tolist()


# --- bad files --------------------------------------------------------------------------------------------

MANY = archive([(f"{i}", b"") for i in range(200)])
BOMB = archive([("x.npy", claim((20 << 20,), "'|u1'") + bytes(20 << 20))], zipfile.ZIP_DEFLATED)
NAN = np.where(np.arange(12).reshape(4, 3) == 7, np.nan, X)

BAD = {
    "empty": (b"", "truncated", "0 bytes"),
    "first bytes of a zip": (b"PK\x03", "truncated", "3 bytes"),
    "cut in the middle": (savez(x=X, y=Y)[:200], "truncated", "end of the zip"),
    "cut by one byte": (savez(x=X, y=Y)[:-1], "truncated", "end of the zip"),
    "random": (b"\x00\x01" * 100, "bad_format", "not a zip"),
    "a bare npy": (npy(X), "bad_format", "not a zip"),
    "something before the zip": (b"#!" + savez(x=X), "bad_format", "not a zip"),
    "a pickle": (pickle.dumps({"x": [1]}), "forbidden_pickle", "pickle"),
    "object array": (savez(x=np.array([[{}, None]])), "forbidden_pickle", "x"),
    "object labels": (with_y(np.array([1, "a", None, 2.0], dtype=object)), "forbidden_pickle", "y"),
    "object field": (with_x(claim((1,), "[('a', '|O')]")), "forbidden_pickle", "x"),
    "torch file": (archive([("archive/data.pkl", b"\x80\x02}.")]), "forbidden_pickle", "pickles"),
    "claims 32 GiB": (
        with_x(claim((65536, 65536))),
        "bad_shape",
        "claims 34359738368 bytes, there are 0",
    ),
    "claims 2**70": (with_x(claim((2**70, 1))), "bad_shape", "0 to"),
    "claims an exabyte": (with_x(claim((2**62,) * 32)), "bad_shape", "claims"),
    "negative dimension": (with_x(claim((-4, 3))), "bad_shape", "0 to"),
    "bool dimension": (with_x(claim((True, 3))), "bad_shape", "0 to"),
    "33 dimensions": (with_x(claim((1,) * 33)), "bad_shape", "33 dimensions"),
    "data cut off": (with_x(npy(X)[:-4]), "truncated", "expected 48 bytes after the header, got 44"),
    "data after the array": (with_x(npy(X) + b"junk"), "trailing_bytes", "4 bytes"),
    "data after the zip": (savez(x=X) + b"junk", "trailing_bytes", "4 bytes"),
    "no npy": (with_x(b"hello world"), "bad_header", "version"),
    "empty member": (with_x(b""), "truncated", "0 bytes"),
    "npy version 9": (with_x(b"\x93NUMPY\x09\x00" + npy(X)[8:]), "bad_header", "version"),
    "header of 2 GiB": (with_x(b"\x93NUMPY\x02\x00\xff\xff\xff\x7f"), "bad_header", "2147483647 bytes"),
    "header cut off": (with_x(npy(X)[:60]), "truncated", "got 50"),
    "header length cut off": (with_x(npy(X)[:9]), "truncated", "length"),
    "header is code": (with_x(header("__import__('os').abort()")), "bad_header", "literal"),
    "nested header": (with_x(header("-" * 9999)), "bad_header", "literal"),
    "nested sum header": (with_x(header("1+" * 4000 + "1")), "bad_header", "literal"),
    "header is a list": (with_x(header("[]")), "bad_header", "keys"),
    "header lacks a key": (with_x(header("{'descr': '<f4', 'shape': (4, 3)}")), "bad_header", "keys"),
    "odd order": (with_x(claim((1, 1), fortran=3)), "bad_header", "fortran_order"),
    "no dtype": (with_x(claim((1, 1), "None")), "bad_header", "NoneType"),
    "unknown dtype": (with_x(claim((1, 1), "'wat'")), "bad_header", "no such dtype"),
    "bomb": (BOMB, "too_large", "times"),
    "many members": (MANY, "too_large", "200 members"),
    "parent name": (archive([("../x.npy", npy(X))]), "bad_member_name", "../x.npy"),
    "absolute name": (archive([("/x.npy", npy(X))]), "bad_member_name", "/x.npy"),
    "backslash name": (archive([("..\\x.npy", npy(X))]), "bad_member_name", "x.npy"),
    "NUL name": (with_x(npy(X)).replace(b"x.npy", b"x\0npy"), "bad_member_name", "x\\x00npy"),
    "twice x": (
        archive([("x.npy", npy(X)), ("y.npy", npy(X))]).replace(b"y.npy", b"x.npy"),
        "bad_member_name",
        "two",
    ),
    "bzip2": (archive([("x.npy", npy(X))], zipfile.ZIP_BZIP2), "bad_format", "deflated"),
    "no x": (savez(x_train=X, y_train=Y), "bad_format", "found x_train.npy, y_train.npy"),
    "nothing": (archive([]), "bad_format", "no members"),
    "wrong checksum": (savez(x=X).replace(X.tobytes(), X[::-1].tobytes()), "bad_format", "CRC"),
    "NaN": (savez(x=NAN, y=Y), "non_finite", "1 of 12 values are NaN or infinite, the first at (2, 1)"),
    "infinite": (savez(x=np.full((2, 2), -np.inf, np.float16)), "non_finite", "4 of 4"),
    "complex": (savez(x=X.astype(complex)), "bad_dtype", "complex128"),
    "dates": (savez(x=X.astype("M8[s]")), "bad_dtype", "datetime64"),
    "strings as x": (savez(x=X.astype(str)), "bad_dtype", "<U"),
    "long doubles": (savez(x=X.astype(np.longdouble)), "bad_dtype", "expected float"),
    "records": (savez(x=np.zeros((2, 2), "f4,i4")), "bad_dtype", "expected float"),
    "no samples": (savez(x=X[:0]), "bad_shape", "(0, 3)"),
    "no features": (savez(x=X[:, :0]), "bad_shape", "(4, 0)"),
    "no feature axis": (savez(x=X[:, 0]), "bad_shape", "(4,)"),
    "a number": (savez(x=np.float32(1)), "bad_shape", "()"),
    "five axes": (savez(x=X.reshape(4, 3, 1, 1, 1)), "bad_shape", "(n, H, W, C)"),
    "float labels": (with_y(Y.astype(float)), "bad_labels", "float64"),
    "bool labels": (with_y(Y > 1), "bad_labels", "bool"),
    "byte labels": (with_y(Y.astype("S1")), "bad_labels", "integers or strings"),
    "labels of another length": (with_y(np.arange(5)), "bad_labels", "(5,), expected (4,)"),
    "no labels": (with_y(Y[:0]), "bad_labels", "(0,)"),
    "two label axes": (with_y(Y[:, None]), "bad_labels", "(4, 1)"),
    "labels beyond int64": (with_y(np.full(4, 2**64 - 1, np.uint64)), "bad_labels", "int64"),
    "labels no Unicode": (with_y(np.full(4, 0x110000, np.uint32).view("<U1")), "bad_labels", "4 characters"),
    "labels half a pair": (with_y(np.full(4, 0xD800, np.uint32).view("<U1")), "bad_labels", "4 characters"),
    "long labels": (with_y(np.array(["a" * 257] * 4)), "bad_labels", "256"),
    "labels claim more": (archive([("x.npy", npy(X)), ("y.npy", claim((4,)))]), "bad_labels", "float64"),
    "labels cut off": (archive([("x.npy", npy(X)), ("y.npy", npy(Y)[:-1])]), "truncated", "y: expected 32 bytes"),
}


@pytest.mark.parametrize("payload, code, words", BAD.values(), ids=BAD.keys())
def test_each_bad_file_gets_its_reason(payload, code, words):
    error = rejection(payload)
    assert error.code == code
    assert words in error.text
    assert str(error) == f"{code}: {error.text}"
    assert str(error).isprintable()


def test_limits_count_samples_bytes_and_members():
    payload = savez(x=X, y=Y)
    assert rejection(payload, Limits(samples=3)).code == "too_many_samples"
    assert rejection(payload, Limits(bytes=100)).code == "too_large"
    assert rejection(payload, Limits(members=1)).code == "too_large"
    assert decode(payload, Limits(samples=4, members=2)).y is not None


def test_an_encrypted_member_is_refused():
    payload = bytearray(with_x(npy(X)))
    payload[6] |= 1
    payload[payload.index(b"PK\x01\x02") + 8] |= 1
    assert rejection(bytes(payload)).code == "bad_format"


def test_a_declared_size_that_is_too_small_does_not_hide_a_bomb():
    start = claim((100, 1), "'|u1'")
    payload = bytearray(archive([("x.npy", start + bytes(20 << 20))], zipfile.ZIP_DEFLATED))
    struct.pack_into("<I", payload, payload.index(b"PK\x01\x02") + 24, len(start) + 100)
    assert rejection(bytes(payload)).code == "bad_format"


def test_a_pickle_inside_is_never_run(tmp_path):
    canary = tmp_path / "ran"
    evil = np.empty((2, 2), dtype=object)
    evil.fill(Canary(canary))
    for payload in (savez(x=evil), savez(x=X, y=evil[0]), pickle.dumps(Canary(canary))):
        assert rejection(payload).code == "forbidden_pickle"
    assert not canary.exists()


@pytest.mark.parametrize("case", ["claims 32 GiB", "claims an exabyte", "bomb", "header of 2 GiB", "many members"])
def test_a_claim_takes_no_memory(case):
    payload = BAD[case][0]
    tracemalloc.start()
    try:
        rejection(payload)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4 << 20


def test_a_list_of_members_is_bounded_before_it_is_read():
    entry = struct.pack("<4s4B4HL2L5H2L", b"PK\x01\x02", 20, 0, 20, 0, 0, 0, 0, 33, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0) + b"a"
    entries = entry * 50_000
    end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 1, 1, len(entries), 4, 0)
    assert rejection(b"PK\x03\x04" + entries + end).code == "too_large"


def test_a_member_that_inflates_to_less_than_it_says_is_refused():
    payload = bytearray(archive([("x.npy", npy(X))], zipfile.ZIP_DEFLATED))
    struct.pack_into("<I", payload, payload.index(b"PK\x01\x02") + 24, len(npy(X)) + 1)
    assert rejection(bytes(payload)).code == "bad_format"


def test_decoded_arrays_are_the_callers_own():
    for payload in (savez(x=X), archive([("x.npy", npy(X))], zipfile.ZIP_DEFLATED)):
        decode(payload).x[:] = 0
        np.testing.assert_array_equal(decode(payload).x, X)


# --- bare arrays and pairs of them ------------------------------------------------------------------------


def test_a_bare_array_is_an_unlabelled_batch():
    batch = decode(npy(X), form="npy")
    np.testing.assert_array_equal(batch.x, X)
    assert batch.y is None


@pytest.mark.parametrize(
    "payload, code, words",
    [
        (b"", "truncated", "0 bytes"),
        (npy(X)[:3], "truncated", "3 bytes"),
        (npy(X)[:50], "truncated", "header"),
        (npy(X)[: len(npy(X)) // 2 + 50], "truncated", "expected 48 bytes after the header, got"),
        (claim((65536, 65536)), "bad_shape", "header claims 34359738368 bytes, there are 0"),
        (npy(X) + b"junk", "trailing_bytes", "4 bytes"),
        (npy(np.array([[{}]])), "forbidden_pickle", "unpickled"),
        (pickle.dumps(X, protocol=5), "forbidden_pickle", "a pickle"),
        (b"hello world", "bad_header", "version"),
        (npy(np.array([[np.nan]])), "non_finite", "1 of 1"),
        (npy(Y), "bad_shape", "(4,)"),
    ],
)
def test_each_bad_array_gets_its_reason(payload, code, words):
    with pytest.raises(BatchRejected) as caught:
        decode(payload, form="npy")
    assert caught.value.code == code
    assert words in caught.value.text


def test_a_pair_of_arrays_is_a_labelled_batch_and_packing_parses_nothing():
    payload = pack_pair(npy(X), npy(Y))
    assert payload == pack_pair(npy(X), npy(Y)) == encode(Batch(X, Y))
    assert decode(payload).y.tolist() == Y.tolist()
    assert decode(pack_pair(npy(X), None)).y is None
    assert rejection(pack_pair(npy(X), npy(Y)[:-3])).code == "truncated"
    assert rejection(pack_pair(b"junk junk", None)).code == "bad_header"


# --- which format -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("a/b.npz", "npz"),
        ("b.NPY", "npy"),
        ("shard-000.tar", "tar"),
        ("t.parquet", "parquet"),
        ("t.csv", "csv"),
        ("t.arrow", "arrow"),
        ("t.feather", "arrow"),
        ("t.jsonl", "jsonl"),
        ("t.ndjson", "jsonl"),
        ("t.json", "json"),
        ("t.tar.gz", None),
        ("csv", None),
        ("t.csv/readme", None),
    ],
)
def test_a_suffix_tells_the_format(name, form):
    assert form_of_name(name) == form
    assert form is None or form in FORMATS


def test_a_media_type_tells_the_format():
    assert form_of_media_type("text/csv; charset=utf-8") == "csv"
    assert form_of_media_type("Application/X-NPZ") == "npz"
    assert form_of_media_type("application/octet-stream") is None


def test_first_bytes_tell_the_format():
    assert sniff(savez(x=X)) == "npz"
    assert sniff(npy(X)) == "npy"
    assert sniff(b' {"x": [[1]]}') == "json"
    assert sniff(b'{\n "x": [[1]]}') == "json"
    assert sniff(b'{"x": [1]}\n{"x": [2]}\n') == "jsonl"
    assert sniff(b"a,b\n1,2\n") is None
    assert sniff(b"") is None


def test_an_unknown_format_is_a_reason():
    with pytest.raises(BatchRejected, match="unsupported_format: 'exe', expected one of npz"):
        decode(savez(x=X), form="exe")


# --- any bytes --------------------------------------------------------------------------------------------


def check_decodes_or_rejects(payload):
    try:
        batch = decode(payload)
    except BatchRejected as error:
        assert str(error).isprintable()
        return
    assert len(batch.x) >= 1
    assert batch.x.dtype.isnative
    assert batch.y is None or batch.y.shape == (len(batch.x),)


@given(st.binary(max_size=400))
def test_any_bytes_give_a_batch_or_a_rejection(payload):
    check_decodes_or_rejects(payload)
    check_decodes_or_rejects(b"PK\x03\x04" + payload)


@given(
    st.lists(st.tuples(st.integers(0, 2000), st.binary(min_size=1, max_size=4)), min_size=1, max_size=4),
    st.sampled_from([savez(x=X, y=Y), encode(Batch(X, np.array(list("abcd")))), archive([("x.npy", npy(X))], 8)]),
)
def test_any_damage_gives_a_batch_or_a_rejection(damage, payload):
    damaged = bytearray(payload)
    for at, replacement in damage:
        start = at % len(payload)
        damaged[start : start + len(replacement)] = replacement
    check_decodes_or_rejects(bytes(damaged))


@given(st.binary(max_size=300), st.sampled_from([(1, 0), (2, 0), (3, 0)]))
def test_any_header_gives_a_batch_or_a_rejection(raw, version):
    length = struct.pack("<H" if version == (1, 0) else "<I", len(raw))
    check_decodes_or_rejects(with_x(b"\x93NUMPY" + bytes(version) + length + raw))


@given(
    st.one_of(st.text(max_size=8), st.lists(st.tuples(st.text(max_size=3), st.sampled_from(["<f4", "O", "x"])))),
    st.lists(st.integers(-1, 9), max_size=5).map(tuple),
    st.binary(max_size=64),
)
def test_any_dtype_and_shape_give_a_batch_or_a_rejection(descr, shape, data):
    text = repr({"descr": descr, "fortran_order": False, "shape": shape})
    check_decodes_or_rejects(with_x(header(text, (3, 0)) + data))


def test_streams_hold_no_unsafe_loader():
    forbidden = {"eval", "exec", "np.load", "numpy.load", "pickle.load", "pickle.loads"}
    for path in (Path(__file__).parent.parent / "streams").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                assert name not in forbidden, f"{os.fspath(path)}:{node.lineno}"


# --- which task a batch says it belongs to ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "meant"),
    [
        (3, "3"),
        (np.int8(-3), "-3"),
        (np.uint64(2**64 - 1), str(2**64 - 1)),
        ("line3", "line3"),
        (np.array(["döner 🥙"]), "döner 🥙"),
        (np.array([7, 7, 7, 7]), "7"),
        (np.array(["a"] * 4), "a"),
        (np.array("x" * 255), "x" * 255),
    ],
)
def test_a_task_is_one_integer_or_string_in_any_shape_for_the_whole_batch(task, meant):
    assert decode(savez(x=X, task=task), with_task=True).task == meant


@pytest.mark.parametrize(
    ("task", "said"),
    [
        (1.5, "task: float64 of shape (), expected one integer or string, or (4,) of it"),
        (True, "task: bool of shape ()"),
        (b"bytes", "task: |S5 of shape ()"),
        (np.array([1, 2, 3]), "task: int64 of shape (3,)"),
        (np.array([[1]]), "task: int64 of shape (1, 1)"),
        (np.array([1, 1, 1, 2]), "task: 2 different ones, expected one for the whole batch"),
        ("", "task: "),
        ("a\nb", r"task: 'a\\nb', expected 1 or more printable characters"),
        (np.array("x" * 256), "task: expected 1 to 255 characters"),
    ],
)
def test_any_other_task_is_refused_in_one_line_where_one_is_wanted(task, said):
    payload = savez(x=X, task=np.array(task))
    with pytest.raises(BatchRejected) as caught:
        decode(payload, with_task=True)
    assert caught.value.code == "bad_task"
    assert caught.value.text.startswith(said)
    assert "\n" not in str(caught.value)
    assert decode(payload).task is None


def test_an_object_array_is_no_task_and_is_never_unpickled(tmp_path):
    target = io.BytesIO()
    np.savez(target, x=X, task=np.array([Canary(tmp_path / "touched")], dtype=object), allow_pickle=True)
    payload = target.getvalue()
    with pytest.raises(BatchRejected) as caught:
        decode(payload, with_task=True)
    assert caught.value.code == "forbidden_pickle"
    assert decode(payload).task is None
    assert not (tmp_path / "touched").exists()


def test_characters_of_a_task_that_are_not_unicode_are_refused():
    task = np.array([0xD800], dtype="<u4").view("<U1")
    with pytest.raises(BatchRejected, match="bad_task: task: 1 characters are not Unicode"):
        decode(savez(x=X, task=task), with_task=True)


@given(st.text(min_size=1, max_size=255).filter(lambda text: text.isprintable()))
def test_a_task_comes_back_from_its_own_bytes(task):
    batch = decode(encode(Batch(X, Y, task)), with_task=True)
    assert batch.task == task
    assert batch.sha256() == Batch(X, Y).sha256()


def test_the_hash_of_a_batch_is_of_its_samples_and_labels_alone():
    same = [Batch(X, Y), Batch(np.asfortranarray(X), Y), decode(savez(y=Y, x=X, z=3)), Batch(X, Y, "a")]
    other = [Batch(X, None), Batch(X.astype(np.float64), Y), Batch(X.reshape(2, 6), Y), Batch(X, Y.astype("U1"))]
    assert len({batch.sha256() for batch in same}) == 1
    assert len({batch.sha256() for batch in [*same, *other]}) == 1 + len(other)
