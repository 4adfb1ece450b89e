import re
import subprocess
import sys
from pathlib import Path

import grpc
import pytest
import tritonclient.grpc.model_config_pb2 as triton_config
import tritonclient.grpc.service_pb2 as triton_service
from certificates import Authority
from daemon_process import until
from grpc_served import PLAIN, SERVICE, TCP, Caller, Served, infer_request, refused
from structlog.testing import capture_logs
from tiny_engine import TinyEngine

from supsupd.sections import ServerTlsSettings
from supsupd.serving.grpc.codec import TYPED
from supsupd.serving.grpc.messages import DATA_TYPES, MESSAGE

CALLS = Path(__file__).with_name("triton_grpc_calls.py")
Code = grpc.StatusCode


@pytest.fixture
def engine():
    return TinyEngine(labels=("a", "b", "c"))


@pytest.fixture
def served(engine, tmp_path):
    with Served(engine, tmp_path / "grpc.sock") as served:
        yield served


@pytest.fixture
def call(served):
    with Caller(*served.targets()) as call:
        yield call


# -- the unmodified client --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["unix", "tcp", "tls"])
def test_every_call_of_tritonclient_works(way, engine, tmp_path):
    authority = Authority(tmp_path)
    issued = authority.issue()
    tls = ServerTlsSettings(certificate=issued.certificate, key=issued.key) if way == "tls" else PLAIN
    address = tmp_path / "grpc.sock" if way == "unix" else TCP
    with Served(engine, address, state=tmp_path / "state", tls=tls) as served:
        arguments = [
            *served.targets(),
            served.tokens.create("admin")[1],
            *([authority.certificate] if way == "tls" else []),
        ]
        result = subprocess.run([sys.executable, CALLS, *arguments], capture_output=True, text=True, timeout=180)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("ours_first", [True, False])
def test_our_messages_and_tritons_live_in_one_process(ours_first):
    imports = ["import supsupd.serving.grpc.server", "import tritonclient.grpc"]
    program = "\n".join(imports if ours_first else imports[::-1])
    subprocess.run([sys.executable, "-c", program], check=True, timeout=180)


def test_all_fields_have_tritons_numbers_and_types():
    theirs = triton_service.DESCRIPTOR.services_by_name["GRPCInferenceService"]
    compared = set()
    for method in theirs.methods:
        for message in (method.input_type, method.output_type):
            if message.name in MESSAGE:
                compare_fields(MESSAGE[message.name].DESCRIPTOR, message, compared)
    assert {message.DESCRIPTOR for message in MESSAGE.values()} <= compared
    numbers = triton_config.DataType.DESCRIPTOR.values_by_name
    assert {name: numbers[name].number for name in DATA_TYPES} == {n: i for i, n in enumerate(DATA_TYPES)}


def compare_fields(ours, theirs, compared):
    compared.add(ours)
    for field in ours.fields:
        other = theirs.fields_by_name[field.name]
        assert (field.number, field.type, field.is_repeated) == (other.number, other.type, other.is_repeated), field
        if field.message_type is not None and field.message_type not in compared:
            compare_fields(field.message_type, other.message_type, compared)


# -- what is asked and answered ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("datatype", [name for name in TYPED if name != "BYTES"])
def test_typed_contents_are_answered_as_raw_ones(datatype, call):
    raw = call("ModelInfer", infer_request(datatype=datatype))
    typed = call("ModelInfer", infer_request(datatype=datatype, typed=True))
    assert typed == raw
    assert len(raw.raw_output_contents) == len(raw.outputs) == 5


def both(request):
    request.inputs[0].contents.fp32_contents.extend([0.0] * 12)


def one_raw_too_many(request):
    request.raw_input_contents.append(b"")


def raw_too_short(request):
    request.raw_input_contents[0] = request.raw_input_contents[0][:-1]


def half_typed(request):
    request.ClearField("raw_input_contents")
    request.inputs[0].datatype = "FP16"


