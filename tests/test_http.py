"""The socket end to end: a real uvicorn on a real Unix socket, asked by a client that is not ours."""

import json
import os
import socket
import stat
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import quote

import httpx
import numpy as np
import pytest
from asking import INFER, ask, infer, predicted
from daemon_process import until
from tiny_engine import INPUTS, TinyEngine, serving

from supsupd.paths import MAX_SOCKET_PATH
from supsupd.serving.listeners import SocketInUse, SocketRefused, bind_unix
from supsupd.serving.oip.models import EXTENSIONS

ROW = [[1.0] * INPUTS]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run" / "s.sock"


@pytest.fixture
def engine():
    return TinyEngine()


@pytest.fixture
def served(engine, path):
    with serving(engine, path, max_body_bytes=100_000):
        yield path


ROUTES = [
    ("/v2", {"name": "supsupd", "version": "0.1.0", "extensions": list(EXTENSIONS)}),
    ("/v2/", {"name": "supsupd", "version": "0.1.0", "extensions": list(EXTENSIONS)}),
    ("/v2/health/live", {"live": True}),
    ("/v2/health/ready", {"ready": True}),
    ("/v2/models/supsup/ready", {"name": "supsup", "ready": True}),
]


@pytest.mark.parametrize(("url", "answer"), ROUTES)
def test_the_protocols_routes_answer_without_a_redirect(served, url, answer):
    response = ask(served, url=url)
    assert (response.status_code, response.json()) == (200, answer)
    head = ask(served, "HEAD", url)
    assert (head.status_code, head.content) == (200, b"")


def test_the_model_tells_its_shapes(served):
    model = ask(served, url="/v2/models/supsup").json()
    assert model["inputs"][0]["shape"] == [-1, INPUTS]
    assert [output["name"] for output in model["outputs"]] == [
        "label",
        "probabilities",
        "task",
        "entropy",
        "known",
    ]


def test_an_answer_is_the_engines_prediction(served, engine):
    x = np.random.default_rng(1).normal(size=(5, INPUTS)).astype(np.float32)
    for parameters in ({}, {"per_sample": True}, {"task": 2}):
        response = ask(served, "POST", INFER, json=infer(x, id="q", parameters=parameters))
        assert (response.status_code, response.json()["id"]) == (200, "q")
        columns = {o["name"]: np.array(o["data"]).reshape(o["shape"]) for o in response.json()["outputs"]}
        wanted = predicted(engine, x, parameters.get("task"), "per_sample" in parameters)
        assert columns["label"].tolist() == wanted.labels
        for name in ("probabilities", "task", "entropy", "known"):
            assert np.array_equal(columns[name].astype(getattr(wanted, name).dtype), getattr(wanted, name))


def test_string_labels_come_back_as_bytes_tensors(path):
    with serving(TinyEngine(labels=("cat", "dog", "eel")), path):
        answer = ask(path, "POST", INFER, json=infer(np.ones((2, INPUTS)), outputs=[{"name": "label"}])).json()
    (output,) = answer["outputs"]
    assert output["datatype"] == "BYTES"
    assert set(output["data"]) <= {"cat", "dog", "eel"}


def test_before_the_first_task_the_server_lives_but_is_not_ready(path):
    with serving(TinyEngine(tasks=0), path):
        assert ask(path, url="/v2/health/live").status_code == 200
        asked = [
            ("GET", "/v2/health/ready"),
            ("GET", "/v2/models/supsup"),
            ("GET", "/v2/models/supsup/ready"),
        ]
        for method, url in [*asked, ("POST", INFER)]:
            response = ask(path, method, url, json=infer(np.ones((1, INPUTS))))
            assert (response.status_code, response.json()) == (
                503,
                {"error": "no_model_yet: no task has been learned yet"},
            )


def test_the_native_routes_reach_the_engine(served, engine):
    assert ask(served, url="/v1/status").json()["tasks"] == 2
    assert [task["task"] for task in ask(served, url="/v1/tasks").json()] == [1, 2]
    assert ask(served, url="/v1/tasks/2").json()["decisions"][0]["decision"] == "new"
    assert ask(served, "PATCH", "/v1/tasks/2", json={"name": "digits"}).json()["name"] == "digits"
    assert engine.names == ["task-1", "digits"]
    submitted = ask(served, "POST", "/v1/batches", params={"name": "a/ü.npz"}, content=b"bytes")
    assert (submitted.status_code, submitted.json()["state"]) == (202, "staged")
    rows = ask(served, url="/v1/batches", params={"state": "staged", "limit": 1}).json()
    assert [row["name"] for row in rows] == ["a/ü.npz"]
    assert ask(served, url="/v1/batches?state=committed").json() == []
    assert ask(served, "POST", "/v1/scan").json() == {"pass": 1}


