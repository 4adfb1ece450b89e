"""Every call of an unmodified tritonclient.http, waiting and awaited, in a process of its own: HOST:PORT TOKEN.

Over `tiny_engine` with two tasks. What is not as it should be is an exception.
"""

import asyncio
import inspect
import sys
from functools import partial

import numpy as np
import tritonclient.http as triton
import tritonclient.http.aio as triton_aio
from triton_calls import DATATYPES, LABELS, OUTPUTS, ROWS, Recorded, check_outputs, refused, texts

EXTENSIONS = {"binary_tensor_data", "classification", "model_repository", "statistics", "parameters"}
MANY = 5000  # rows whose answer is worth compressing


class Bearer(triton.InferenceServerClientPlugin):
    """Sends a token with every call."""

    def __init__(self, token):
        self.token = token

    def __call__(self, request):
        request.headers["authorization"] = f"Bearer {self.token}"


async def got(answer):
    """What a call gives, waited for where it has to be."""
    return await answer if inspect.isawaitable(answer) else answer


def rows(datatype="FP32", values=ROWS, raw=True):
    tensor = triton.InferInput("x", list(values.shape), datatype)
    tensor.set_data_from_numpy(values.astype(DATATYPES[datatype]), binary_data=raw)
    return [tensor]


def outputs(*names, raw=True, classes=0):
    return [triton.InferRequestedOutput(name, binary_data=raw, class_count=classes) for name in names]


def check(result, request_id=None, model="supsup", version="1"):
    response = result.get_response()
    assert (response["model_name"], response["model_version"]) == (model, version)
    assert response.get("id") == request_id
    assert [output["name"] for output in response["outputs"]] == OUTPUTS
    return check_outputs(result)


