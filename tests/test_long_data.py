"""Long JSON says what short JSON says: the same tensors, and the same refusals."""

import json

import numpy as np
import pytest

from supsupd.serving.oip import long_data, protocol
from supsupd.serving.oip.strict_json import ProtocolError

ROWS = np.random.default_rng(0).normal(size=(40, 5, 3)).round(6)


@pytest.fixture
def short_pieces(monkeypatch):
    """As if what is here were much longer."""
    monkeypatch.setattr(long_data, "PIECE_BYTES", 64)
    monkeypatch.setattr(protocol, "PIECE_BYTES", 64)


def body(data, shape, datatype="FP64", **more):
    told = {"name": "x", "shape": list(shape), "datatype": datatype, "data": data}
    return {"id": 'a "quoted" \\ caf\u00e9', "inputs": [told], **more}


def both(text, monkeypatch):
    """What is decoded of long JSON, and of the same in one piece; ProtocolError where it is refused."""
    found = []
    for pieces in (64, 1 << 30):
        monkeypatch.setattr(long_data, "PIECE_BYTES", pieces)
        monkeypatch.setattr(protocol, "PIECE_BYTES", pieces)
        try:
            found.append(protocol.decode_request(text))
        except ProtocolError as error:
            found.append(error)
    return found


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("shape", [(600,), (40, 15), (40, 5, 3), (2, 300), (1, 600), (600, 1), (1, 1, 600)])
@pytest.mark.parametrize("is_nested", [True, False])
def test_long_data_are_the_same_tensor(shape, is_nested, indent, monkeypatch):
    x = ROWS.reshape(shape)
    text = json.dumps(body((x if is_nested else x.ravel()).tolist(), shape, parameters={"task": 1}), indent=indent)
    long, short = both(text.encode(), monkeypatch)
    assert long.inputs[0].shape == short.inputs[0].shape == shape
    assert np.array_equal(long.inputs[0].data, x)
    assert np.array_equal(short.inputs[0].data, x)
    assert (long.id, long.parameters) == (short.id, short.parameters)


@pytest.mark.parametrize("datatype", ["BOOL", "INT8", "INT64", "UINT64", "FP16", "FP32"])
def test_every_datatype_is_read_so(datatype, monkeypatch):
    values = [bool(i % 2) if datatype == "BOOL" else i % 100 for i in range(600)]
    long, short = both(json.dumps(body(values, (600, 1), datatype)).encode(), monkeypatch)
    assert np.array_equal(long.inputs[0].data, short.inputs[0].data)
    assert long.inputs[0].data.dtype == short.inputs[0].data.dtype


ZEROS = "0," * 300
BROKEN = {
    "a comma at the end": f"[{ZEROS}]",
    "two commas": f"[{ZEROS},0]",
    "a comma at the beginning": f"[,{ZEROS}0]",
    "no number": f"[{ZEROS}0x]",
    "a number of another kind": f"[{ZEROS}0.5]",
    "a text": f'[{ZEROS}"0"]',
    "null": f"[{ZEROS}null]",
    "one too many": f"[{ZEROS}0,0]",
    "an array among numbers": f"[{ZEROS}[0]]",
    "numbers among arrays": "[" + "[0]," * 300 + "0]",
    "arrays that are too long": "[" + "[0]," * 299 + "[0,0]]",
    "an array too deep": "[" + "[0]," * 300 + "[[0]]]",
    "brackets that do not match": f"[{ZEROS}0]]",
    "an array that does not end": f"[{ZEROS}0",
    "an object": f"[{ZEROS}{{}}]",
    "something behind the row": "[" + "[0]," * 300 + "[0] 1]",
    "a value that does not fit": f"[{ZEROS}300]",
    "blanks alone": "[" + " " * 600 + "]",
}


@pytest.mark.parametrize("data", BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize("shape", [(301,), (301, 1)])
def test_what_is_refused_in_one_piece_is_refused_in_many(data, shape, monkeypatch):
    text = json.dumps(body([], shape, "INT8")).replace("[]", data).encode()
    long, short = both(text, monkeypatch)
    assert isinstance(long, ProtocolError), long
    assert isinstance(short, ProtocolError), short
    assert "\n" not in str(long)
    assert len(str(long)) < 400


def test_a_text_that_looks_like_long_data_is_text(monkeypatch):
    text = json.dumps(body([1.0], (1, 1), parameters={"key": '"data": [' + ZEROS + "0]"})).encode()
    long, short = both(text, monkeypatch)
    assert long.parameters == short.parameters
    assert np.array_equal(long.inputs[0].data, [[1.0]])


def test_nobody_can_name_the_mark_of_long_data(short_pieces):
    told = body([0.0] * 600, (600, 1))
    told["inputs"].insert(0, {"name": "y", "shape": [1, 1], "datatype": "FP32", "data": "numbers 0"})
    with pytest.raises(ProtocolError, match="data must be an array"):
        protocol.decode_request(json.dumps(told).encode())


def test_long_json_that_is_not_numbers_is_refused_before_it_is_read():
    words = json.dumps({"inputs": [], "parameters": {str(i): "a" * 90 for i in range(20_000)}}).encode()
    with pytest.raises(ProtocolError, match="bytes of JSON, expected at most"):
        protocol.decode_request(words)
    with pytest.raises(ProtocolError, match="bytes of JSON, expected at most"):
        protocol.decode_request(b'{"inputs":' + b"[{}," * (1 << 20))


def test_an_answer_in_pieces_is_the_same_json(monkeypatch):
    outputs = [protocol.Tensor("probabilities", "FP32", (40, 15), ROWS.reshape(40, 15).astype(np.float32))]
    outputs.append(protocol.Tensor("label", "BYTES", (600,), [b'{"data":null}'] * 600))
    answer = protocol.InferAnswer("m", "1", '{"data":null}', outputs)
    asked = protocol.InferRequest(())
    whole = json.loads(protocol.encode_answer(answer, asked)[0])
    monkeypatch.setattr(protocol, "PIECE_VALUES", 7)
    assert json.loads(protocol.encode_answer(answer, asked)[0]) == whole
