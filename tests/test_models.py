"""Every task is a model, every version of its mask a version: what can be asked, loaded, unloaded and counted."""

import asyncio
import gzip
import json
import os
import socket
import zlib

import httpx
import numpy as np
import pytest
from asking import INFER, ask, infer, predicted
from tiny_engine import INPUTS, TinyEngine, port_of, serving

from supsupd.sections import ServingSettings
from supsupd.serving.access import Access
from supsupd.serving.engine import DeadlineExceeded
from supsupd.serving.front import Front
from supsupd.serving.oip.models import EXTENSIONS, LIGHT_TEXT, Models
from supsupd.serving.oip.protocol import InferRequest
from supsupd.serving.oip.tensors import Tensor
from supsupd.tokens import Tokens

ROW = [[1.0] * INPUTS]
ROWS = np.random.default_rng(1).normal(size=(5, INPUTS)).astype(np.float32)
LIMIT = 300_000
LOAD = "/v2/repository/models/{}/load"
UNLOAD = "/v2/repository/models/{}/unload"


@pytest.fixture
def engine():
    return TinyEngine()


@pytest.fixture
def served(engine, tmp_path):
    with serving(engine, tmp_path / "s", max_body_bytes=LIMIT):
        yield tmp_path / "s"


def error(response, status):
    """The text of an answer that must be an error and nothing else."""
    assert response.status_code == status, response.text
    assert list(response.json()) == ["error"]
    return response.json()["error"]


def request(x, **parameters):
    return InferRequest((Tensor("x", "FP32", x.shape, x),), parameters)


def columns(response):
    return {output["name"]: np.array(output["data"]).reshape(output["shape"]) for output in response.json()["outputs"]}


def states(path):
    index = ask(path, "POST", "/v2/repository/index").json()
    return {(entry["name"], entry["version"]): entry["state"] for entry in index}


def test_every_version_of_every_task_is_listed_and_the_served_ones_are_ready(served):
    assert states(served) == {("supsup", "1"): "READY"} | {
        (f"task-{task}", str(version)): "READY" if version == 3 else "UNAVAILABLE"
        for task in (1, 2)
        for version in (1, 2, 3)
    }
    ready = ask(served, "POST", "/v2/repository/index", json={"ready": True}).json()
    assert [(entry["name"], entry["version"], entry["reason"]) for entry in ready] == [
        ("supsup", "1", ""),
        ("task-1", "3", ""),
        ("task-2", "3", ""),
    ]
    index = ask(served, "POST", "/v2/repository/index").json()
    assert index[1]["reason"] == (
        "version 3 of task-1 is served; load it with the parameter version 1 to roll back to that"
    )


def test_a_tasks_model_answers_under_that_tasks_mask(served, engine):
    for url in ("/v2/models/task-2/infer", "/v2/models/task-2/versions/3/infer"):
        response = ask(served, "POST", url, json=infer(ROWS))
        assert (response.json()["model_name"], response.json()["model_version"]) == ("task-2", "3")
        wanted = predicted(engine, ROWS, 2)
        assert np.array_equal(columns(response)["probabilities"].astype(np.float32), wanted.probabilities)
        assert columns(response)["task"].tolist() == [2] * 5


@pytest.mark.parametrize(
    ("model", "status", "words"),
    [
        ("task-2/versions/1", 503, "not_loaded: version 3 of task-2 is served"),
        ("task-2/versions/4", 404, "unknown_model: model task-2 has no version 4"),
        ("task-3", 404, "unknown_model: there is no model task-3"),
        ("task-02", 404, "unknown_model: there is no model task-02"),
        ("supsup/versions/2", 404, "unknown_model: model supsup has no version 2"),
        ("supsup/versions/latest", 404, "unknown_model: a version is 1 to 18 digits"),
        ("supsup/versions/" + "9" * 5000, 404, "unknown_model: a version is 1 to 18 digits"),
    ],
)
def test_what_is_not_served_says_so_whatever_is_asked_of_it(served, model, status, words):
    asked = [("GET", ""), ("GET", "/ready"), ("GET", "/config"), ("GET", "/stats"), ("POST", "/infer")]
    for method, end in asked:
        response = ask(served, method, f"/v2/models/{model}{end}", json=infer(ROW))
        assert error(response, status).startswith(words)
        assert response.headers.get("retry-after") == ("1" if status == 503 else None)


