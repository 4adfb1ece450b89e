"""The Python client against a real socket."""

import asyncio
import inspect
import os
import socket
import threading

import numpy as np
import pytest
from asking import predicted
from certificates import Authority
from credentials import UNKNOWN, Credentials
from tiny_engine import INPUTS, TinyEngine, port_of, serving

from supsupd.client import AsyncClient, Client, DaemonError, DaemonUnavailable
from supsupd.client.calls import request
from supsupd.sections import ServerTlsSettings, ServingSettings
from supsupd.serving.access import Access
from supsupd.serving.listeners import tls_context


@pytest.fixture
def engine():
    return TinyEngine()


@pytest.fixture
def client(engine, tmp_path):
    with serving(engine, tmp_path / "s.sock"), Client(tmp_path / "s.sock") as client:
        yield client


def test_lists_come_in_pages_of_which_the_client_tells_nothing(engine, client):
    engine.ledger = [{"batch": i, "name": f"{i}", "sha256": "", "state": "quarantined"} for i in range(1, 2501)]
    assert [row["batch"] for row in client.batches()] == list(range(1, 2501))
    assert [row["batch"] for row in client.batches(limit=1500)] == list(range(1, 1501))
    assert [row["batch"] for row in client.rejected()] == list(range(1, 2501))
    assert client.batches(state="staged") == []


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, np.uint8, np.int64, np.bool_, ">f4", ">i2"])
def test_rows_of_any_number_type_are_predicted_as_the_engine_would(client, engine, dtype):
    x = (np.random.default_rng(2).normal(size=(6, INPUTS)) * 3).clip(0, 100).astype(dtype)
    wanted = predicted(engine, x, None, True)
    rows = client.predict(x, per_sample=True)
    assert [row["label"] for row in rows] == wanted.labels
    assert [row["task"] for row in rows] == wanted.task.tolist()
    assert [row["known"] for row in rows] == wanted.known.tolist()
    assert [row["entropy"] for row in rows] == pytest.approx(wanted.entropy.tolist())
    assert list(rows[0]) == ["label", "task", "entropy", "known"]


def test_a_given_task_answers_and_rows_are_pooled_by_default(client):
    x = np.random.default_rng(3).normal(size=(8, INPUTS))
    assert {row["task"] for row in client.predict(x, task=2)} == {2}
    assert len({row["task"] for row in client.predict(x)}) == 1
    assert {row["task"] for row in client.predict(x, per_sample=True)} == {1, 2}


@pytest.mark.parametrize(
    "x", [np.array([[np.nan] * 4]), np.array([["a"] * 4]), np.array([[1j] * 4]), np.array([[None]])]
)
def test_what_is_not_numbers_is_refused_before_it_is_sent(client, x):
    with pytest.raises(ValueError, match=r"^x (holds|must)"):
        client.predict(x)


def test_every_native_route_has_its_method(client, engine):
    assert client.status()["tasks"] == 2
    assert client.rename(1, "digits")["name"] == "digits"
    assert [task["name"] for task in client.tasks()] == ["digits", "task-2"]
    assert client.task(1)["decisions"]
    assert client.submit("b 1&2.npz", b"bytes")["state"] == "staged"
    assert [row["name"] for row in client.batches(state="staged", limit=5)] == ["b 1&2.npz"]
    assert client.batches(state="committed") == []
    assert client.scan() == {"pass": 1}
    assert client.retire("digits")["task"] == 1
    assert [task["task"] for task in client.tasks()] == [2]
    assert [task["task"] for task in client.tasks(retired=True)] == [1, 2]
    assert client.reopen(1)["retired"] is None
    assert client.merge("digits", 2)["task"] == 1
    assert client.split(1, 5)["name"] == "from-5"
    assert client.submit("c", b"more", "application/x-npz", "key")["batch"] == client.batch(2)["batch"]
    assert client.rejected() == []
    assert client.drop(2)["state"] == "dropped"
    with pytest.raises(DaemonError, match="only a rejected batch"):
        client.retry(1)
    assert client.sources()[0]["name"] == "w"
    assert client.accept_gap("line-3")["source"] == "line-3"
    assert client.why(1)["words"]


def test_a_task_may_be_called_by_its_name(client, engine):
    engine.names[1] = "day/1 ü?#%"
    assert client.task("day/1 ü?#%")["task"] == 2
    engine.names[1] = ".."
    assert client.task("..")["task"] == 2
    engine.names[1] = "day/1 ü?#%"
    assert {row["task"] for row in client.predict(np.ones((3, INPUTS)), task="day/1 ü?#%")} == {2}