def test_rejected_batches_and_gaps_reach_the_engine(served, engine):
    engine.ledger.append({"batch": 1, "name": "a.npz", "sha256": "a" * 64, "state": "quarantined"})
    assert [row["batch"] for row in ask(served, url="/v1/rejected?limit=5").json()] == [1]
    assert ask(served, url="/v1/batches/1").json() == ask(served, url=f"/v1/batches/{'a' * 64}").json()
    retried = ask(served, "POST", "/v1/batches/1/retry")
    assert (retried.status_code, retried.json()["batch"]) == (202, 2)
    assert ask(served, "POST", "/v1/batches/1/retry").status_code == 409
    assert ask(served, "POST", "/v1/batches/2/drop").json()["state"] == "dropped"
    assert ask(served, url="/v1/sources").json()[0]["name"] == "w"
    assert ask(served, "POST", "/v1/sources/line-3/accept").json()["position"] == "7"
    assert ask(served, "POST", "/v1/sources/line-4/accept").status_code == 404


def test_the_same_idempotency_key_is_the_same_batch(served, engine):
    headers = {"Idempotency-Key": "k-1"}
    answers = [
        ask(served, "POST", "/v1/batches", params={"name": "a"}, content=b"bytes", headers=headers) for _ in range(2)
    ]
    assert answers[0].json() == answers[1].json()
    assert len(engine.ledger) == 1
    for wrong in ([("Idempotency-Key", "k" * 256)], [("Idempotency-Key", "k-1"), ("Idempotency-Key", "k-2")]):
        refused = ask(served, "POST", "/v1/batches?name=a", content=b"b", headers=wrong)
        assert (refused.status_code, "expected one Idempotency-Key" in refused.text) == (400, True)


def test_the_operators_routes_reach_the_engine(served, engine):
    def post(url, **body):
        return ask(served, "POST", f"/v1/tasks/{url}", **({"json": body} if body else {})).json()

    assert post("1/retire")["retired"]
    assert "is retired" in post("1/retire")["error"]
    assert [task["task"] for task in ask(served, url="/v1/tasks").json()] == [2]
    assert [task["task"] for task in ask(served, url="/v1/tasks?all=true").json()] == [1, 2]
    assert post("task-1/reopen")["retired"] is None
    assert post("1/merge", other="task-2")["task"] == 1
    assert post("2/reopen")["task"] == 2
    assert post("1/merge", other=2)["task"] == 1
    assert post("1/split", **{"from": 17})["name"] == "from-17"
    assert ask(served, url="/v1/batches/1/why").json()["words"][1] == "1. known"


def test_a_task_is_named_by_whatever_its_key_holds(served, engine):
    engine.names[1] = "day/1 ü?#"
    assert ask(served, url="/v1/tasks/day%2F1%20%C3%BC%3F%23").json()["task"] == 2
    answer = ask(served, "POST", INFER, json=infer(ROW, parameters={"task": "day/1 ü?#"})).json()
    assert {output["name"]: output["data"] for output in answer["outputs"]}["task"] == [2]
    assert ask(served, "POST", "/v1/tasks/day%2F1%20%C3%BC%3F%23/retire").json()["task"] == 2


@pytest.mark.parametrize(
    "key",
    ["a/b", "1/retire", "2/history", "/", ".", "..", "../1", "?", "#", "%", "%2F", "a%2Fb", "a b", "ü", "💧", "a\\b"],
)
def test_every_key_is_one_part_of_a_path_and_reaches_its_own_task_by_every_route(served, engine, key):
    engine.names[1] = key
    task = f"/v1/tasks/{quote(key, safe='').replace('.', '%2E')}"
    assert ask(served, url=task).json()["task"] == 2
    assert ask(served, url=f"{task}/history").status_code == 200
    assert ask(served, "POST", f"{task}/retire").json()["task"] == 2
    assert ask(served, "POST", f"{task}/reopen").json()["task"] == 2
    assert ask(served, "POST", f"{task}/merge", json={"other": 1}).json()["task"] == 2
    assert ask(served, "PATCH", task, json={"name": "renamed"}).json()["task"] == 2


