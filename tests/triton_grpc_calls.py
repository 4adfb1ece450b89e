"""Every call of an unmodified tritonclient.grpc, waiting and awaited, in a process of its own: URL [TOKEN [CA]].

Over `tiny_engine` with the labels a, b and c; it is left as it was. What is not as it should be is an exception.
"""

import asyncio
import queue
import sys

import numpy as np
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
from triton_calls import DATATYPES, OUTPUTS, ROWS, Recorded, check_outputs, refused

ABSENT = "StatusCode.UNIMPLEMENTED"


class Bearer(triton.InferenceServerClientPlugin):
    """Sends a token with every call."""

    def __init__(self, token):
        self.token = token

    def __call__(self, request):
        request.headers["authorization"] = f"Bearer {self.token}"


def rows(datatype="FP32", values=ROWS):
    tensor = triton.InferInput("x", list(values.shape), datatype)
    tensor.set_data_from_numpy(values.astype(DATATYPES[datatype]))
    return [tensor]


def outputs(*names, classes=0):
    return [triton.InferRequestedOutput(name, class_count=classes) for name in names]


def check(result, request_id="", model="supsup"):
    """An answer of all outputs for ROWS, in itself right."""
    response = result.get_response()
    assert (response.model_name, response.id) == (model, request_id)
    assert [output.name for output in response.outputs] == OUTPUTS
    return check_outputs(result)


ASK = {"model_name": "supsup", "inputs": rows()}
REFUSED = [
    ("StatusCode.NOT_FOUND", "unknown_model", {"model_name": "../../etc/passwd"}),
    ("StatusCode.NOT_FOUND", "unknown_model", {"model_name": "task-99"}),
    ("StatusCode.NOT_FOUND", "unknown_model", {"model_version": "7"}),
    ("StatusCode.INVALID_ARGUMENT", "bad_shape", {"inputs": rows(values=np.ones((2, 5)))}),
    ("StatusCode.INVALID_ARGUMENT", "non_finite", {"inputs": rows(values=np.full((1, 4), np.nan))}),
    ("StatusCode.INVALID_ARGUMENT", "bad_request", {"outputs": outputs("nothing")}),
    ("StatusCode.INVALID_ARGUMENT", "bad_request", {"parameters": {"method": "guess"}}),
]


# -- waiting ----------------------------------------------------------------------------------------------------------


def call_all(client):
    look(client)
    configure(client)
    infer(client)
    infer_beside(client)
    infer_in_a_stream(client)
    refuse_memory(client)


def look(client):
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("supsup")
    assert client.is_model_ready("task-1", "3")
    assert not client.is_model_ready("task-1", "2")
    with refused("StatusCode.NOT_FOUND", "unknown_model"):
        client.is_model_ready("nobody")
    server = client.get_server_metadata(as_json=True)
    assert (server["name"], "classification" in server["extensions"]) == ("supsupd", True)
    model = client.get_model_metadata("supsup")
    assert [(i.name, i.datatype, list(i.shape)) for i in model.inputs] == [("x", "FP32", [-1, 4])]
    assert model.outputs[0].datatype == "BYTES"
    config = client.get_model_config("task-2").config
    assert (config.name, list(config.version_policy.specific.versions)) == ("task-2", [3])
    assert [output.name for output in config.output] == [output.name for output in model.outputs]


def configure(client):
    index = client.get_model_repository_index().models
    assert ("task-2", "3", "READY", "") in [(m.name, m.version, m.state, m.reason) for m in index]
    client.unload_model("task-2")
    assert not client.is_model_ready("task-2")
    client.load_model("task-2")
    assert client.is_model_ready("task-2")
    with refused(ABSENT, "extension_not_supported"):
        client.load_model("task-2", config="{}", files={"file:1/model": b"bits"})
    level = client.get_log_settings(as_json=True)["settings"]["log_verbose_level"].get("uint32_param", 0)
    changed = client.update_log_settings({"log_verbose_level": 1 - level})
    assert changed.settings["log_verbose_level"].uint32_param == 1 - level
    client.update_log_settings({"log_verbose_level": level})
    with refused("StatusCode.INVALID_ARGUMENT", "log_file"):
        client.update_log_settings({"log_file": "/tmp/log"})