NAMES = {
    "empty": "",
    "traversal": "../../etc/passwd",
    "encoded dots": "%2e%2e%2f%2e%2e%2fetc",
    "encoded twice": "%252e%252e%252f",
    "backslashes": "\\..\\..\\",
    "NUL": "supsup%00",
    "newline": "supsup%0a",
    "not UTF-8": "%ff%fe",
    "a space": "sup%20sup",
    "65 letters": "a" * 65,
    "5000 letters": "a" * 5000,
    "a URL": "http:%2F%2F169.254.169.254%2F",
    "arabic digits": "task-%D9%A1",
}


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES.keys())
def test_no_other_name_is_a_model_and_none_is_repeated(served, name):
    for line in (
        f"POST /v2/models/{name}/infer",
        f"GET /v2/models/{name}/ready",
        f"POST /v2/repository/models/{name}/load",
    ):
        with socket.socket(socket.AF_UNIX) as connection, connection.makefile("rb") as stream:
            connection.connect(str(served))
            connection.sendall(f"{line} HTTP/1.1\r\nHost: d\r\nConnection: close\r\nContent-Length: 0\r\n\r\n".encode())
            head, _, body = stream.read().partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 404 ")
        text = json.loads(body)["error"]
        assert text.startswith("unknown_model: ")
        assert len(text) < 120
        assert text.isprintable()


def test_unloading_retires_a_task_and_loading_takes_it_into_use_again(served, engine):
    for _ in range(2):  # again: it is so already
        assert ask(
            served, "POST", UNLOAD.format("task-2"), json={"parameters": {"unload_dependents": False}}
        ).is_success
        assert engine.retired == {2}
    assert engine.asked_by.endswith(f"({os.getuid()})")
    assert states(served)["task-2", "3"] == "UNAVAILABLE"
    text = error(ask(served, "POST", "/v2/models/task-2/infer", json=infer(ROW)), 503)
    assert text == "not_loaded: task 2 is retired; load task-2 to take it into use again"
    for _ in range(2):
        assert ask(served, "POST", LOAD.format("task-2"), json={}).is_success
        assert engine.retired == set()
    assert ask(served, url="/v2/models/task-2/ready").json() == {"name": "task-2", "ready": True}


@pytest.mark.parametrize(
    "parameters",
    [
        {"version": 1},
        {"version": "1"},
        {"config": '{"name": "task-2", "version_policy": {"specific": {"versions": [1]}}}'},
        {"config": '{"version_policy": {"specific": {"versions": ["1"]}}}'},
    ],
)
def test_loading_a_version_rolls_back_to_it_and_serves_it_as_the_newest(served, engine, parameters):
    engine.retired = {2}
    assert ask(served, "POST", LOAD.format("task-2"), json={"parameters": parameters}).is_success
    assert (engine.versions[2], engine.retired) == ([1, 2, 3, 4], set())
    assert ask(served, url="/v2/models/task-2").json()["versions"] == ["4"]
    assert states(served)["task-2", "3"] == "UNAVAILABLE"


@pytest.mark.parametrize(
    "parameters",
    [
        {},
        {"version": 3},
        {"config": "{}"},
        {"config": '{"version_policy": {"latest": {"num_versions": 1}}, "max_batch_size": 4}'},
        {"mine": 1},
    ],
)
def test_loading_what_is_served_changes_nothing(served, engine, parameters):
    assert ask(served, "POST", LOAD.format("task-2"), json={"parameters": parameters}).is_success
    assert engine.versions[2] == [1, 2, 3]
    assert ask(served, "POST", LOAD.format("supsup")).is_success


