"""Tables and JSON become the batch that their columns and keys say, whatever holds them."""

import io
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streams.batch import BatchRejected
from streams.formats import Columns, Limits, Reading, read, sniff


def parquet(table, **options):
    target = io.BytesIO()
    pyarrow.parquet.write_table(table, target, **options)
    return target.getvalue()


def arrow_file(table):
    target = io.BytesIO()
    with pa.ipc.new_file(target, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return target.getvalue()


def arrow_stream(table):
    target = io.BytesIO()
    with pa.ipc.new_stream(target, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return target.getvalue()


def feather(table):
    target = io.BytesIO()
    pyarrow.feather.write_feather(table, target, compression="lz4")
    return target.getvalue()


BINARY = {
    "parquet": ("parquet", lambda table: parquet(table, row_group_size=2)),
    "Arrow file": ("arrow", arrow_file),
    "Arrow stream": ("arrow", arrow_stream),
    "Feather": ("arrow", feather),
}
each_binary = pytest.mark.parametrize(("form", "write"), BINARY.values(), ids=BINARY.keys())


def refused(payload, form, reading=None):
    with pytest.raises(BatchRejected) as caught:
        read(payload, form, reading or Reading())
    assert str(caught.value).isprintable()
    assert len(caught.value.text) < 1000
    return caught.value


# --- Parquet and Arrow ------------------------------------------------------------------------------------


@each_binary
def test_columns_of_numbers_are_x_in_order_and_label_is_y(form, write):
    table = pa.table({"b": [1.5, 2, 3], "label": ["x", "y", "x"], "a": pa.array([1, 2, 3], pa.int8())})
    payload = write(table)
    batch = read(payload, form, Reading())
    assert sniff(payload) == form
    assert batch.x.tolist() == [[1.5, 1], [2, 2], [3, 3]]
    assert batch.y.tolist() == ["x", "y", "x"]


@each_binary
@pytest.mark.parametrize("kind", [pa.list_(pa.uint8()), pa.list_(pa.float32(), 2), pa.large_list(pa.float64())])
def test_a_column_of_lists_is_x(form, write, kind):
    table = pa.table({"id": [7, 8, 9], "x": pa.array([[1, 2], [3, 4], [5, 6]], kind), "y": [1, -2, 3]})
    batch = read(write(table), form, Reading())
    assert batch.x.tolist() == [[1, 2], [3, 4], [5, 6]]
    assert batch.x.dtype == np.dtype(kind.value_type.to_pandas_dtype())
    assert batch.y.tolist() == [1, -2, 3]


@each_binary
def test_the_columns_can_be_named(form, write):
    table = pa.table({"a": [1, 2, 3], "y": [4, 5, 6], "class": ["u", "v", "w"], "line": ["l"] * 3})
    reading = Reading(columns=Columns(x=("y", "a"), y="class", task="line"), with_task=True)
    batch = read(write(table), form, reading)
    assert batch.x.tolist() == [[4, 1], [5, 2], [6, 3]]
    assert (batch.y.tolist(), batch.task) == (["u", "v", "w"], "l")
    missing = refused(write(table), form, Reading(columns=Columns(y="digit")))
    assert missing.code == "schema_mismatch"
    assert missing.text == "no column 'digit', found 'a', 'y', 'class', 'line'"


def test_a_task_is_read_only_where_it_is_wanted_and_is_never_a_feature():
    payload = parquet(pa.table({"a": [1, 2], "task": [3, 3]}))
    assert read(payload, "parquet", Reading()).x.shape == (2, 1)
    assert read(payload, "parquet", Reading(with_task=True)).task == "3"
    assert (
        refused(parquet(pa.table({"a": [1, 2], "task": [3, 4]})), "parquet", Reading(with_task=True)).code == "bad_task"
    )


BAD_TABLES = {
    "null": ({"a": [1, None]}, "non_finite", "column 'a': 1 of 2 values are null"),
    "null in a list": ({"x": [[1, None], [2, 3]]}, "non_finite", "1 of 4"),
    "null list": ({"x": [None, [2, 3]]}, "non_finite", "1 of 2"),
    "null label": ({"a": [1, 2], "y": ["u", None]}, "bad_labels", "column 'y': 1 of 2"),
    "NaN": ({"a": [1.0, float("nan")]}, "non_finite", "the first at (1, 0)"),
    "uneven lists": ({"x": [[1], [2, 3]]}, "bad_shape", "different lengths"),
    "empty lists": ({"x": pa.array([[], []], pa.list_(pa.int8()))}, "bad_shape", "(2, 0)"),
    "nested": ({"x": [[[1]], [[2]]]}, "bad_dtype", "list"),
    "struct": ({"a": [{"b": 1}, {"b": 2}]}, "bad_dtype", "struct"),
    "text": ({"a": ["1", "2"]}, "bad_dtype", "column 'a': string, expected numbers"),
    "dictionary": ({"a": pa.array(["u", "v"]).dictionary_encode()}, "bad_dtype", "dictionary"),
    "dictionary label": ({"a": [1, 2], "y": pa.array(["u", "v"]).dictionary_encode()}, "bad_labels", "dictionary"),
    "time": ({"a": pa.array([1, 2], pa.timestamp("s"))}, "bad_dtype", "timestamp"),
    "decimal": ({"a": pa.array([1, 2], pa.decimal128(5, 2))}, "bad_dtype", "decimal"),
    "float labels": ({"a": [1, 2], "y": [0.5, 1]}, "bad_labels", "double, expected integers or strings"),
    "long label": ({"a": [1], "y": ["l" * 300]}, "bad_labels", "300 characters"),
    "lossy": ({"a": [0.5, 1], "b": [1, 2**60]}, "bad_dtype", "column 'b': integers beyond 2**53"),
    "lists beside numbers": ({"a": [1, 2], "b": [[1], [2]]}, "schema_mismatch", "expected one of lists"),
    "no x": ({"y": [1, 2]}, "schema_mismatch", "no columns of samples"),
    "no rows": ({"a": pa.array([], pa.int8())}, "bad_shape", "no rows"),
}


@each_binary
@pytest.mark.parametrize("columns, code, words", BAD_TABLES.values(), ids=BAD_TABLES.keys())
def test_each_bad_table_gets_its_reason(form, write, columns, code, words):
    error = refused(write(pa.table(columns)), form)
    assert error.code == code, error
    assert words in error.text


@each_binary
def test_two_columns_of_one_name_are_refused(form, write):
    if write is feather:
        pytest.skip("Feather does not write them")
    table = pa.Table.from_arrays([pa.array([1]), pa.array([2])], ["a", "a"])
    assert refused(write(table), form).code == "bad_header"


@each_binary
def test_a_cut_off_table_is_truncated(form, write):
    payload = write(pa.table({"a": [1, 2, 3]}))
    for size in (1, 10, len(payload) // 2, len(payload) - 1):
        assert refused(payload[:size], form).code == "truncated"


@each_binary
def test_what_a_table_claims_is_checked(form, write):
    payload = write(pa.table({"a": np.zeros(1000), "b": np.zeros(1000)}))
    assert refused(payload, form, Reading(Limits(samples=999))).code == "too_many_samples"
    assert refused(payload, form, Reading(Limits(bytes=15_999))).code == "too_large"
    wide = write(pa.table({"x": [[0.0] * 100] * 100}))
    assert refused(wide, form, Reading(Limits(bytes=79_999))).code == "too_large"


def test_a_small_parquet_file_of_many_rows_is_refused_by_its_footer():
    payload = parquet(pa.table({"a": np.zeros(2_000_000, np.int8)}), compression="zstd")
    assert len(payload) < 10_000
    assert refused(payload, "parquet").code == "too_many_samples"


@pytest.mark.parametrize("at", [-8, -5])
def test_a_footer_that_lies_about_its_length_is_refused(at):
    payload = bytearray(parquet(pa.table({"a": [1, 2, 3]})))
    payload[at] ^= 0x7F
    assert refused(bytes(payload), "parquet").code == "bad_format"


def test_bytes_after_a_stream_are_refused():
    assert refused(arrow_stream(pa.table({"a": [1]})) + b"junk", "arrow").code == "trailing_bytes"


@pytest.mark.parametrize("form", ["parquet", "arrow"])
def test_something_else_is_no_table(form):
    error = refused(b"hello, this is a text", form)
    assert error.code == "bad_format"
    assert "starts with b'hello,'" in error.text


def test_without_pyarrow_the_extra_is_named():
    code = """
import sys
sys.modules["pyarrow"] = None
from streams.formats import Reading, read
try:
    read(b"PAR1" + bytes(12) + b"PAR1", "parquet", Reading())
except ValueError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "unsupported_format: Parquet needs the extra supsupd[formats]\n"


# --- CSV --------------------------------------------------------------------------------------------------


def csv(text, **reading):
    return read(text if isinstance(text, bytes) else text.encode(), "csv", Reading(**reading))


def test_a_line_of_names_comes_first_and_the_others_are_samples():
    batch = csv('a,label,"b, c"\r\n1,cat,-2.5e3\r\n\r\n0.1,"d ""o"" g",4\r\n')
    assert batch.x.tolist() == [[1, -2500], [0.1, 4]]
    assert batch.x.dtype == np.float64
    assert batch.y.tolist() == ["cat", 'd "o" g']


def test_labels_are_integers_where_all_are_and_a_byte_order_mark_is_passed_over():
    assert csv(b"\xef\xbb\xbfy,a\n1,2\n-3,4").y.tolist() == [1, -3]
    assert csv("y,a\n1,2\n3.0,4\n4.000e+00,5\n").y.tolist() == [1, 3, 4]
    assert csv("y,a\n1,2\n3.0 mm,4\n").y.tolist() == ["1", "3.0 mm"]
    for fraction in ("0.5", "1e999", "9.1e15"):
        with pytest.raises(BatchRejected, match=r"bad_labels: line 3: .* expected whole numbers or words"):
            csv(f"y,a\n1.0,2\n{fraction},4\n")
    assert csv("0,1\n5,6\n").x.tolist() == [[5, 6]]


def test_a_csv_tells_its_task():
    assert csv("a,task\n1,t\n2,t\n", with_task=True).task == "t"
    assert csv("a,task\n1,t\n2,u\n").x.shape == (2, 1)


BAD_CSV = {
    "empty": ("", "truncated", "0 bytes"),
    "only names": ("a,b\n", "bad_shape", "(0, 2)"),
    "no names": ("1,2\n3,4\n", "bad_header", "line 1"),
    "twice a name": ("a,a\n1,2\n", "bad_header", "'a'"),
    "no x": ("y\n1\n", "schema_mismatch", "'y'"),
    "ragged": ("a,b\n1\n3,4\n", "bad_format", "line 2: 1 values, expected 2"),
    "too wide": ("a,b\n1,2,3\n", "bad_format", "line 2: 3 values, expected 2"),
    "cut off": ("a,b\n1,2\n3", "truncated", "line 3: 1 values, expected 2"),
    "quote not closed": ('a,b\n1,"2\n3,4\n', "truncated", "quoted"),
    "quote bomb": ('a,b\n1,"' + "x\n" * 200_000, "bad_format", "field limit"),
    "stray quote": ('a,b\n1,"2"3\n', "bad_format", "line 2"),
    "NUL": (b"a,b\n1,\0002\n", "bad_format", "NUL at byte 6"),
    "not UTF-8": (b"a,b\n1,\xff\n", "bad_format", "UTF-8"),
    "word": ("a,b\n1,two\n", "bad_dtype", "line 2, column 'b': 'two'"),
    "escape codes": ("a,b\n1,\x1b[31m\n", "bad_dtype", "\\x1b"),
    "nothing": ("a,b\n1,\n", "non_finite", "line 2, column 'b': nothing"),
    "NaN": ("a,b\n1,nan\n", "non_finite", "the first at (0, 1)"),
    "infinite": ("a,b\n1,1e999\n", "non_finite", "1 of 2"),
    "empty label": ("a,y\n1,\n", "bad_labels", "line 2: 0 characters"),
    "long label": ("a,y\n1," + "l" * 300 + "\n", "bad_labels", "300 characters"),
}


@pytest.mark.parametrize("text, code, words", BAD_CSV.values(), ids=BAD_CSV.keys())
def test_each_bad_csv_gets_its_reason(text, code, words):
    error = refused(text if isinstance(text, bytes) else text.encode(), "csv")
    assert error.code == code, error
    assert words in error.text


def test_rows_of_a_csv_are_counted_as_they_come():
    text = b"a,b\n" + b"1,2\n" * 100
    assert refused(text, "csv", Reading(Limits(samples=99))).code == "too_many_samples"
    assert refused(text, "csv", Reading(Limits(bytes=1599))).code == "too_large"


# --- JSON -------------------------------------------------------------------------------------------------


def test_a_json_object_is_a_batch():
    batch = read(b'{"x": [[1, 2], [3, 4.5]], "y": ["u", "v"], "task": 3, "id": {}}', "json", Reading(with_task=True))
    assert batch.x.tolist() == [[1, 2], [3, 4.5]]
    assert (batch.y.tolist(), batch.task) == (["u", "v"], "3")


def test_a_json_line_is_a_sample():
    batch = read(b'{"x": [1, 2], "y": 5}\n\n{"x": [3, 4.5], "y": -6}\n', "jsonl", Reading())
    assert batch.x.tolist() == [[1, 2], [3, 4.5]]
    assert batch.y.tolist() == [5, -6]
    images = read(b'{"x": [[true, false], [true, true]]}', "jsonl", Reading())
    assert images.x.shape == (1, 2, 2)
    assert images.x.dtype == bool


DEEP = b'{"x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
BAD_JSON = {
    "empty": (b"", "truncated", "0 bytes"),
    "cut off": (b'{"x": [[1, 2], [3', "truncated", "missing"),
    "something else": (b"[1, 2]", "bad_format", "no JSON object"),
    "deep": (DEEP, "bad_format", "nested"),
    "deeper than images": (b'{"x": [[[[[1]]]]]}', "bad_shape", "deeper than 4"),
    "NaN": (b'{"x": [[NaN]]}', "non_finite", "NaN"),
    "infinity": (b'{"x": [[1e999]]}', "non_finite", "1 of 1"),
    "long integer": (b'{"x": [[' + b"1" * 5000 + b"]]}", "bad_format", "digits"),
    "wide integer": (b'{"x": [[' + b"1" * 30 + b"]]}", "bad_dtype", "64 bits"),
    "twice a key": (b'{"x": [[1]], "x": [[2]]}', "bad_format", "twice"),
    "byte order mark": (b'\xef\xbb\xbf{"x": [[1]]}', "bad_format", "starts with"),
    "not UTF-8": (b'{"x": [[1]], "y": ["\xff"]}', "bad_format", "utf-8"),
    "more after it": (b'{"x": [[1]]} {"x": [[2]]}', "trailing_bytes", "one JSON object"),
    "ragged": (b'{"x": [[1, 2], [3]]}', "bad_shape", "different lengths"),
    "depths": (b'{"x": [[1], 2]}', "bad_shape", "different depths"),
    "texts": (b'{"x": [["1"]]}', "bad_dtype", "str"),
    "null": (b'{"x": [[null]]}', "bad_dtype", "NoneType"),
    "bool as number": (b'{"x": [[1, true]]}', "bad_dtype", "bool, int"),
    "no x": (b'{"y": [1]}', "bad_shape", "x: expected a list"),
    "x is no list": (b'{"x": 3}', "bad_shape", "x: expected a list"),
    "no samples": (b'{"x": []}', "bad_shape", "(0,)"),
    "labels of another length": (b'{"x": [[1]], "y": [1, 2]}', "bad_labels", "(2,), expected (1,)"),
    "float labels": (b'{"x": [[1]], "y": [1.0]}', "bad_labels", "float"),
    "mixed labels": (b'{"x": [[1], [2]], "y": [1, "a"]}', "bad_labels", "int, str"),
    "bool labels": (b'{"x": [[1]], "y": [true]}', "bad_labels", "bool"),
    "wide labels": (b'{"x": [[1]], "y": [' + b"1" * 30 + b"]}", "bad_labels", "64 bits"),
    "nested labels": (b'{"x": [[1]], "y": [[1]]}', "bad_labels", "list"),
    "lone surrogate": (b'{"x": [[1]], "y": ["\\ud800"]}', "bad_labels", "Unicode"),
    "long label": (b'{"x": [[1]], "y": ["' + b"l" * 300 + b'"]}', "bad_labels", "300 characters"),
    "bad task": (b'{"x": [[1]], "task": [1]}', "bad_task", "list"),
    "empty task": (b'{"x": [[1]], "task": ""}', "bad_task", "printable"),
}


@pytest.mark.parametrize("payload, code, words", BAD_JSON.values(), ids=BAD_JSON.keys())
def test_each_bad_json_gets_its_reason(payload, code, words):
    error = refused(payload, "json", Reading(with_task=True))
    assert error.code == code, error
    assert words in error.text


GOOD_LINE = b'{"x": [1, 2], "y": 5}\n'
BAD_LINES = {
    "cut off": (GOOD_LINE + b'{"x": [1,', "truncated", "line 2: "),
    "cut before the end": (b'{"x": [1,\n' + GOOD_LINE, "bad_format", "line 1: "),
    "cut with its newline": (GOOD_LINE + b'{"x": [1,\n', "bad_format", "line 2: "),
    "another width": (GOOD_LINE + b'{"x": [1], "y": 5}\n', "schema_mismatch", "line 2: x: int64 of shape (1,)"),
    "another type": (GOOD_LINE + b'{"x": [true, true], "y": 5}\n', "schema_mismatch", "line 2: x: bool"),
    "some labels": (GOOD_LINE + b'{"x": [1, 2]}\n', "bad_labels", "line 2: expected a y in every line"),
    "some tasks": (GOOD_LINE + b'{"x": [1, 2], "y": 5, "task": 3}\n', "bad_task", "2 different"),
    "deep": (GOOD_LINE + DEEP, "bad_format", "line 2: nested"),
    "blank": (b"\n\n", "bad_shape", "no samples"),
}


@pytest.mark.parametrize("payload, code, words", BAD_LINES.values(), ids=BAD_LINES.keys())
def test_each_bad_line_gets_its_reason(payload, code, words):
    error = refused(payload, "jsonl", Reading(with_task=True))
    assert error.code == code, error
    assert words in error.text


def test_values_of_json_are_counted_before_they_are_read():
    assert refused(b'{"x": [[' + b"1," * 1000 + b"1]]}", "json", Reading(Limits(bytes=31_999))).code == "too_large"
    assert refused(GOOD_LINE * 3, "jsonl", Reading(Limits(samples=2))).code == "too_many_samples"


# --- any bytes --------------------------------------------------------------------------------------------


def check_reads_or_refuses(payload, form):
    try:
        batch = read(payload, form, Reading(with_task=True))
    except BatchRejected as error:
        assert str(error).isprintable()
        return
    assert len(batch.x) >= 1
    assert batch.y is None or batch.y.shape == (len(batch.x),)


@given(st.binary(max_size=300) | st.text(max_size=100).map(str.encode), st.sampled_from(["csv", "json", "jsonl"]))
def test_any_text_gives_a_batch_or_a_rejection(payload, form):
    check_reads_or_refuses(payload, form)
    check_reads_or_refuses(b'{"x": [[' + payload + b"]]}", form)
    check_reads_or_refuses(b"a,b,y\n" + payload, form)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
)


@given(st.fixed_dictionaries({}, optional={"x": json_values, "y": json_values, "task": json_values}))
def test_any_json_gives_a_batch_or_a_rejection(fields):
    import json

    for form in ("json", "jsonl"):
        check_reads_or_refuses(json.dumps(fields).encode(), form)


@given(
    st.lists(st.tuples(st.integers(0, 3000), st.binary(min_size=1, max_size=4)), max_size=3),
    st.integers(0, 40),
)
def test_any_damage_to_a_csv_gives_a_batch_or_a_rejection(damage, cut):
    damaged = bytearray(b'a,"b c",y\n1,2.5,cat\n3,4,"d\no"\n')
    for at, replacement in damage:
        start = at % len(damaged)
        damaged[start : start + len(replacement)] = replacement
    check_reads_or_refuses(bytes(damaged[cut:]), "csv")
