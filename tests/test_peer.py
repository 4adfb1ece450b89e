"""Who asks: as the kernel says it of the connection, whatever the request claims."""

import grp
import os
import pwd
import socket
from contextlib import contextmanager

import httpx
import pytest
from structlog.testing import capture_logs
from tiny_engine import TinyEngine, serving

from supsupd.client import Client, DaemonError
from supsupd.serving.peer import show_user

NOBODY = 65534
GROUP = next(group for group in grp.getgrall() if group.gr_gid not in (0, 4, NOBODY))
only_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can be somebody else")


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


def test_a_posted_batch_is_its_users(tmp_path):
    with served(tmp_path / "sock") as engine, Client(tmp_path / "sock") as client:
        client.submit("a.npz", b"bytes")
        assert engine.sent_by == f"uid {os.getuid()}"


def test_no_header_and_no_field_can_say_otherwise(tmp_path):
    transport = httpx.HTTPTransport(uds=str(tmp_path / "sock"))
    with served(tmp_path / "sock") as engine, httpx.Client(transport=transport, base_url="http://d") as client:
        headers = {"x-remote-user": "mallory", "state": "mallory", "supsupd.peer_uid": "0"}
        assert client.post("/v1/tasks/1/retire", headers=headers, params={"by": "mallory"}).status_code == 200
        assert engine.asked_by == show_user(os.getuid())
        assert client.post("/v1/tasks/1/rollback", json={"to": 1, "by": "mallory"}).status_code == 400


@contextmanager
def another_user(uid, gid, groups=()):
    """What connects meanwhile does so as this user, in these groups."""
    own = os.getgroups()
    os.setgroups(groups)
    os.setegid(gid)
    os.seteuid(uid)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)
        os.setgroups(own)


def ask_as(path, method, url, uid, gid, groups=()):
    """The first line of the answer to a request by another user."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(20)
        with another_user(uid, gid, groups):
            connection.connect(str(path))
        try:
            connection.sendall(f"{method} {url} HTTP/1.1\r\nHost: d\r\nConnection: close\r\n\r\n".encode())
            return connection.makefile("rb").readline()
        except (BrokenPipeError, ConnectionResetError):
            return b""


@contextmanager
def open_to_all(path, **limits):
    """Served on a socket whose mode and folders would let anybody in."""
    engine = TinyEngine()
    with serving(engine, path, **limits):
        for place in path.parents:
            if place.stat().st_mode & 0o005 != 0o005:
                place.chmod(0o755)
        path.chmod(0o666)
        yield engine


@only_root
def test_another_user_is_sent_away_with_one_line_in_the_log_whatever_the_files_mode(tmp_path):
    path = tmp_path / "open" / "sock"
    with capture_logs() as lines, open_to_all(path) as engine:
        for method, url in (("POST", "/v1/tasks/1/retire"), ("GET", "/v2/health/live"), ("GET", "/v1/status")):
            assert ask_as(path, method, url, NOBODY, NOBODY) == b""
        assert not engine.retired
    refused = [line for line in lines if line["event"] == "peer_refused"]
    assert [line["user"] for line in refused] == [show_user(NOBODY)] * 3
    with open_to_all(path) as engine, Client(path) as client:
        assert client.status()["tasks"] == 2


@only_root
@pytest.mark.parametrize(("gid", "groups"), [(GROUP.gr_gid, ()), (NOBODY, (GROUP.gr_gid, 4))], ids=["primary", "other"])
def test_a_member_of_the_sockets_group_has_its_role(tmp_path, gid, groups):
    path = tmp_path / "open" / "sock"
    with open_to_all(path, socket_group=GROUP.gr_name, socket_group_role="submit") as engine:
        assert ask_as(path, "GET", "/v1/status", NOBODY, gid, groups).startswith(b"HTTP/1.1 200 ")
        assert ask_as(path, "POST", "/v1/scan", NOBODY, gid, groups).startswith(b"HTTP/1.1 200 ")
        assert ask_as(path, "POST", "/v1/tasks/1/retire", NOBODY, gid, groups).startswith(b"HTTP/1.1 403 ")
        assert not engine.retired
        assert ask_as(path, "GET", "/v1/status", NOBODY, NOBODY, [4]) == b""
        with Client(path) as client:  # its owner may do everything
            assert client.retire(1)["retired"]
    with open_to_all(path, socket_group=GROUP.gr_name, socket_group_role="admin") as engine:
        assert ask_as(path, "POST", "/v1/tasks/1/retire", NOBODY, gid, groups).startswith(b"HTTP/1.1 200 ")
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
