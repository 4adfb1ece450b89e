"""The process of clients that the benchmarks of serving order, against answers that are always the same."""

import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))

import serve_crowd
import serve_peers
from clients import Clients, Found, Order
from clients_runner import OUTPUTS
from mlserver_process import MlserverSettings, write_repository
from serve_peers_setup import WAYS, Case
from servers import canned_server

ANSWER = b'{"model_name":"supsup","outputs":[%s]}' % b",".join(
    b'{"name":"%s","datatype":"INT64","shape":[1],"data":[7]}' % name.encode() for name in OUTPUTS
)


def whole(status, body, *headers):
    lines = [b"HTTP/1.1 " + status, b"Content-Length: %d" % len(body), *headers, b"", body]
    return b"\r\n".join(lines)


@pytest.fixture(scope="module")
def clients():
    with Clients() as running:
        yield running


@pytest.fixture
def questions(tmp_path):
    path = tmp_path / "questions.npz"
    np.savez(path, x=np.zeros((2, 1, 4), np.float32), task=np.array([7, 7]), label=np.array([7, 8]))
    return path


@pytest.mark.parametrize("binary", [True, False])
def test_both_clients_count_what_they_are_answered(tmp_path, clients, questions, binary):
    with canned_server(tmp_path, whole(b"200 OK", ANSWER)) as server:
        for raw in (False, True):
            found = clients.ask(Order(server.address, questions, 2, 1.0, binary=binary, raw=raw))
            assert found.statuses == Counter({"200": found.answered})
            assert found.answered > 1
            assert found.errors() == 0
            assert raw or abs(found.right - found.answered / 2) <= 2


def test_who_is_told_to_come_back_does_so_only_then(tmp_path, clients, questions):
    refusal = whole(b"429 Too Many Requests", b'{"error":"overloaded"}', b"Retry-After: 3")
    with canned_server(tmp_path, refusal) as server:
        found = clients.ask(Order(server.address, questions, 3, 2.0, raw=True))
    assert found.statuses == Counter({"429": 3})
    assert found.retry_after == 3
    assert found.errors() == 3
    assert found.errors(["429"]) == 0


def test_mlservers_own_defaults_stand_where_nothing_is_said(tmp_path):
    (tmp_path / "state").mkdir()
    folder = tmp_path / "models"
    folder.mkdir()
    write_repository(folder, tmp_path / "state", MlserverSettings("its defaults"), [1, 2, 3])
    assert "parallel_workers" not in (folder / "settings.json").read_text()
    assert "max_batch_size" not in (folder / "model-settings.json").read_text()


def times(per_second, p99_ms=1.0):
    found = Found(seconds=1.0, statuses=Counter({"200": per_second}), milliseconds=[p99_ms] * per_second)
    return found.to_json()


def test_ours_are_judged_against_mlserver_in_json():
    ways = {way.name: times(100 if way.peer else 600, 2.0 if way.peer else 3.0) for way in WAYS}
    row = {"tasks": 5, "rows": 32, "given": False, "peer": "its defaults", "ways": ways}
    tried = [{"settings": "its defaults", "rows": 32, "per_second": 50.0}]
    found = {m["what"].strip(): m for m in serve_peers.measures(row, tried)}
    reached = {what: m["reached"] for what, m in found.items() if "target" in m}
    assert reached == {"times MLServer's": True, "p99 over MLServer's": False}
    assert found["times MLServer's with its defaults"]["ours"] == 12.0
    assert Case(5, 1, True).name == "5 tasks, 1 row, task given"


def test_a_crowd_is_judged_by_errors_and_by_what_learning_adds():
    rows = [
        {"over": c.over, "learning": c.learning} | times(50, 30.0 if c.learning else 10.0) for c in serve_crowd.CASES
    ]
    overload = times(10) | {"refused": 5, "told_when": 1.0, "errors": 0, "statuses": {"200": 10, "429": 5}}
    found = serve_crowd.measures({"rows": rows, "stream": {"batches_per_second": 1.0}, "overload": overload})
    missed = [m["what"].strip() for m in found if not m.get("reached", True)]
    assert missed == ["p99 while learning over p99 quiet"] * 2
