"""Every request has an id, which its answer and its log lines carry, and is told in the log if it matters."""

import io
import json
import logging
import re
import sys

import httpx
import pytest
import tiny_engine
from daemon_process import until

from supsupd import logs


@pytest.fixture
def engine():
    return tiny_engine.TinyEngine()


@pytest.fixture
def asked(engine, tmp_path, monkeypatch):
    """(a client of a server, what was logged so far): at level debug."""
    path, stderr, root = tmp_path / "s", io.StringIO(), logging.getLogger()
    monkeypatch.setattr(sys, "stderr", stderr)
    monkeypatch.setattr(root, "handlers", [])
    logs.configure("json", "debug")
    try:
        with (
            tiny_engine.serving(engine, path),
            httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), base_url="http://supsupd") as http,
        ):
            yield http, lambda: [json.loads(line) for line in stderr.getvalue().splitlines()]
    finally:
        logging.getLogger("supsupd").setLevel(logging.INFO)


def test_a_request_keeps_the_id_that_it_brings(asked):
    http, logged = asked
    assert http.get("/livez", headers={"X-Request-Id": "shop-7.4_a"}).headers["x-request-id"] == "shop-7.4_a"
    (line,) = (line for line in logged() if line["event"] == "request")
    assert (line["request"], line["path"], line["status"]) == ("shop-7.4_a", "/livez", 200)


@pytest.mark.parametrize("brought", [None, "", "a" * 65, "a b", 'x"y'])
def test_any_other_request_gets_one_of_its_own(asked, brought):
    http, _ = asked
    headers = {} if brought is None else {"X-Request-Id": brought.encode()}
    given = [http.get("/livez", headers=headers).headers["x-request-id"] for _ in range(3)]
    assert len(set(given)) == 3
    assert all(re.fullmatch("[0-9a-f]{8}-[0-9a-f]+", one) for one in given)


def test_refusals_have_ids_too(asked):
    http, _ = asked
    for path, status in (("/nowhere", 404), ("/v2/models/nobody", 404), ("/v1/batches?limit=x", 400)):
        response = http.get(path, headers={"X-Request-Id": "mine"})
        assert (response.status_code, response.headers["x-request-id"]) == (status, "mine")


def test_a_crash_names_the_request_to_whoever_asked_and_in_the_log(asked):
    http, logged = asked
    response = http.patch("/v1/tasks/1", json={"name": "crash"}, headers={"X-Request-Id": "mine"})
    assert response.status_code == 500
    assert response.headers["x-request-id"] == "mine"
    assert "request mine" in response.json()["error"]
    until(lambda: any("exception" in line for line in logged()))  # written after the answer
    told = [line for line in logged() if line.get("request") == "mine"]
    assert "a bug" in next(line["exception"] for line in told if "exception" in line)
    (failed,) = (line for line in told if line["event"] == "request_failed")
    assert (failed["level"], failed["status"]) == ("warning", 500)


def test_who_is_told_to_come_later_fills_no_log(engine, asked):
    http, logged = asked
    engine.weights = engine.weights[:0]
    assert {http.get("/readyz").status_code for _ in range(20)} == {503}
    until(lambda: sum(line.get("path") == "/readyz" for line in logged()) == 20)
    assert {line["level"] for line in logged() if line.get("path") == "/readyz"} == {"debug"}


def test_neither_queries_nor_headers_are_logged(asked):
    http, logged = asked
    http.get("/livez?token=swordfish", headers={"Authorization": "Bearer swordfish"})
    assert "swordfish" not in json.dumps(logged())