def test_a_no_comes_with_its_status_and_reason(client):
    with pytest.raises(DaemonError, match="there is no task 9") as caught:
        client.task(9)
    assert caught.value.status == 404
    with pytest.raises(DaemonError, match="bad_shape") as caught:
        client.predict(np.ones((2, 3)))
    assert caught.value.status == 400


def test_a_body_over_the_servers_limit_is_told(engine, tmp_path):
    with serving(engine, tmp_path / "s.sock", max_body_bytes=1000), Client(tmp_path / "s.sock") as client:
        with pytest.raises(DaemonError, match="larger than 1000 bytes"):
            client.submit("big", os.urandom(20_000_000))
        assert client.status()


def test_waiting_asks_for_a_pass_and_returns_once_settled(client, engine):
    assert client.wait(timeout=30)["settled"]
    assert engine.passes == 1


def test_waiting_gives_up_in_time_and_says_what_for(client, engine):
    engine.polls_until_settled = 10**9
    with pytest.raises(TimeoutError, match=r"^not settled after 0\.3 s: 0 batches are queued$"):
        client.wait(timeout=0.3)
    engine.problem = "connection refused"
    with pytest.raises(TimeoutError, match=r"0 batches are queued; w: connection refused$"):
        client.wait(timeout=0.3)


def test_without_a_daemon_every_method_says_so(tmp_path):
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "dead.sock"))
    for path in (tmp_path / "none.sock", tmp_path / "dead.sock", tmp_path / ("s" * 200)):
        with Client(path) as client, pytest.raises(DaemonUnavailable, match="no supsupd answers at"):
            client.status()


def test_a_daemon_that_does_not_answer_is_unavailable(tmp_path):
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(tmp_path / "s.sock"))
        silent.listen()
        with (
            Client(tmp_path / "s.sock", timeout=0.2) as client,
            pytest.raises(DaemonUnavailable, match=r"did not answer in 0\.2 s"),
        ):
            client.status()


