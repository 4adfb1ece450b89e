"""The wire's laws: what is decoded is what was meant, and everything else is refused with a code."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from supsupd.sections import ServingSettings
from supsupd.serving.engine import ExtensionNotSupported, Prediction
from supsupd.serving.oip.outputs import OUTPUTS, model_config, model_metadata, output_tensors, wanted_outputs
from supsupd.serving.oip.protocol import (
    InferAnswer,
    InferRequest,
    RequestedOutput,
    decode_raw,
    decode_request,
    encode_answer,
    question_of,
    timeout_of,
)
from supsupd.serving.oip.strict_json import ProtocolError, parse_json, parse_json_slowly
from supsupd.serving.oip.tensors import from_raw


def body(**changes):
    x = {"name": "x", "shape": [2, 2], "datatype": "FP32", "data": [1, 2, 3, 4.5]}
    x.update(changes.pop("x", {}))
    return json.dumps({"inputs": [x], **changes}).encode()


def asked(raw, json_bytes=None):
    """The question, and the outputs, that a body asks."""
    request = decode_request(raw, json_bytes)
    timeout_of(request)
    return question_of(request), wanted_outputs(request.outputs)


def raw_body(*tensors, behind=b"", **more):
    """JSON, then raw tensors, as (body, bytes of JSON)."""
    inputs = [
        {"name": name, "shape": list(x.shape), "datatype": "FP32", "parameters": {"binary_data_size": x.nbytes}}
        for name, x in tensors
    ]
    head = json.dumps({"inputs": inputs, **more}).encode()
    return head + b"".join(x.tobytes() for _, x in tensors) + behind, len(head)


def test_parameters_outputs_and_id_are_read_and_have_defaults():
    question, outputs = asked(body())
    assert (question.task, question.per_sample, [name for name, _ in outputs]) == (None, False, list(OUTPUTS))
    question, outputs = asked(
        body(parameters={"task": 7, "per_sample": True, "priority": 1}, outputs=[{"name": "task"}])
    )
    assert (question.task, question.per_sample, outputs) == (7, True, [("task", None)])
    assert asked(body(parameters={"task": "digits"}))[0].task == "digits"
    assert (decode_request(body(id="a")).id, decode_request(body()).id) == ("a", None)


def test_the_clients_own_words_are_taken_and_what_nobody_knows_is_let_be():
    words = {"sequence_id": "s", "sequence_start": True, "priority": 3, "triton_enable_empty_final_response": True}
    question, _ = asked(body(parameters={**words, "mine": [1, {"a": None}], "headers": {}}))
    assert (question.task, question.method) == (None, None)
    assert [timeout_of(decode_request(body(parameters={"timeout": t}))) for t in (0, 1500)] == [None, 0.0015]


def test_a_models_own_task_may_be_named_again_and_no_other():
    for same in (None, 3, "3", "id:3"):
        assert question_of(decode_request(body(parameters={"task": same})), 3).task == 3
    with pytest.raises(ProtocolError, match="this model is task 3"):
        question_of(decode_request(body(parameters={"task": 4})), 3)


@pytest.mark.parametrize(
    ("said", "meant"), [("H", "entropy"), ("G", "g"), ("g", "g"), ("energy", "energy"), ("max-logit", "max-logit")]
)
def test_a_query_may_say_how_its_task_is_inferred(said, meant):
    question, _ = asked(body(parameters={"method": "one-shot", "objective": said}))
    assert (question.method, question.objective) == ("one-shot", meant)
    plain, _ = asked(body(parameters={"method": None, "objective": None}))
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
        asked(body(parameters=parameters))
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
    "half a pair": rb'{"parameters": {"task": "\ud800"}}',
    "half a pair as a key": rb'{"\uDFFF": 1}',
}


def test_a_head_that_came_before_says_nothing_about_the_bytes_behind_it():
    told = {"name": "x", "shape": [1, 4], "datatype": "UINT8", "parameters": {"binary_data_size": 4}}
    head = json.dumps({"inputs": [told]}).encode()
    for values in (b"\1\2\3\4", b"\5\6\7\x08"):
        assert decode_request(head + values, len(head)).inputs[0].data.tobytes() == values
    for wrong in (b"\1\2\3", b"\1\2\3\4\5"):
        with pytest.raises(ProtocolError, match="raw bytes"):
            decode_request(head + wrong, len(head))


@pytest.mark.parametrize("raw", BAD_JSON.values(), ids=BAD_JSON.keys())
def test_what_is_not_strict_json_is_refused(raw):
    with pytest.raises(ProtocolError, match=r"^bad_json: "):
        decode_request(raw)


def written(pairs):
    """Objects as JSON text, whose keys may come twice."""
    if isinstance(pairs, tuple):
        return "{" + ", ".join(f"{json.dumps(key)}: {written(value)}" for key, value in pairs) + "}"
    if isinstance(pairs, list):
        return "[" + ",".join(map(written, pairs)) + "]"
    return json.dumps(pairs)


numbers = st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False, allow_infinity=False)
values = st.recursive(
    st.none() | st.booleans() | numbers | st.text(max_size=3) | st.sampled_from(["a", "b", '"']),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(st.tuples(st.sampled_from("abc") | st.text(max_size=2), inner), max_size=4).map(tuple)
    ),
    max_leaves=12,
)


@given(values)
def test_json_is_read_and_refused_as_by_the_slow_parser(value):
    raw = written(value).encode()
    try:
        expected = parse_json_slowly(raw)
    except ProtocolError as refusal:
        with pytest.raises(ProtocolError) as caught:
            parse_json(raw)
        assert str(caught.value) == str(refusal)
    else:
        assert json.dumps(parse_json(raw)) == json.dumps(expected)


@pytest.mark.parametrize(
    "raw",
    [
        b'{"inputs": [{"data": [1, 2, "x"]}], "inputs": []}',
        b'{"a": [1, {"b": "x", "b": "x"}]}',
        b'{"a": {"b": 1, "b": 1}, "c": [1, "d"]}',
        b'{"": 0, "": 0}',
    ],
)
def test_a_key_that_comes_twice_is_found_wherever_it_is(raw):
    with pytest.raises(ProtocolError, match="an object has a key twice"):
        parse_json(raw)


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
    ("bad_request", {"outputs": [{"name": "probabilities", "parameters": {"classification": 0}}]}),
    ("bad_request", {"outputs": [{"name": "probabilities", "parameters": {"classification": True}}]}),
    ("bad_request", {"outputs": [{"name": "label", "parameters": {"binary_data": 1}}]}),
    ("bad_request", {"parameters": {"timeout": -1}}),
    ("bad_request", {"parameters": {"binary_data_output": "yes"}}),
    ("bad_request", {"x": {"name": "x\nHTTP/1.1 200 OK"}}),
    ("bad_request", {"x": {"name": "x" * 65}}),
    ("bad_request", {"parameters": {"timeout": 0.5}}),
    ("bad_request", {"x": {"parameters": []}}),
    ("bad_request", {"x": {"data": None}}),
    ("bad_request", {"x": {"parameters": {"binary_data_size": 16}}}),
    ("bad_datatype", {"x": {"datatype": "BYTES"}}),
    ("bad_datatype", {"x": {"datatype": "BF16"}}),
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
    ("shape_mismatch", {"x": {"shape": None}}),
    ("shape_mismatch", {"x": {"shape": [4]}}),
    ("shape_mismatch", {"x": {"shape": []}}),
    ("shape_mismatch", {"x": {"shape": [1] * 20}}),
    ("shape_mismatch", {"x": {"shape": [2, -2]}}),
    ("shape_mismatch", {"x": {"shape": [2, 2.0]}}),
    ("shape_mismatch", {"x": {"shape": [2, True]}}),
    ("shape_mismatch", {"x": {"shape": [0, 4], "data": []}}),
    ("shape_mismatch", {"x": {"shape": [10**4000, 2]}}),
    ("shape_mismatch", {"x": {"shape": [2**31 - 1] * 8}}),
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
        asked(body(**changes))
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 300


def test_infinity_as_a_large_exponent_is_not_finite():
    raw = body().replace(b"4.5", b"1e999")
    with pytest.raises(ProtocolError, match="non_finite: value 3"):
        asked(raw)


def test_raw_tensors_follow_the_json_and_are_not_copied():
    x = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    raw, json_bytes = raw_body(("x", x))
    question, _ = asked(raw, json_bytes)
    assert np.array_equal(question.x, x)
    assert question.x.base is not None
    assert not question.x.flags.owndata


def test_raw_and_written_tensors_may_be_mixed_in_one_request():
    first, last = np.float32([[1, 2]]), np.float32([[3, 4], [5, 6]])
    raw, json_bytes = raw_body(("a", first), ("b", last))
    told = json.loads(raw[:json_bytes])
    told["inputs"].insert(1, {"name": "m", "shape": [2], "datatype": "INT8", "data": [7, 8]})
    head = json.dumps(told).encode()
    request = decode_request(head + raw[json_bytes:], len(head))
    assert [(tensor.name, tensor.data.tolist()) for tensor in request.inputs] == [
        ("a", first.tolist()),
        ("m", [7, 8]),
        ("b", last.tolist()),
    ]


ROW = np.float32([[1, 2, 3, 4]])
BAD_RAW = {
    "header longer than the body": ("bad_request", raw_body(("x", ROW))[0], 10_000),
    "bytes behind the tensors": ("shape_mismatch", *raw_body(("x", ROW), behind=b"more")),
    "a tensor cut short": ("shape_mismatch", raw_body(("x", ROW))[0][:-1], raw_body(("x", ROW))[1]),
    "two tensors and one's bytes": (
        "shape_mismatch",
        raw_body(("x", ROW), ("y", ROW))[0][:-16],
        raw_body(("x", ROW), ("y", ROW))[1],
    ),
    "raw bytes that no input takes": ("bad_json", body() + b"\0" * 8, None),
    "a size without bytes": ("shape_mismatch", raw_body(("x", ROW))[0][: raw_body(("x", ROW))[1]], None),
    "half of the JSON": ("bad_json", raw_body(("x", ROW))[0], 20),
}


@pytest.mark.parametrize(("code", "raw", "json_bytes"), BAD_RAW.values(), ids=BAD_RAW.keys())
def test_raw_tensors_that_do_not_add_up_are_refused(code, raw, json_bytes):
    with pytest.raises(ProtocolError, match=f"^{code}: "):
        asked(raw, json_bytes)


@pytest.mark.parametrize(
    ("size", "shape"),
    [(-1, [1, 4]), (2**70, [1, 4]), (True, [1, 4]), (16.0, [1, 4]), (16, [2, 4]), (16, [2**31 - 1] * 8)],
)
def test_a_size_that_is_not_the_tensors_own_is_refused(size, shape):
    tensor = {"name": "x", "shape": shape, "datatype": "FP32", "parameters": {"binary_data_size": size}}
    head = json.dumps({"inputs": [tensor]}).encode()
    with pytest.raises(ProtocolError, match=r"^(shape_mismatch|bad_request): "):
        asked(head + ROW.tobytes(), len(head))


def test_raw_values_must_be_finite_numbers():
    for datatype, values in [("FP32", np.float32([[1, np.nan]])), ("FP16", np.float16([[np.inf, 0]]))]:
        with pytest.raises(ProtocolError, match=f"^non_finite: value . of x is not finite as {datatype}"):
            question_of(InferRequest((from_raw("x", datatype, [1, 2], values.tobytes()),)))
    with pytest.raises(ProtocolError, match=r"^bad_datatype: "):
        question_of(InferRequest((from_raw("x", "BYTES", [1, 1], b"\1\0\0\0a"),)))


def test_a_raw_body_alone_is_one_row_and_wants_raw_answers():
    request = decode_raw(ROW.tobytes(), [2, 2])
    assert question_of(request).x.tolist() == [[[1, 2], [3, 4]]]
    answer = InferAnswer("supsup", "1", None, output_tensors(prediction(), wanted_outputs(())))
    assert len(encode_answer(answer, request)[1]) == len(OUTPUTS)
    with pytest.raises(ProtocolError, match=r"^shape_mismatch: "):
        decode_raw(ROW.tobytes(), [5])


@pytest.mark.parametrize("where", ["inputs", "outputs"])
def test_shared_memory_is_no_part_of_what_is_served(where):
    told = {"name": "x", "shape": [1, 4], "datatype": "FP32", "parameters": {"shared_memory_region": "r"}}
    with pytest.raises(ExtensionNotSupported, match=r"^extension_not_supported: "):
        decode_request(json.dumps({"inputs": [], where: [told]}).encode())


@given(st.binary(max_size=60), st.none() | st.integers(0, 60))
def test_any_bytes_decode_or_are_refused(raw, json_bytes):
    try:
        asked(raw, json_bytes)
    except ProtocolError as error:
        assert ": " in str(error)


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3), st.lists))
def test_any_data_decodes_or_is_refused(data):
    try:
        asked(body(x={"data": data, "shape": [1, 2]}))
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


def answer_to(request, made=None):
    """The answer's JSON and its raw tensors."""
    tensors = output_tensors(made or prediction(), wanted_outputs(request.outputs))
    head, raw = encode_answer(InferAnswer("supsup", "1", request.id, tensors), request)
    return parse_json(head), raw


