"""Who asks: as the kernel says it of the connection, whatever the request claims."""

import os
import pwd
import socket
from contextlib import contextmanager

import httpx
import pytest
from tiny_engine import TinyEngine, serving

from supsupd.client import Client, DaemonError
from supsupd.serving.peer import show_user

NOBODY = 65534


@contextmanager
def served(path):
    engine = TinyEngine()
    with serving(engine, path):
        yield engine


def test_an_operators_command_carries_the_user_who_connected(tmp_path):
    with served(tmp_path / "sock") as engine, Client(tmp_path / "sock") as client:
        client.retire(1)
        assert engine.asked_by == f"{pwd.getpwuid(os.getuid()).pw_name} ({os.getuid()})"
        engine.asked_by = None
        assert client.rollback(2, 7)["version"] == 8
        assert engine.asked_by == show_user(os.getuid())


def test_no_header_and_no_field_can_say_otherwise(tmp_path):
    transport = httpx.HTTPTransport(uds=str(tmp_path / "sock"))
    with served(tmp_path / "sock") as engine, httpx.Client(transport=transport, base_url="http://d") as client:
        headers = {"x-remote-user": "mallory", "state": "mallory", "supsupd.peer_uid": "0"}
        assert client.post("/v1/tasks/1/retire", headers=headers, params={"by": "mallory"}).status_code == 200
        assert engine.asked_by == show_user(os.getuid())
        assert client.post("/v1/tasks/1/rollback", json={"to": 1, "by": "mallory"}).status_code == 400


@pytest.mark.skipif(os.getuid() != 0, reason="only root can be somebody else")
def test_two_users_are_told_apart(tmp_path):
    folder = tmp_path / "open"
    with served(folder / "sock") as engine:
        for place in (folder, *list(folder.parents)[:3]):
            place.chmod(0o755)
        (folder / "sock").chmod(0o666)
        with socket.socket(socket.AF_UNIX) as connection:
            os.seteuid(NOBODY)
            try:
                connection.connect(str(folder / "sock"))
            finally:
                os.seteuid(0)
            connection.sendall(b"POST /v1/tasks/1/retire HTTP/1.1\r\nHost: d\r\nConnection: close\r\n\r\n")
            assert connection.makefile("rb").readline() == b"HTTP/1.1 200 OK\r\n"
        assert engine.asked_by == show_user(NOBODY)


def test_a_user_without_a_name_is_told_by_the_number():
    assert show_user(4_123_456_789) == "uid 4123456789"


def test_a_history_and_a_refused_rollback_come_over_the_socket(tmp_path):
    with served(tmp_path / "sock"), Client(tmp_path / "sock") as client:
        assert [row["version"] for row in client.history("task-1")] == [1]
        with pytest.raises(DaemonError, match="there is no task 9") as caught:
            client.history(9)
        assert caught.value.status == 404
        for bad in ("1", 1.5, None, -1):
            with pytest.raises(DaemonError, match=r'expected \{"to": N\}') as caught:
                client.rollback(1, bad)
            assert caught.value.status == 400