@pytest.mark.parametrize(
    "asked",
    [
        "/v1/tasks%2F1",
        "/v1%2Ftasks/1",
        "/v1/%74asks/1",
        "/v1/tasks/a/b",
        "/v1/tasks/%FF",
        "/v1/tasks/%00",
        "/v1/tasks/1%2Fhistory",
        "/v1/status%0A",
        "/v2%2Fhealth%2Flive",
        "/v2/models%2Fsupsup",
        "/v2/models/supsup%2Fconfig",
    ],
)
def test_no_path_is_reached_by_another_reading(served, asked):
    assert ask(served, url=asked).status_code == 404


def test_a_name_that_is_not_unicode_can_still_be_told(served, engine):
    engine.ledger.append({"batch": 1, "name": os.fsdecode(b"\xff.npz"), "state": "quarantined"})
    assert ask(served, url="/v1/batches").content.count(rb'"\udcff.npz"') == 1


BAD = {
    "no such path": (404, "GET", "/v3", {}),
    "outside every path": (404, "GET", "/v2/models/supsup/../../../etc/passwd", {}),
    "trailing slash": (404, "GET", "/v1/status/", {}),
    "other model": (404, "GET", "/v2/models/gpt", {}),
    "other model's ready": (404, "GET", "/v2/models/gpt/ready", {}),
    "infer on another model": (404, "POST", "/v2/models/%2e%2e/infer", {"json": infer(ROW)}),
    "wrong method": (405, "POST", "/v2", {}),
    "get on infer": (405, "GET", INFER, {}),
    "delete a task": (405, "DELETE", "/v1/tasks/1", {}),
    "body is not JSON": (400, "POST", INFER, {"content": b"{"}),
    "NaN": (400, "POST", INFER, {"content": b'{"inputs": NaN}'}),
    "deep JSON": (400, "POST", INFER, {"content": b"[" * 90_000}),
    "wrong shape": (400, "POST", INFER, {"json": infer([[1.0] * 3])}),
    "task that is not there": (404, "POST", INFER, {"json": infer(ROW, parameters={"task": 9})}),
    "compressed in a way of its own": (415, "POST", INFER, {"content": b"x", "headers": {"Content-Encoding": "br"}}),
    "a compressed batch": (
        415,
        "POST",
        "/v1/batches?name=a",
        {"content": b"x", "headers": {"Content-Encoding": "gzip"}},
    ),
    "not compressed at all": (400, "POST", INFER, {"content": b"x", "headers": {"Content-Encoding": "gzip"}}),
    "body too large": (413, "POST", INFER, {"content": b"x" * 100_001}),
    "body far too large": (413, "POST", "/v1/batches?name=a", {"content": b"x" * 5_000_000}),
    "from a web page": (403, "GET", "/v1/status", {"headers": {"Origin": "http://evil.example"}}),
    "preflight": (403, "OPTIONS", INFER, {"headers": {"Origin": "null"}}),
    "unknown task": (404, "GET", "/v1/tasks/9", {}),
    "task that is no number": (404, "GET", "/v1/tasks/one", {}),
    "task of 5000 digits": (404, "GET", "/v1/tasks/" + "9" * 5000, {}),
    "rename without a name": (400, "PATCH", "/v1/tasks/1", {"json": {}}),
    "rename with more": (400, "PATCH", "/v1/tasks/1", {"json": {"name": "a", "id": 1}}),
    "rename to a number": (400, "PATCH", "/v1/tasks/1", {"json": {"name": 3}}),
    "rename to a taken name": (409, "PATCH", "/v1/tasks/1", {"json": {"name": "task-2"}}),
    "rename the unknown": (404, "PATCH", "/v1/tasks/9", {"json": {"name": "a"}}),
    "retire the unknown": (404, "POST", "/v1/tasks/9/retire", {}),
    "two names": (400, "POST", "/v1/batches?name=a&name=b", {"content": b"x"}),
    "two states": (400, "GET", "/v1/batches?state=staged&state=unsure", {}),
    "get on retire": (405, "GET", "/v1/tasks/1/retire", {}),
    "reopen nothing": (404, "POST", "/v1/tasks//reopen", {}),
    "merge without another": (400, "POST", "/v1/tasks/1/merge", {"json": {}}),
    "merge with a list": (400, "POST", "/v1/tasks/1/merge", {"json": {"other": [2]}}),
    "merge with a huge number": (400, "POST", "/v1/tasks/1/merge", {"json": {"other": 2**63}}),
    "split without a body": (400, "POST", "/v1/tasks/1/split", {}),
    "split from a name": (400, "POST", "/v1/tasks/1/split", {"json": {"from": "a"}}),
    "split from a fraction": (400, "POST", "/v1/tasks/1/split", {"json": {"from": 1.5}}),
    "why of no number": (404, "GET", "/v1/batches/one/why", {}),
    "why of the unknown": (404, "GET", "/v1/batches/9/why", {}),
    "neither all nor not": (400, "GET", "/v1/tasks?all=1", {}),
    "unknown state": (400, "GET", "/v1/batches?state=lost", {}),
    "unknown query": (400, "GET", "/v1/batches?stat=staged", {}),
    "limit zero": (400, "GET", "/v1/batches?limit=0", {}),
    "limit is no number": (400, "GET", "/v1/batches?limit=many", {}),
    "batch without a name": (400, "POST", "/v1/batches", {"content": b"x"}),
    "batch with escape codes": (400, "POST", "/v1/batches?name=a%1b[2J", {"content": b"x"}),
    "batch with a long name": (400, "POST", "/v1/batches?name=" + "a" * 300, {"content": b"x"}),
    "empty batch": (400, "POST", "/v1/batches?name=a", {}),
    "a bug of ours": (500, "PATCH", "/v1/tasks/1", {"json": {"name": "crash"}}),
}