def test_an_answer_holds_every_output_flat_with_its_shape():
    answer, raw = answer_to(InferRequest((), id="r1"))
    assert (answer["model_name"], answer["model_version"], answer["id"], raw) == ("supsup", "1", "r1", [])
    assert [(o["name"], o["datatype"], o["shape"], o["data"]) for o in answer["outputs"]] == [
        ("label", "INT64", [2], [3, 5]),
        ("probabilities", "FP32", [2, 2], [0.25, 0.75, 1, 0]),
        ("task", "INT64", [2], [1, 2]),
        ("entropy", "FP32", [2], [0.5, 0]),
        ("known", "BOOL", [2], [True, False]),
    ]


def test_an_answer_holds_only_what_was_asked_in_the_order_asked():
    asked_for = (RequestedOutput("known"), RequestedOutput("label"))
    answer, _ = answer_to(InferRequest((), outputs=asked_for), prediction(("cat", "dog")))
    assert "id" not in answer
    assert [(o["name"], o["datatype"]) for o in answer["outputs"]] == [("known", "BOOL"), ("label", "BYTES")]
    assert answer["outputs"][1]["data"] == ["cat", "dog"]


@pytest.mark.parametrize("everything", [None, False, True])
@pytest.mark.parametrize("each", [None, False, True])
def test_an_output_comes_raw_where_it_is_asked_so_itself_or_with_all(everything, each):
    parameters = {} if everything is None else {"binary_data_output": everything}
    outputs = () if each is None else (RequestedOutput("label", {"binary_data": each}), RequestedOutput("task"))
    answer, raw = answer_to(InferRequest((), parameters, outputs), prediction(("cat", "dog")))
    is_raw = [each if each is not None else bool(everything)] + [bool(everything)] * (len(answer["outputs"]) - 1)
    assert ["data" not in output for output in answer["outputs"]] == is_raw
    sizes = [output["parameters"]["binary_data_size"] for output in answer["outputs"] if "data" not in output]
    assert sizes == [len(part) for part in raw]
    if is_raw[0]:
        assert raw[0] == b"\3\0\0\0cat\3\0\0\0dog"