def infer(client):
    p = check(client.infer(**ASK, request_id="7"), "7")
    for datatype in DATATYPES:
        assert (check(client.infer("supsup", rows(datatype))) == p).all(), datatype
    for compression in ("gzip", "deflate"):
        assert (check(client.infer(**ASK, compression_algorithm=compression)) == p).all()
    told = client.infer(**ASK, outputs=outputs("probabilities", classes=2)).as_numpy("probabilities")
    assert told.shape == (3, 2)
    assert told[0, 0] == f"{p[0].max():f}:{p[0].argmax()}:{'abc'[p[0].argmax()]}".encode()
    two = client.infer(**ASK, outputs=outputs("known", "label")).get_response()
    assert [output.name for output in two.outputs] == ["known", "label"]
    check(client.infer("task-1", rows(), "3"), model="task-1")
    check(client.infer(**ASK, timeout=5_000_000, priority=1, sequence_id="s", sequence_start=True, client_timeout=20))
    given = client.infer(**ASK, parameters={"task": 2, "per_sample": True, "own": 0.5}).as_numpy("task")
    assert given.tolist() == [2, 2, 2]
    for status, words, wrong in REFUSED:
        with refused(status, words):
            client.infer(**{**ASK, **wrong})
    mine = {m.name: m for m in client.get_inference_statistics("supsup").model_stats}["supsup"]
    assert mine.inference_count >= 3 * len(DATATYPES)
    assert mine.inference_stats.success.count >= mine.inference_stats.fail.count > 0
    assert len(client.get_inference_statistics().model_stats) == 3


def infer_beside(client):
    """What is asked without waiting."""
    answers = queue.Queue()
    for number in range(20):
        client.async_infer(**ASK, callback=lambda result, error: answers.put((result, error)), request_id=str(number))
    assert {found[0].get_response().id for found in take(answers, 20)} == {str(number) for number in range(20)}
    client.async_infer("nobody", rows(), lambda result, error: answers.put((result, error)))
    (_, error), *_ = take(answers, 1)
    assert "unknown_model" in error.message()


def infer_in_a_stream(client):
    answers = queue.Queue()
    client.start_stream(lambda result, error: answers.put((result, error)))
    for number in range(50):
        client.async_stream_infer(**ASK, request_id=str(number))
    client.async_stream_infer("nobody", rows())
    client.async_stream_infer(**ASK, request_id="after")
    *good, (_, error), (last, _) = take(answers, 52)
    assert [result.get_response().id for result, _ in good] == [str(number) for number in range(50)]
    assert "unknown_model" in error.message()
    check(last, "after")
    assert last.get_response().parameters["triton_final_response"].bool_param
    client.stop_stream()


def take(answers, count):
    return [answers.get(timeout=30) for _ in range(count)]


def refuse_memory(client):
    for call in (
        client.get_system_shared_memory_status,
        lambda: client.register_system_shared_memory("m", "/m", 64),
        client.unregister_system_shared_memory,
        client.get_cuda_shared_memory_status,
        lambda: client.register_cuda_shared_memory("m", b"AAAA", 0, 64),
        client.unregister_cuda_shared_memory,
        client.get_trace_settings,
        lambda: client.update_trace_settings(settings={"trace_rate": "1"}),
    ):
        with refused(ABSENT, "extension_not_supported"):
            call()


# -- awaited ----------------------------------------------------------------------------------------------------------


class Waited:
    """The awaited client's methods, waited for: what is asked of the other one can be asked of it."""

    def __init__(self, client, loop):
        self.client = client
        self.loop = loop

    def __dir__(self):
        return dir(self.client)

    def __getattr__(self, name):
        found = getattr(self.client, name)
        if not asyncio.iscoroutinefunction(found):
            return found
        return lambda *args, **more: self.loop.run_until_complete(found(*args, **more))


async def together(client):
    results = await asyncio.gather(*[client.infer(**ASK, request_id=str(number)) for number in range(20)])
    for number, result in enumerate(results):
        check(result, str(number))


async def in_a_stream(client):
    async def requests():
        for number in range(20):
            yield {**ASK, "request_id": str(number)}
        yield {**ASK, "model_name": "nobody"}

    found = [answer async for answer in client.stream_infer(requests())]
    assert [result.get_response().id for result, _ in found[:-1]] == [str(number) for number in range(20)]
    assert "unknown_model" in found[-1][1].message()


def main(url, token=None, ca=None):
    tls = {} if ca is None else {"ssl": True, "root_certificates": ca}
    bearer = Bearer(token)
    client = Recorded(triton.InferenceServerClient(url, **tls))
    client.register_plugin(bearer)
    assert client.plugin() is bearer
    call_all(client)
    client.unregister_plugin()
    client.close()
    client.assert_complete()
    with asyncio.Runner() as runner:
        loop = runner.get_loop()
        asyncio.set_event_loop(loop)
        awaited = triton_aio.InferenceServerClient(url, **tls)
        client = Recorded(Waited(awaited, loop))
        client.register_plugin(bearer)
        assert client.plugin() is bearer
        for calls in (look, configure, infer, refuse_memory):
            calls(client)
        loop.run_until_complete(together(awaited))
        client.called.add("stream_infer")
        loop.run_until_complete(in_a_stream(awaited))
        client.unregister_plugin()
        client.close()
        client.assert_complete()


if __name__ == "__main__":
    main(*sys.argv[1:])
