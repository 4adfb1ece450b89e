"""Tensors come through both forms bit for bit, in every datatype; a slow, obvious reference says what the bytes are."""

import json
import struct

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from supsupd.serving.oip.strict_json import ProtocolError
from supsupd.serving.oip.tensors import DATATYPES, Tensor, from_json, from_raw, to_json, to_raw

CODES = {
    "BOOL": "?",
    "UINT8": "B",
    "UINT16": "H",
    "UINT32": "I",
    "UINT64": "Q",
    "INT8": "b",
    "INT16": "h",
    "INT32": "i",
    "INT64": "q",
    "FP16": "e",
    "FP32": "f",
    "FP64": "d",
}
shapes = hnp.array_shapes(min_dims=1, max_dims=4, max_side=4)


def tensors(**elements):
    """Arrays of every datatype that numpy has."""
    return st.sampled_from(list(DATATYPES.values())).flatmap(
        lambda dtype: hnp.arrays(dtype, shapes, elements=elements if dtype.kind == "f" else None)
    )


def reference(datatype, elements):
    """Little-endian, row-major, without padding, one element after the other."""
    if datatype == "BYTES":
        return b"".join(struct.pack("<I", len(element)) + element for element in elements)
    if datatype == "BF16":  # the upper two of the four bytes of an FP32
        return b"".join(struct.pack("<f", element)[2:] for element in elements)
    return b"".join(struct.pack("<" + CODES[datatype], element) for element in elements)


def datatype_of(x):
    return next(name for name, dtype in DATATYPES.items() if dtype == x.dtype)


@given(tensors(allow_nan=False))
def test_an_array_comes_through_as_raw_bytes_those_of_the_reference(x):
    datatype = datatype_of(x)
    raw = to_raw(Tensor("x", datatype, x.shape, x))
    assert raw == reference(datatype, x.ravel().tolist())
    back = from_raw("x", datatype, list(x.shape), memoryview(b"\0" + raw)[1:])  # wherever it lies in a body
    assert (back.datatype, back.shape, back.data.shape, back.data.dtype) == (datatype, x.shape, x.shape, x.dtype)
    assert back.data.tobytes() == x.tobytes()


@given(tensors(allow_nan=False, allow_infinity=False), st.booleans())
def test_an_array_comes_through_json_flat_or_nested_bit_for_bit(x, flat):
    data = json.loads(json.dumps(x.ravel().tolist() if flat else x.tolist()))
    back = from_json("x", datatype_of(x), list(x.shape), data)
    assert (back.data.dtype, back.data.shape) == (x.dtype, x.shape)
    assert back.data.tobytes() == x.tobytes()
    written = orjson.loads(orjson.dumps(to_json(back), option=orjson.OPT_SERIALIZE_NUMPY))
    assert from_json("x", datatype_of(x), list(x.shape), written).data.tobytes() == x.tobytes()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_json_has_no_number_for_is_never_written(value):
    with pytest.raises(ValueError, match="entropy is not finite"):
        to_json(Tensor("entropy", "FP32", (2,), np.array([1, value], np.float32)))


@given(hnp.arrays(np.uint16, shapes))
def test_bf16_is_the_upper_half_of_fp32(halves):
    back = from_raw("x", "BF16", list(halves.shape), halves.tobytes())
    assert back.data.dtype == np.float32
    assert to_raw(back) == halves.tobytes()
    finite = back.data[np.isfinite(back.data)]
    assert reference("BF16", finite.tolist()) == halves[np.isfinite(back.data)].tobytes()


@given(st.lists(st.binary(max_size=20), min_size=1, max_size=8))
def test_elements_of_bytes_come_through_each_after_its_length(elements):
    raw = to_raw(Tensor("x", "BYTES", (len(elements),), elements))
    assert raw == reference("BYTES", elements)
    assert from_raw("x", "BYTES", [len(elements)], memoryview(raw)).data == elements


@given(st.sampled_from([*DATATYPES, "BF16", "BYTES"]), st.lists(st.integers(-1, 5), max_size=9), st.binary(max_size=64))
def test_any_bytes_are_the_tensors_own_or_refused(datatype, shape, raw):
    try:
        assert to_raw(from_raw("x", datatype, shape, raw)) == raw
    except ProtocolError as error:
        assert str(error).startswith(("shape_mismatch: ", "bad_datatype: "))


@pytest.mark.parametrize("raw", [b"\2", b"\xff"])
def test_a_bool_is_0_or_1(raw):
    with pytest.raises(ProtocolError, match=r"^bad_datatype: "):
        from_raw("x", "BOOL", [1], raw)


@pytest.mark.parametrize("datatype", ["FP8", "", "fp32", "STRING", None, 7, ["FP32"]])
def test_another_datatype_is_refused(datatype):
    for decode, given_ in ((from_raw, b""), (from_json, [])):
        with pytest.raises(ProtocolError, match=r"^bad_datatype: x must be one of BOOL"):
            decode("x", datatype, [1], given_)


@pytest.mark.parametrize("shape", [[2**31 - 1] * 8, [2**63], [-1], [0], [True], [1] * 9, [], None, "4", [4.0]])
def test_a_shape_is_weighed_before_anything_is_allocated(shape):
    for datatype in ("FP64", "BYTES", "BF16"):
        with pytest.raises(ProtocolError, match=r"^shape_mismatch: "):
            from_raw("x", datatype, shape, b"\0" * 32)