def text(request):
    request.ClearField("raw_input_contents")
    request.inputs[0].datatype = "BYTES"
    request.inputs[0].contents.bytes_contents.extend([b"a"] * 12)


def unknown_type(request):
    request.inputs[0].datatype = "FP8"


def endless(request):
    request.inputs[0].shape[:] = [2**62, 4]


def negative(request):
    request.inputs[0].shape[:] = [-3, 4]


def typed_in_the_wrong_field(request):
    request.ClearField("raw_input_contents")
    request.inputs[0].contents.fp64_contents.extend([0.0] * 12)


def empty_parameter(request):
    request.parameters["timeout"].Clear()


@pytest.mark.parametrize(
    ("spoil", "code"),
    [
        (both, "bad_request"),
        (one_raw_too_many, "bad_request"),
        (raw_too_short, "shape_mismatch"),
        (half_typed, "bad_datatype"),
        (text, "bad_datatype"),
        (unknown_type, "bad_datatype"),
        (endless, "shape_mismatch"),
        (negative, "shape_mismatch"),
        (typed_in_the_wrong_field, "shape_mismatch"),
        (empty_parameter, "bad_request"),
    ],
)
def test_a_spoilt_request_is_refused_in_one_line(spoil, code, call):
    request = infer_request()
    spoil(request)
    with refused(Code.INVALID_ARGUMENT, f"{code}: "):
        call("ModelInfer", request)
    assert call("ServerReady").ready


def test_bytes_that_are_no_message_are_refused(call):
    for method in ("ModelInfer", "ModelReady", "LogSettings", "RepositoryModelLoad"):
        with refused(Code.INVALID_ARGUMENT, "bad_request: expected a message"):
            call.raw(method, b"\xff" * 40)


def test_a_bug_is_told_to_nobody_but_the_log(call, engine):
    weights, engine.weights = engine.weights, "of another kind"
    told = "internal error; the daemon's log says more"
    with capture_logs() as lines:
        with refused(Code.INTERNAL, told):
            call("ModelInfer", infer_request())
        assert [answer.error_message for answer in call.stream([infer_request()])] == [told]
    crashes = [line["exc_info"] for line in lines if line["event"] == "call_crashed"]
    assert [type(crash).__name__ for crash in crashes] == ["UFuncTypeError"] * 2
    engine.weights = weights
    assert call("ModelInfer", infer_request()).outputs


def test_a_stream_goes_on_after_a_bad_request(call):
    requests = [infer_request(), infer_request(model="nobody"), MESSAGE["ModelInferRequest"](), infer_request()]
    said = [answer.error_message.partition(":")[0] for answer in call.stream(requests)]
    assert said == ["", "unknown_model", "unknown_model", ""]


def test_a_call_has_an_id_that_the_client_may_choose(call):
    method = call.channel.unary_unary(f"/{SERVICE}/ServerLive")
    for given, expected in (("night-7", "night-7"), ("a b", None)):
        _, done = method.with_call(b"", metadata=[("x-request-id", given)], timeout=20)
        (found,) = [value for key, value in done.trailing_metadata() if key == "x-request-id"]
        assert found == expected or (expected is None and found not in ("", given))


def test_calls_are_counted_by_method_and_code(call, served):
    call("ModelInfer", infer_request())
    with refused(Code.NOT_FOUND):
        call("ModelInfer", infer_request(model="nobody"))
    list(call.stream([infer_request()]))
    wanted = {("ModelInfer", "OK"): 1, ("ModelInfer", "NOT_FOUND"): 1, ("ModelStreamInfer", "OK"): 1}
    until(lambda: counted(served) == wanted)


def counted(served):
    told = served.front.metrics.render("text/plain")[0].decode()
    found = re.findall(r'supsupd_grpc_calls_total\{code="(\w+)",method="(\w+)"\} (\d+)', told)
    return {(method, code): int(count) for code, method, count in found}


def test_a_method_that_there_is_not_is_unimplemented(call):
    with refused(Code.UNIMPLEMENTED):
        call.raw("ModelGuess")