def test_an_answer_that_is_not_json_is_an_error(tmp_path):
    def answer(listener):
        connection, _ = listener.accept()
        with connection:
            connection.recv(65536)
            connection.sendall(b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 6\r\n\r\n<html>")

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s.sock"))
        listener.listen()
        thread = threading.Thread(target=answer, args=(listener,))
        thread.start()
        with (
            Client(tmp_path / "s.sock") as client,
            pytest.raises(DaemonError, match="502 without a JSON answer"),
        ):
            client.status()
        thread.join(30)


def test_a_proxy_in_the_environment_changes_nothing(client, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:1")
    with Client(client.address) as other:
        assert other.status()["tasks"] == 2


# -- the models of the protocol ---------------------------------------------------------------------------------------


def test_every_route_of_the_protocol_has_its_method(client, engine):
    assert client.live()
    assert client.ready()
    assert client.server()["name"] == "supsupd"
    assert "supsup" in {model["name"] for model in client.models(ready=True)}
    assert client.model("task-2")["outputs"][0]["name"] == "label"
    assert client.model_ready("supsup", 1)
    assert client.model_config()["backend"] == "supsupd"
    client.predict(np.ones((3, INPUTS)))
    assert client.statistics()["model_stats"][0]["inference_count"] == 3
    client.unload("task-2")
    assert not client.model_ready("task-2")
    client.load("task-2")
    assert client.model_ready("task-2")
    with pytest.raises(DaemonError, match="unknown_model"):
        client.model("task-9")


def test_labels_that_are_words_come_back_as_words(tmp_path):
    engine = TinyEngine(labels=("Katze", "Hund", "Bär"))
    x = np.random.default_rng(3).normal(size=(8, INPUTS))
    with serving(engine, tmp_path / "s.sock"), Client(tmp_path / "s.sock") as client:
        assert [row["label"] for row in client.predict(x)] == predicted(engine, x).labels


def test_before_anything_is_learned_the_daemon_lives_and_is_not_ready(tmp_path):
    with serving(TinyEngine(tasks=0), tmp_path / "s.sock"), Client(tmp_path / "s.sock") as client:
        assert client.live()
        assert not client.ready()
        assert not client.model_ready()
        with pytest.raises(DaemonError, match="no task has been learned yet") as caught:
            client.predict(np.ones((1, INPUTS)))
        assert caught.value.retry_after is not None


# -- the form that is awaited ----------------------------------------------------------------------------------------


def test_what_is_awaited_gives_the_same_and_many_may_ask_at_once(client):
    x = np.random.default_rng(3).normal(size=(8, INPUTS))

    async def ask():
        async with AsyncClient(client.address) as other:
            answers = await asyncio.gather(*(other.predict(x, task=task) for task in (1, 2) for _ in range(8)))
            assert (await other.wait(timeout=30))["settled"]
            with pytest.raises(DaemonError, match="there is no task 9"):
                await other.task(9)
            return answers

    assert asyncio.run(ask()) == [client.predict(x, task=task) for task in (1, 2) for _ in range(8)]


def test_both_forms_have_the_same_methods(client):
    methods = {name for name in dir(AsyncClient) if isinstance(getattr(AsyncClient, name), request)}
    assert methods == {name for name in dir(Client) if isinstance(getattr(Client, name), request)}
    assert {"status", "predict", "wait", "load"} <= methods
    for name in methods:
        assert callable(getattr(client, name))
        assert inspect.getdoc(getattr(Client, name))


def test_without_a_daemon_awaiting_says_so(tmp_path):
    async def ask():
        async with AsyncClient(tmp_path / "none.sock") as client:
            await client.status()

    with pytest.raises(DaemonUnavailable, match="no supsupd answers at"):
        asyncio.run(ask())


# -- over TCP ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def credentials(tmp_path):
    (tmp_path / "state").mkdir(mode=0o700)
    return Credentials(tmp_path / "state")


def token_of(credentials, role):
    return credentials.granted[role].removeprefix("Bearer ")


def test_over_tcp_a_token_says_who_asks(engine, credentials, tmp_path):
    access = Access(ServingSettings, credentials.tokens)
    with serving(engine, tmp_path / "s.sock", tcp=True, access=access) as server:
        url = f"http://127.0.0.1:{port_of(server)}"
        with Client(url, token=token_of(credentials, "predict")) as client:
            assert client.status()["tasks"] == 2
            with pytest.raises(DaemonError) as caught:
                client.retire(1)
            assert caught.value.status == 403
        for token in (None, UNKNOWN):
            with Client(url, token=token) as client, pytest.raises(DaemonError) as caught:
                client.status()
            assert caught.value.status == 401


def test_over_tls_only_a_certificate_of_the_authority_is_trusted(engine, credentials, tmp_path):
    authority = Authority(tmp_path)
    own, mine = authority.issue(), authority.issue("client")
    tls = ServerTlsSettings(certificate=own.certificate, key=own.key, client_ca=authority.certificate)
    token = token_of(credentials, "admin")
    access = Access(ServingSettings, credentials.tokens)
    with serving(engine, tmp_path / "s.sock", tcp=True, access=access, tls=tls_context(tls)) as server:
        url = f"https://127.0.0.1:{port_of(server)}"
        trusted = {"token": token, "verify": authority.certificate}
        with Client(url, certificate=(mine.certificate, mine.key), **trusted) as client:
            assert client.retire(1)["retired"]
        (tmp_path / "both.pem").write_text(mine.certificate.read_text() + mine.key.read_text())
        with Client(url, certificate=tmp_path / "both.pem", **trusted) as client:
            assert client.status()["tasks"] == 2
        with Client(url, **trusted) as client, pytest.raises(DaemonUnavailable):
            client.status()
        with Client(url, token=token) as client, pytest.raises(DaemonUnavailable, match="CERTIFICATE_VERIFY_FAILED"):
            client.status()


@pytest.mark.parametrize("url", ["http://host:port", "https://a:b:c"])
def test_an_address_that_is_none_is_a_value_error(url):
    with pytest.raises(ValueError, match=r"^http"):
        Client(url)


def test_a_token_is_not_in_what_the_client_shows(credentials):
    token = token_of(credentials, "admin")
    with Client("http://127.0.0.1:1", token=token) as client:
        assert token not in repr(client)
        with pytest.raises(DaemonUnavailable) as caught:
            client.status()
        assert token not in str(caught.value)


def test_too_many_queries_are_told_when_to_come_again(tmp_path):
    engine = TinyEngine()
    engine.gate.clear()
    x = np.ones((8, INPUTS))

    async def ask():
        async with AsyncClient(tmp_path / "s.sock") as client:
            asked = [asyncio.ensure_future(client.predict(x)) for _ in range(8)]
            refused, _ = await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)
            engine.gate.set()
            await asyncio.wait(asked)
            return refused.pop().exception()

    with serving(engine, tmp_path / "s.sock", queue_requests=1, parallel=1):
        error = asyncio.run(ask())
    assert error.status == 429
    assert error.retry_after > 0