@pytest.mark.parametrize(
    ("status", "words", "parameters"),
    [
        (404, "unknown_model: model task-2 has no version 9", {"version": 9}),
        (400, "bad_request: version", {"version": -1}),
        (400, "bad_request: version", {"version": 1.0}),
        (400, "bad_request: version", {"version": "9" * 99}),
        (400, "bad_request: one version", {"config": '{"version_policy": {"specific": {"versions": [1, 2]}}}'}),
        (400, "bad_json", {"config": "{"}),
        (400, "bad_request: config", {"config": {}}),
        (400, "bad_request: version_policy", {"config": '{"version_policy": 1}'}),
        (501, "extension_not_supported", {"file:1/model.pt": "aGVsbG8="}),
    ],
)
def test_a_load_that_makes_no_sense_changes_nothing(served, engine, status, words, parameters):
    engine.retired = {2}
    assert error(ask(served, "POST", LOAD.format("task-2"), json={"parameters": parameters}), status).startswith(words)
    assert (engine.versions[2], engine.retired) == ([1, 2, 3], {2})


def test_the_model_of_all_tasks_stays(served):
    assert error(ask(served, "POST", UNLOAD.format("supsup")), 400).startswith("bad_request: supsup can't be unloaded")


@pytest.mark.parametrize("role", ["predict", "submit"])
def test_only_an_admin_changes_what_is_served(tmp_path, engine, role):
    tokens = Tokens(tmp_path)
    _, token = tokens.create(role)
    access = Access(ServingSettings, tokens, ["127.0.0.1"])
    with serving(engine, tmp_path / "s", tcp=True, access=access) as server:
        headers = {"Authorization": f"Bearer {token}"}
        with httpx.Client(base_url=f"http://127.0.0.1:{port_of(server)}", headers=headers) as client:
            for url in (LOAD.format("task-2"), UNLOAD.format("task-2"), "/v2/logging"):
                assert error(client.post(url, json={}), 403).startswith("forbidden: ")
            assert client.get("/v2/logging").is_success
            assert client.post("/v2/models/task-2/infer", json=infer(ROW)).is_success
    assert engine.retired == set()


def counted(path, url="/v2/models/stats"):
    return {stats["name"]: stats for stats in ask(path, url=url).json()["model_stats"]}


def test_requests_are_counted_by_model_and_unknown_names_are_not(served, engine):
    for _ in range(3):
        ask(served, "POST", INFER, json=infer(ROWS))
    ask(served, "POST", "/v2/models/task-1/infer", json=infer(ROW))
    ask(served, "POST", "/v2/models/task-1/infer", json=infer([[1.0] * 3]))
    for name in ("task-9", "task-1/versions/9", "gpt"):
        ask(served, "POST", f"/v2/models/{name}/infer", json=infer(ROW))
    stats = counted(served)
    assert list(stats) == ["supsup", "task-1", "task-2"]
    supsup, first, second = stats.values()
    assert (supsup["inference_count"], supsup["execution_count"], supsup["version"]) == (15, 3, "1")
    assert (first["inference_count"], second["inference_count"], first["version"]) == (1, 0, "3")
    stages = supsup["inference_stats"]
    assert [stages[name]["count"] for name in ("success", "fail", "queue", "compute_infer", "cache_hit")] == [
        3,
        0,
        3,
        3,
        0,
    ]
    parts = [stages[name]["ns"] for name in ("queue", "compute_input", "compute_infer", "compute_output")]
    assert all(part > 0 for part in parts)
    assert abs(stages["success"]["ns"] - sum(parts)) <= len(parts)
    assert supsup["batch_stats"][0]["batch_size"] == 5
    assert first["inference_stats"]["fail"]["count"] == 2  # the wrong width, and the version that never was
    assert counted(served, "/v2/models/task-1/stats")["task-1"] == first
    assert counted(served, "/v2/models/task-1/versions/3/stats")["task-1"] == first