def test_classes_are_told_with_their_probability_the_most_probable_first():
    outputs = (RequestedOutput("probabilities", {"classification": 7}),)
    answer, _ = answer_to(InferRequest((), outputs=outputs), prediction(("cat", "dog")))
    (output,) = answer["outputs"]
    assert (output["datatype"], output["shape"]) == ("BYTES", [2, 2])
    assert output["data"] == ["0.750000:1:dog", "0.250000:0:cat", "1.000000:0:cat", "0.000000:1:dog"]


@pytest.mark.parametrize("labels", [(3, 5), ("cat", "dog")], ids=["int", "str"])
def test_the_metadata_tells_the_shapes_of_the_answers(labels):
    kind = "int" if labels == (3, 5) else "str"
    model = {"input_shape": [28, 28], "classes": list(labels), "label_kind": kind}
    metadata = model_metadata("task-3", [7], model)
    assert (metadata["name"], metadata["versions"]) == ("task-3", ["7"])
    assert metadata["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 28, 28]}]
    answer, _ = answer_to(InferRequest(()), prediction(labels))
    config = model_config("task-3", 7, model, ServingSettings())
    assert config["input"] == [{"name": "x", "data_type": "TYPE_FP32", "dims": [28, 28]}]
    for told, configured, given_ in zip(metadata["outputs"], config["output"], answer["outputs"], strict=True):
        assert (told["name"], told["datatype"]) == (given_["name"], given_["datatype"])
        assert told["shape"] == [-1, *given_["shape"][1:]]
        assert configured["name"] == told["name"]
        assert configured["data_type"].removeprefix("TYPE_").replace("STRING", "BYTES") == told["datatype"]
