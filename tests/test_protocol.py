"""The wire's laws: what is decoded is what was meant, and everything else is refused with a code."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from supsupd.serving.engine import Prediction
from supsupd.serving.protocol import (
    DATATYPE_OF,
    DATATYPES,
    OUTPUTS,
    InferRequest,
    ProtocolError,
    decode_request,
    encode_response,
    model_metadata,
    parse_json,
    server_metadata,
)

arrays = st.sampled_from([np.dtype(t) for t in DATATYPES.values()]).flatmap(
    lambda dtype: hnp.arrays(
        dtype,
        hnp.array_shapes(min_dims=2, max_dims=4, max_side=4),
        elements={"allow_nan": False, "allow_infinity": False} if dtype.kind == "f" else None,
    )
)


def tensor(x, data):
    return {"name": "x", "shape": list(x.shape), "datatype": DATATYPE_OF[x.dtype], "data": data}


def body(**changes):
    x = {"name": "x", "shape": [2, 2], "datatype": "FP32", "data": [1, 2, 3, 4.5]}
    x.update(changes.pop("x", {}))
    return json.dumps({"inputs": [x], **changes}).encode()


@given(arrays, st.booleans())
def test_an_array_comes_through_flat_or_nested_bit_for_bit(x, flat):
    data = x.ravel().tolist() if flat else x.tolist()
    decoded = decode_request(json.dumps({"inputs": [tensor(x, data)]}).encode())
    assert decoded.x.dtype == x.dtype
    assert decoded.x.tobytes() == x.tobytes()
    assert decoded.x.shape == x.shape


def test_parameters_outputs_and_id_are_read_and_have_defaults():
    plain = decode_request(body())
    assert (plain.task, plain.per_sample, plain.outputs, plain.id) == (None, False, OUTPUTS, None)
    asked = decode_request(
        body(parameters={"task": 7, "per_sample": True, "priority": 1}, outputs=[{"name": "task"}], id="a")
    )
    assert (asked.task, asked.per_sample, asked.outputs, asked.id) == (7, True, ("task",), "a")
    assert decode_request(body(parameters={"task": "digits"})).task == "digits"
    # what an unmodified client says when it would like raw bytes back; JSON is an answer to it
    assert decode_request(body(parameters={"binary_data_output": True}, outputs=[])).outputs == OUTPUTS


@pytest.mark.parametrize(
    ("said", "meant"), [("H", "entropy"), ("G", "g"), ("g", "g"), ("energy", "energy"), ("max-logit", "max-logit")]
)
def test_a_query_may_say_how_its_task_is_inferred(said, meant):
    asked = decode_request(body(parameters={"method": "one-shot", "objective": said}))
    assert (asked.method, asked.objective) == ("one-shot", meant)
    plain = decode_request(body(parameters={"method": None, "objective": None}))
    assert (plain.method, plain.objective) == (None, None)


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ({"method": "magic"}, "method must be one of exact, one-shot, binary, recover, not 'magic'"),
        ({"method": "\x1b" * 99}, "not '" + r"\x1b" * 40 + "'"),
        ({"method": 1}, "method must be a string"),
        ({"objective": "h"}, "objective must be one of entropy, g, energy, max-logit, features, not 'h'"),
        ({"objective": ["g"]}, "objective must be a string"),
    ],
)
def test_another_way_to_infer_is_refused(parameters, said):
    with pytest.raises(ProtocolError) as caught:
        decode_request(body(parameters=parameters))
    assert str(caught.value).startswith("bad_request: ")
    assert said in str(caught.value)


BAD_JSON = {
    "empty": b"",
    "not JSON": b"{",
    "not an object": b"[]",
    "NaN": b'{"inputs": [NaN]}',
    "Infinity": b'{"a": -Infinity}',
    "a key twice": b'{"id": "a", "id": "b"}',
    "deep": b"[" * 100_000,
    "digits": b'{"a": ' + b"9" * 5_000 + b"}",
    "BOM": b"\xef\xbb\xbf{}",
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "not UTF-8": b'{"a": "\xff"}',
}


@pytest.mark.parametrize("raw", BAD_JSON.values(), ids=BAD_JSON.keys())
def test_what_is_not_strict_json_is_refused(raw):
    with pytest.raises(ProtocolError, match=r"^bad_json: "):
        decode_request(raw)


BAD_REQUESTS = [
    ("bad_request", {"inputs": []}),
    ("bad_request", {"inputs": [1]}),
    ("bad_request", {"inputs": "x"}),
    ("bad_request", {"x": {"name": "y"}}),
    ("bad_request", {"x": {"data": 3}}),
    ("bad_request", {"x": {"data": "1234"}}),
    ("bad_request", {"id": 3}),
    ("bad_request", {"parameters": []}),
    ("bad_request", {"parameters": {"task": True}}),
    ("bad_request", {"parameters": {"task": 1.0}}),
    ("bad_request", {"parameters": {"task": -1}}),
    ("bad_request", {"parameters": {"task": 2**63}}),
    ("bad_request", {"parameters": {"task": ["a"]}}),
    ("bad_request", {"parameters": {"per_sample": 1}}),
    ("bad_request", {"outputs": [{"name": "magic"}]}),
    ("bad_request", {"outputs": ["label"]}),
    ("bad_request", {"outputs": [{"name": ["label"]}]}),
    ("bad_request", {"outputs": [{"name": "label"}, {"name": "label"}]}),
    ("bad_request", {"outputs": [{"name": "label", "parameters": {"classification": 2}}]}),
    ("bad_datatype", {"x": {"datatype": "BYTES"}}),
    ("bad_datatype", {"x": {"datatype": "FP8"}}),
    ("bad_datatype", {"x": {"datatype": None}}),
    ("bad_datatype", {"x": {"datatype": ["FP32"]}}),
    ("bad_datatype", {"x": {"data": [1, 2, "3", 4]}}),
    ("bad_datatype", {"x": {"data": [1, 2, True, 4]}}),
    ("bad_datatype", {"x": {"data": [1, 2, None, 4]}}),
    ("bad_datatype", {"x": {"datatype": "INT8", "data": [1, 2, 3, 128]}}),
    ("bad_datatype", {"x": {"datatype": "UINT8", "data": [1, 2, 3, -1]}}),
    ("bad_datatype", {"x": {"datatype": "INT32", "data": [1, 2, 3, 4.0]}}),
    ("bad_datatype", {"x": {"datatype": "BOOL", "data": [1, 0, 1, 0]}}),
    ("bad_datatype", {"x": {"datatype": "FP64", "data": [10**400, 0, 1, 0]}}),
    ("non_finite", {"x": {"data": [1, 2, 1e300, 4]}}),
    ("non_finite", {"x": {"datatype": "FP16", "data": [1, 2, 70000, 4]}}),
    ("bad_shape", {"x": {"shape": None}}),
    ("bad_shape", {"x": {"shape": [4]}}),
    ("bad_shape", {"x": {"shape": []}}),
    ("bad_shape", {"x": {"shape": [1] * 20}}),
    ("bad_shape", {"x": {"shape": [2, -2]}}),
    ("bad_shape", {"x": {"shape": [2, 2.0]}}),
    ("bad_shape", {"x": {"shape": [2, True]}}),
    ("bad_shape", {"x": {"shape": [0, 4], "data": []}}),
    ("shape_mismatch", {"x": {"shape": [2, 3]}}),
    ("shape_mismatch", {"x": {"shape": [2**63, 2**63]}}),
    ("shape_mismatch", {"x": {"data": [[1, 2, 3], [4]]}}),
    ("shape_mismatch", {"x": {"data": [[1, 2], 3, 4]}}),
    ("shape_mismatch", {"x": {"data": [[1, 2], "34"]}}),
    ("shape_mismatch", {"x": {"data": [[1, 2]]}}),
    ("bad_datatype", {"x": {"data": [[1, 2], [[3], 4]]}}),
]


@pytest.mark.parametrize(
    ("code", "changes"), BAD_REQUESTS, ids=[f"{c}-{next(iter(m.values()))}"[:60] for c, m in BAD_REQUESTS]
)
def test_a_bad_request_is_refused_with_its_code_in_one_line(code, changes):
    with pytest.raises(ProtocolError, match=f"^{code}: ") as caught:
        decode_request(body(**changes))
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 200


def test_infinity_as_a_large_exponent_is_not_finite():
    raw = body().replace(b"4.5", b"1e999")
    with pytest.raises(ProtocolError, match="non_finite: value 3"):
        decode_request(raw)


@given(st.binary(max_size=60))
def test_any_bytes_decode_or_are_refused(raw):
    try:
        decode_request(raw)
    except ProtocolError as error:
        assert ": " in str(error)


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3), st.lists))
def test_any_data_decodes_or_is_refused(data):
    try:
        decode_request(body(x={"data": data, "shape": [1, 2]}))
    except ProtocolError as error:
        assert ": " in str(error)


def prediction(labels=(3, 5)):
    return Prediction(
        labels=list(labels),
        probabilities=np.array([[0.25, 0.75], [1, 0]], np.float32),
        task=np.array([1, 2]),
        entropy=np.array([0.5, 0.0], np.float32),
        known=np.array([True, False]),
        classes=sorted(labels),
    )


def test_an_answer_holds_every_output_flat_with_its_shape():
    request = InferRequest(x=np.zeros((2, 1)), id="r1")
    answer = parse_json(json.dumps(encode_response(prediction(), request)).encode())
    assert (answer["model_name"], answer["id"]) == ("supsup", "r1")
    assert [(o["name"], o["datatype"], o["shape"], o["data"]) for o in answer["outputs"]] == [
        ("label", "INT64", [2], [3, 5]),
        ("probabilities", "FP32", [2, 2], [0.25, 0.75, 1, 0]),
        ("task", "INT64", [2], [1, 2]),
        ("entropy", "FP32", [2], [0.5, 0]),
        ("known", "BOOL", [2], [True, False]),
    ]


def test_an_answer_holds_only_what_was_asked_in_the_order_asked():
    request = InferRequest(x=np.zeros((2, 1)), outputs=("known", "label"))
    answer = encode_response(prediction(("cat", "dog")), request)
    assert "id" not in answer
    assert [(o["name"], o["datatype"]) for o in answer["outputs"]] == [("known", "BOOL"), ("label", "BYTES")]
    assert answer["outputs"][1]["data"] == ["cat", "dog"]


@pytest.mark.parametrize("kind", ["int", "str"])
def test_the_metadata_tells_the_shapes_of_the_answers(kind):
    labels = [3, 5] if kind == "int" else ["cat", "dog"]
    model = model_metadata({"input_shape": [28, 28], "classes": labels, "label_kind": kind})
    assert model["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 28, 28]}]
    answer = encode_response(prediction(labels), InferRequest(x=np.zeros((2, 1))))
    for told, given_ in zip(model["outputs"], answer["outputs"], strict=True):
        assert (told["name"], told["datatype"]) == (given_["name"], given_["datatype"])
        assert told["shape"] == [-1, *given_["shape"][1:]]
    assert server_metadata("1.2")["extensions"] == []