def test_requests_that_are_answered_together_are_one_execution(engine):
    async def ask_all():
        models = Models(Front(engine, ServingSettings()))
        for together in (4, 1):
            await asyncio.gather(
                *(models.infer("supsup", "", request(ROWS), models.front.memory.holding()) for _ in range(together))
            )
        return (await models.statistics("supsup"))["model_stats"][0]

    supsup = asyncio.run(ask_all())
    assert (supsup["inference_count"], supsup["execution_count"]) == (25, 2)
    sizes = [(stats["batch_size"], stats["compute_infer"]["count"]) for stats in supsup["batch_stats"]]
    assert sizes == [(5, 1), (20, 1)]


def test_a_request_is_refused_when_its_own_time_is_over_before_its_turn(engine):
    engine.gate.clear()

    async def ask_two():
        models = Models(Front(engine, ServingSettings(parallel=1)))
        first = asyncio.create_task(models.infer("supsup", "", request(ROWS), models.front.memory.holding()))
        await asyncio.to_thread(engine.entered.wait, 10)
        second = asyncio.create_task(
            models.infer("supsup", "", request(ROWS, timeout=1), models.front.memory.holding())
        )
        await asyncio.sleep(0)
        engine.gate.set()
        with pytest.raises(DeadlineExceeded):
            await second
        assert (await first).model_name == "supsup"
        return (await models.statistics("supsup"))["model_stats"][0]["inference_stats"]

    stages = asyncio.run(ask_two())
    assert (stages["success"]["count"], stages["fail"]["count"]) == (1, 1)


def test_what_is_about_to_end_is_not_ready_and_its_models_still_answer(engine):
    front = Front(engine, ServingSettings())
    models = Models(front)
    assert models.is_server_ready()
    front.draining = True
    assert not models.is_server_ready()
    assert asyncio.run(models.infer("task-2", "", request(ROWS), models.front.memory.holding())).model_version == "3"
    assert asyncio.run(models.is_ready("supsup"))


def test_a_raw_body_alone_is_one_row(served, engine):
    headers = {"Inference-Header-Content-Length": "0"}
    response = ask(served, "POST", "/v2/models/task-2/infer", content=ROWS[:1].tobytes(), headers=headers)
    json_bytes = int(response.headers["inference-header-content-length"])
    told, raw = json.loads(response.content[:json_bytes]), response.content[json_bytes:]
    sizes = [output["parameters"]["binary_data_size"] for output in told["outputs"]]
    assert len(raw) == sum(sizes)
    p = np.frombuffer(raw[sizes[0] : sizes[0] + sizes[1]], np.float32)
    assert np.array_equal(p, predicted(engine, ROWS[:1], 2).probabilities[0])


@pytest.mark.parametrize("length", ["-1", "1e3", "", "+5", "9" * 30, "0x10"])
def test_a_length_that_is_no_number_of_bytes_is_refused(served, length):
    headers = {"Inference-Header-Content-Length": length}
    text = error(ask(served, "POST", INFER, json=infer(ROW), headers=headers), 400)
    assert text.startswith("bad_request: Inference-Header-Content-Length")


CODINGS = {"gzip": gzip.compress, "deflate": zlib.compress}


@pytest.mark.parametrize("coding", CODINGS)
def test_a_compressed_request_is_unpacked_under_the_limit_of_bodies(served, coding):
    def post(raw, **headers):
        return ask(served, "POST", INFER, content=raw, headers={"Content-Encoding": coding, **headers})

    packed = CODINGS[coding](json.dumps(infer(ROWS)).encode())
    assert post(packed).json()["outputs"] == ask(served, "POST", INFER, json=infer(ROWS)).json()["outputs"]
    assert "larger than 300000 bytes" in error(post(CODINGS[coding](b"[" * (100 * LIMIT))), 413)
    for broken in (packed[:-1], packed + b"more", b"", b"\x1f\x8b", os.urandom(64)):
        assert error(post(broken), 400).startswith("bad_request: the body is not")


@pytest.mark.parametrize("coding", ["br", "zstd", "compress", "gzip, gzip", "x" * 4000])
def test_another_coding_is_refused(served, coding):
    response = ask(served, "POST", INFER, json=infer(ROW), headers={"Content-Encoding": coding})
    assert len(error(response, 415)) < 100