async def look(client):
    assert await got(client.is_server_live())
    assert await got(client.is_server_ready())
    for name, version, ready in [("supsup", "", True), ("supsup", "1", True), ("task-2", "3", True)]:
        assert await got(client.is_model_ready(name, version)) is ready
    for name, version in [("supsup", "2"), ("task-2", "1"), ("task-99", ""), ("a b/c", "1"), ("%2e%2e", "")]:
        assert not await got(client.is_model_ready(name, version))
    server = await got(client.get_server_metadata())
    assert server["name"] == "supsupd"
    assert set(server["extensions"]) >= EXTENSIONS
    for name, version in [("supsup", "1"), ("task-2", "3")]:
        model = await got(client.get_model_metadata(name))
        assert (model["name"], model["versions"]) == (name, [version])
        assert model["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 4]}]
        assert [output["name"] for output in model["outputs"]] == OUTPUTS
        config = await got(client.get_model_config(name, version))
        assert (config["name"], config["input"][0]["dims"]) == (name, [4])
        assert [output["name"] for output in config["output"]] == OUTPUTS


async def infer(client):
    plain = check(await got(client.infer("supsup", rows())))
    for datatype in DATATYPES:
        for raw in (True, False) if datatype != "BF16" else (True,):
            result = await got(client.infer("supsup", rows(datatype, raw=raw), request_id="r-1"))
            assert np.array_equal(check(result, "r-1"), plain)
    for raw_input in (True, False):
        for raw_output in (True, False):
            asked = outputs(*OUTPUTS, raw=raw_output)
            result = await got(client.infer("supsup", rows(raw=raw_input), outputs=asked))
            assert np.array_equal(check(result), plain)
            sizes = ["binary_data_size" in o.get("parameters", {}) for o in result.get_response()["outputs"]]
            assert sizes == [raw_output] * 5
    mixed = [*outputs("known", raw=False), *outputs("label"), *outputs("task", raw=False)]
    answer = await got(client.infer("supsup", rows(), outputs=mixed))
    assert [output["name"] for output in answer.get_response()["outputs"]] == ["known", "label", "task"]
    assert set(answer.as_numpy("label")) <= set(LABELS)
    each = {"per_sample": True, "priority_class": "ours"}
    assert (await got(client.infer("supsup", rows(), parameters=each))).as_numpy("task").shape == (3,)
    triton_words = {"sequence_id": 7, "sequence_start": True, "sequence_end": True, "priority": 3, "timeout": 10**7}
    assert np.array_equal(check(await got(client.infer("supsup", rows(), **triton_words))), plain)
    under_two = check(await got(client.infer("task-2", rows(), "3")), model="task-2", version="3")
    told = check(await got(client.infer("supsup", rows(), parameters={"task": 2})))
    assert np.array_equal(under_two, told)


async def classify(client):
    p = check(await got(client.infer("supsup", rows())))
    for raw in (True, False):
        asked = outputs("probabilities", raw=raw, classes=2)
        told = (await got(client.infer("supsup", rows(), outputs=asked))).as_numpy("probabilities")
        assert told.shape == (3, 2)
        for row, words in zip(p, told, strict=True):
            first, second = np.argsort(-row)[:2]
            wanted = [f"{row[place]:f}:{place}:{LABELS[place].decode()}" for place in (first, second)]
            assert texts(words) == wanted


async def compress(client):
    plain = check(await got(client.infer("supsup", rows())))
    for coding in ("gzip", "deflate"):
        both = {"request_compression_algorithm": coding, "response_compression_algorithm": coding}
        assert np.array_equal(check(await got(client.infer("supsup", rows(), **both))), plain)
        many = rows(values=np.tile(ROWS[:1], (MANY, 1)))
        for raw in (True, False):
            result = await got(client.infer("supsup", many, outputs=outputs("probabilities", raw=raw), **both))
            assert np.allclose(result.as_numpy("probabilities"), plain[:1])


async def configure(client):
    async def states():
        index = await got(client.get_model_repository_index())
        return {(model["name"], model["version"]): model["state"] for model in index}

    before = await states()
    assert before["supsup", "1"] == before["task-2", "3"] == "READY"
    assert before["task-2", "2"] == "UNAVAILABLE"
    await got(client.unload_model("task-1"))
    await got(client.unload_model("task-1"))
    assert not await got(client.is_model_ready("task-1"))
    with refused("503", "task 1 is retired; load task-1 to take it into use again"):
        await got(client.infer("task-1", rows()))
    await got(client.load_model("task-1"))
    await got(client.load_model("task-1", config='{"version_policy": {"specific": {"versions": [1]}}}'))
    assert await got(client.is_model_ready("task-1", "4"))
    await got(client.load_model("supsup"))
    counted = (await got(client.get_inference_statistics("supsup")))["model_stats"][0]
    assert counted["inference_count"] > counted["execution_count"] > 0
    assert counted["inference_stats"]["success"]["ns"] > 0
    everything = await got(client.get_inference_statistics())
    assert [model["name"] for model in everything["model_stats"]] == ["supsup", "task-1", "task-2"]
    settings = await got(client.get_log_settings())
    changed = await got(client.update_log_settings({"log_verbose_level": 1}))
    assert changed == settings | {"log_verbose_level": 1, "log_info": True}
    back = {name: settings[name] for name in ("log_verbose_level", "log_info")}
    assert await got(client.update_log_settings(back)) == settings


async def refuse(client):
    ones = np.ones((2, 5))
    asked = [
        ("404", "unknown_model", {"model_name": "etc/passwd"}),
        ("404", "unknown_model: there is no model task-99", {"model_name": "task-99"}),
        ("404", "unknown_model: model supsup has no version 7", {"model_version": "7"}),
        ("404", "unknown_model: model task-2 has no version 9", {"model_name": "task-2", "model_version": "9"}),
        ("503", "not_loaded: version 3 of task-2 is served", {"model_name": "task-2", "model_version": "2"}),
        ("400", "expected rows of 4", {"inputs": rows(values=ones)}),
        ("400", "non_finite", {"inputs": rows(values=np.full((1, 4), np.nan))}),
        ("400", "bad_request", {"outputs": outputs("nothing")}),
        ("400", "bad_request: method", {"parameters": {"method": "guess"}}),
        ("404", "there is no task 99", {"parameters": {"task": 99}}),
    ]
    for status, words, changes in asked:
        with refused(status, words):
            await got(client.infer(**{"model_name": "supsup", "inputs": rows(), **changes}))
    words = triton.InferInput("x", [1, 2], "BYTES")
    words.set_data_from_numpy(np.array([["a", "b"]], dtype=object))
    with refused("400", "bad_datatype"):
        await got(client.infer("supsup", [words]))
    with refused("400", "can't be unloaded"):
        await got(client.unload_model("supsup"))
    with refused("501", "files are not loaded"):
        await got(client.load_model("task-1", config="{}", files={"file:1/model.onnx": b"bytes"}))


async def refuse_what_is_not_served(client):
    shared = rows()
    shared[0].set_shared_memory("region", 48)
    calls = [
        partial(client.infer, "supsup", shared),
        client.get_trace_settings,
        partial(client.get_trace_settings, "supsup"),
        partial(client.update_trace_settings, settings={"trace_level": ["TIMESTAMPS"]}),
        client.get_system_shared_memory_status,
        partial(client.get_system_shared_memory_status, "region"),
        partial(client.register_system_shared_memory, "region", "/region", 64),
        client.unregister_system_shared_memory,
        partial(client.unregister_system_shared_memory, "region"),
        client.get_cuda_shared_memory_status,
        partial(client.register_cuda_shared_memory, "region", b"handle", 0, 64),
        client.unregister_cuda_shared_memory,
    ]
    for call in calls:
        with refused("501", "extension_not_supported"):
            await got(call())


async def call_all(client):
    for calls in (look, infer, classify, compress, configure, refuse, refuse_what_is_not_served):
        await calls(client)


def call_beside(client):
    """What only the waiting client has: many at once, and bodies made and read without it."""
    asked = [client.async_infer("supsup", rows(), request_id=str(i)) for i in range(20)]
    answers = [check(waiting.get_result(), str(i)) for i, waiting in enumerate(asked)]
    assert all(np.array_equal(answer, answers[0]) for answer in answers)
    with refused("404", "unknown_model"):
        client.async_infer("nothing", rows()).get_result()
    body, json_bytes = client.generate_request_body(rows(), request_id="r-2")
    assert json_bytes < len(body)
    assert client.parse_response_body(b'{"model_name": "supsup", "outputs": []}').get_response()["outputs"] == []


def waiting(url, token):
    client = Recorded(triton.InferenceServerClient(url, concurrency=4))
    client.register_plugin(Bearer(token))
    assert client.plugin() is not None
    asyncio.run(call_all(client))
    call_beside(client)
    client.unregister_plugin()
    with refused("401", "unauthenticated"):
        client.get_server_metadata()
    with refused("403", "forbidden"):
        client.get_server_metadata(headers={"Host": "evil.example"})
    client.close()
    client.assert_complete()


async def awaited(url, token):
    client = Recorded(triton_aio.InferenceServerClient(url))
    client.register_plugin(Bearer(token))
    assert client.plugin() is not None
    await call_all(client)
    client.unregister_plugin()
    headers = {"Authorization": f"Bearer {token}"}
    checked = await asyncio.gather(*(client.infer("supsup", rows(), headers=headers) for _ in range(20)))
    assert len({check(result).tobytes() for result in checked}) == 1
    client.generate_request_body(rows())
    client.parse_response_body(b'{"model_name": "supsup", "outputs": []}')
    await client.close()
    client.assert_complete()


if __name__ == "__main__":
    form, *where = sys.argv[1:]
    if form == "waiting":
        waiting(*where)
    else:
        asyncio.run(awaited(*where))
