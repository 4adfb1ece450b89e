"""Everything that turns a stranger's bytes into something: one function for each kind, which may raise nothing."""

import tempfile
from contextlib import suppress
from pathlib import Path

import numpy as np
from google.protobuf.message import DecodeError

from streams.batch import BatchRejected
from streams.formats import read
from streams.npy import read_header
from streams.reading import Limits, Reading
from supsupd.config import ConfigError, load_settings
from supsupd.sections import ServingSettings
from supsupd.serving.access import Access, Unauthenticated
from supsupd.serving.grpc.codec import decode_request as decode_message
from supsupd.serving.grpc.messages import MESSAGE
from supsupd.serving.oip.outputs import wanted_outputs
from supsupd.serving.oip.protocol import (
    InferRequest,
    ProtocolError,
    decode_raw,
    decode_request,
    question_of,
    timeout_of,
)
from supsupd.serving.oip.tensors import from_raw, to_raw
from supsupd.tokens import Tokens

FOLDER = Path(tempfile.mkdtemp(prefix="supsupd-fuzz-"))
READING = Reading(Limits(bytes=1 << 20), with_task=True)


def _ask(request: InferRequest):
    """What is done with a decoded request before the engine has it; raw tensors come back as they were."""
    for tensor in request.inputs:
        raw = to_raw(tensor)
        again = to_raw(from_raw(tensor.name, tensor.datatype, tensor.shape, raw))
        assert again == raw, f"{tensor.datatype} changes on its way"
    wanted_outputs(request.outputs)
    timeout_of(request)
    assert np.isfinite(question_of(request).x).all()


def infer_json(data):
    with suppress(ProtocolError):
        _ask(decode_request(data))


def infer_binary(data):
    """The first two bytes say how many of the others are JSON."""
    with suppress(ProtocolError):
        _ask(decode_request(data[2:], int.from_bytes(data[:2], "little")))


def infer_raw(data):
    """One row of eight and nothing else."""
    with suppress(ProtocolError):
        _ask(decode_raw(data, (8,)))


def infer_grpc(data):
    with suppress(DecodeError, ProtocolError):
        _ask(decode_message(MESSAGE["ModelInferRequest"].FromString(data), 1.0))


def npy_header(data):
    with suppress(BatchRejected):
        header = read_header(data, "x")
        assert header.claimed >= 0


def npy(data):
    with suppress(BatchRejected):
        read(data, "npy", READING)


def npz(data):
    with suppress(BatchRejected):
        read(data, "npz", READING)


class _TokenHeader:
    """Of all values there are, one lets somebody in."""

    def __init__(self):
        tokens = Tokens(FOLDER)
        self.text = f"Bearer {tokens.create('admin')[1]}"
        self.access = Access(ServingSettings, tokens)

    def __call__(self, data):
        header = data.decode("latin-1")
        with suppress(Unauthenticated):
            self.access.caller_of_token(header)
            assert header == self.text, "a wrong token is let in"


def config(data):
    file = FOLDER / "config.toml"
    file.write_bytes(data)
    with suppress(ConfigError):
        load_settings({"watch": [str(FOLDER)]}, file)


DECODERS = {
    "infer_json": infer_json,
    "infer_binary": infer_binary,
    "infer_raw": infer_raw,
    "infer_grpc": infer_grpc,
    "npy_header": npy_header,
    "npy": npy,
    "npz": npz,
    "token_header": _TokenHeader(),
    "config": config,
}