@pytest.mark.parametrize(
    ("accepted", "coding"),
    [
        ("gzip", "gzip"),
        ("deflate", "deflate"),
        ("br;q=1, GZIP;q=0.5", "gzip"),
        ("gzip;q=0, deflate", "deflate"),
        ("br, zstd, *", None),
        ("gzip; q=0.000", None),
        ("", None),
    ],
)
def test_only_long_answers_of_infer_over_tcp_are_compressed_and_only_as_asked(engine, tmp_path, accepted, coding):
    def many(rows):
        return infer(np.ones((rows, INPUTS), np.uint8), outputs=[{"name": "task"}])

    tokens = Tokens(tmp_path)
    headers = {"Accept-Encoding": accepted, "Authorization": f"Bearer {tokens.create('predict')[1]}"}
    access = Access(ServingSettings, tokens, ["127.0.0.1"])
    short, long = many(LIGHT_TEXT // 16), many(LIGHT_TEXT // 7)  # an answer has 8 bytes for each row
    with serving(engine, tmp_path / "s", tcp=True, access=access) as server:
        with httpx.Client(base_url=f"http://127.0.0.1:{port_of(server)}", headers=headers) as client:
            response = client.post(INFER, json=long)
            assert response.headers.get("content-encoding") == coding
            assert len(response.json()["outputs"][0]["data"]) == LIGHT_TEXT // 7
            for method, url in [("GET", "/v2"), ("GET", "/v2/models/stats"), ("POST", INFER)]:
                assert "content-encoding" not in client.request(method, url, json=short).headers
        local = ask(tmp_path / "s", "POST", INFER, json=long, headers=headers)
        assert "content-encoding" not in local.headers


def test_what_is_not_served_is_not_listed_and_refused_in_one_way(served):
    assert not {"system_shared_memory", "cuda_shared_memory", "trace", "schedule_policy"} & set(EXTENSIONS)
    for url in (
        "/v2/systemsharedmemory/region/r/register",
        "/v2/systemsharedmemory/status",
        "/v2/cudasharedmemory/region/r/unregister",
        "/v2/trace/setting",
        "/v2/models/supsup/trace/setting",
    ):
        for method in ("GET", "POST"):
            assert error(ask(served, method, url), 501).startswith("extension_not_supported: ")


@pytest.mark.parametrize(
    ("status", "method", "url", "headers"),
    [
        (405, "DELETE", "/v2/models/supsup", {}),
        (405, "GET", "/v2/repository/index", {}),
        (405, "GET", LOAD.format("supsup"), {}),
        (405, "PUT", INFER, {"X-HTTP-Method-Override": "POST"}),
        (404, "GET", "/v2/models/supsup/", {}),
        (404, "GET", "/v2/models", {}),
        (404, "GET", "//v2/models/supsup", {}),
        (404, "GET", "/v2//models/supsup", {}),
        (404, "GET", "/V2/models/supsup", {}),
        (404, "POST", INFER + "/", {}),
    ],
)
def test_a_wrong_way_gets_the_same_body_and_no_list_of_routes(served, status, method, url, headers):
    response = ask(served, method, url, headers=headers)
    assert "/v2" not in error(response, status)


def test_log_levels_can_be_changed_and_nothing_else(served):
    before = ask(served, url="/v2/logging").json()
    for level, shown in [
        ("log_error", [False, False, True]),
        ("log_warning", [False, True, True]),
        ("log_info", [True] * 3),
    ]:
        changes = {"log_info": False, "log_warning": False, "log_error": False, level: True, "log_verbose_level": 0}
        told = ask(served, "POST", "/v2/logging", json=changes).json()
        assert [told[name] for name in ("log_info", "log_warning", "log_error")] == shown
    for wrong in ({"log_file": "/etc/passwd"}, {"log_format": "ISO8601"}, {"log_info": 1}, {"level": "debug"}):
        assert error(ask(served, "POST", "/v2/logging", json=wrong), 400).startswith("bad_request: ")
    assert ask(served, "POST", "/v2/logging", json={**before, "log_verbose_level": 0}).is_success