@pytest.mark.parametrize(("status", "method", "url", "request_"), BAD.values(), ids=BAD.keys())
def test_a_bad_request_gets_its_status_and_one_error(served, status, method, url, request_):
    response = ask(served, method, url, **request_)
    assert response.status_code == status
    assert list(response.json()) == ["error"]
    assert 0 < len(response.json()["error"]) < 300
    assert "Traceback" not in response.text
    assert ask(served).status_code == 200


def test_a_chunked_body_over_the_limit_is_refused(served):
    response = ask(served, "POST", INFER, content=(b"x" * 10_000 for _ in range(20)))
    assert (response.status_code, list(response.json())) == (413, ["error"])


def test_a_body_that_never_ends_is_given_up(engine, path):
    with serving(engine, path, body_seconds=0.3), socket.socket(socket.AF_UNIX) as slow:
        slow.connect(str(path))
        slow.settimeout(20)
        slow.sendall(f"POST {INFER} HTTP/1.1\r\nHost: d\r\nContent-Length: 100\r\n\r\n{{".encode())
        assert slow.recv(4096).startswith(b"HTTP/1.1 408 ")


def test_what_is_not_http_is_refused_and_hurts_nobody(served):
    for noise in (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", b"hello\r\n\r\n"):
        with socket.socket(socket.AF_UNIX) as other:
            other.connect(str(served))
            other.settimeout(20)
            other.sendall(noise)
            with other.makefile("rb") as stream:
                head, body = stream.read().split(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 400 ")
            assert json.loads(body)["error"].startswith("bad_request: ")
    assert ask(served).status_code == 200


def test_a_long_prediction_does_not_hold_up_the_others(served, engine):
    engine.gate.clear()
    answers = []
    asking = threading.Thread(target=lambda: answers.append(ask(served, "POST", INFER, json=infer(ROW), timeout=30)))
    asking.start()
    assert engine.entered.wait(10)
    assert ask(served, url="/v1/status").status_code == 200
    assert answers == []
    engine.gate.set()
    asking.join(30)
    assert answers[0].status_code == 200


@pytest.mark.parametrize(("rows", "task", "light"), [(1, 1, True), (5, 1, False), (1, None, False), (1, "1", False)])
def test_a_light_query_is_answered_by_the_thread_that_read_it(served, engine, rows, task, light):
    parameters = {} if task is None else {"task": task}
    assert ask(served, "POST", INFER, json=infer(ROW * rows, parameters=parameters)).status_code == 200
    assert engine.answered_in == ["supsupd-http"] if light else engine.answered_in != ["supsupd-http"]


def test_the_socket_is_private_and_so_is_a_folder_made_for_it(path):
    old = os.umask(0)
    try:
        with serving(TinyEngine(), path):
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
            assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    finally:
        os.umask(old)


def test_stopping_leaves_no_socket_file_and_frees_the_path(path):
    for _ in range(2):
        with serving(TinyEngine(), path) as server:
            assert ask(path).status_code == 200
            assert server.alive
        assert not path.exists()
        assert not server.alive


def test_a_second_server_is_refused_and_the_first_keeps_answering(served):
    with pytest.raises(SocketInUse, match="another server that answers"):
        bind_unix(served)
    assert ask(served).status_code == 200


def test_of_many_that_bind_at_once_one_wins(path):
    won, refused = [], []

    def bind():
        try:
            won.append(bind_unix(path))
        except SocketInUse as error:
            refused.append(error)

    threads = [threading.Thread(target=bind) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert (len(won), len(refused)) == (1, 7)
    won[0].close()


def test_the_socket_of_a_dead_server_is_replaced(path):
    path.parent.mkdir()
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    with serving(TinyEngine(), path):
        assert ask(path).status_code == 200


def test_a_file_that_is_no_socket_is_left_alone(path):
    path.parent.mkdir()
    path.write_text("precious")
    with pytest.raises(SocketRefused, match="not a socket"):
        bind_unix(path)
    assert path.read_text() == "precious"


def test_a_path_that_no_socket_can_have_is_refused_in_one_line(tmp_path):
    with pytest.raises(SocketRefused, match=f"{MAX_SOCKET_PATH} bytes"):
        bind_unix(tmp_path / ("s" * MAX_SOCKET_PATH))
    (tmp_path / "file").touch()
    with pytest.raises(SocketRefused, match="can't be made a socket"):
        bind_unix(tmp_path / "file" / "s.sock")


def test_stopping_does_not_remove_a_successors_socket(path):
    with serving(TinyEngine(), path):
        path.unlink()
        successor = bind_unix(path)
    assert path.exists()
    successor.close()


def test_a_request_in_progress_is_answered_before_the_stop(path):
    engine = TinyEngine()
    engine.gate.clear()
    answers = []
    with serving(engine, path) as server:
        asking = threading.Thread(target=lambda: answers.append(ask(path, "POST", INFER, json=infer(ROW), timeout=30)))
        asking.start()
        assert engine.entered.wait(10)
        stopping = threading.Thread(target=server.stop, args=(20.0,))
        stopping.start()
        until(lambda: not path.exists())
        engine.gate.set()
        stopping.join(30)
        asking.join(30)
    assert json.loads(answers[0].content)["model_name"] == "supsup"


def test_a_stop_does_not_wait_for_ever_for_a_request_that_does_not_end(path):
    engine = TinyEngine()
    engine.gate.clear()

    def give_up():
        with pytest.raises(httpx.HTTPError):
            ask(path, "POST", INFER, json=infer(ROW), timeout=30).raise_for_status()

    with serving(engine, path) as server:
        asking = threading.Thread(target=give_up)
        asking.start()
        assert engine.entered.wait(10)
        began = time.monotonic()
        assert server.stop(1.0)
        assert time.monotonic() - began < 15  # half of what the engine takes
        asking.join(30)
        engine.gate.set()


def test_whoever_waits_for_a_batch_to_be_taken_keeps_nobody_else_from_an_answer(engine, path):
    taken, crowd = threading.Event(), 100

    def submit(name, *_):
        taken.wait(30)
        return {"batch": 1, "state": "staged", "sha256": name}

    engine.submit = submit
    with serving(engine, path) as server, ThreadPoolExecutor(crowd) as threads:
        waiting = [threads.submit(ask, path, "POST", f"/v1/batches?name={n}", content=b"x") for n in range(crowd)]
        try:
            until(lambda: server.open_connections == crowd)
            many = np.ones((20_000, INPUTS), np.float32)  # too many to be decoded in the loop
            for method, url, body in (("GET", "/v1/status", None), ("POST", INFER, infer(many))):
                assert ask(path, method, url, json=body, timeout=10).status_code == 200
        finally:
            taken.set()
        assert {done.result().status_code for done in waiting} == {202}
