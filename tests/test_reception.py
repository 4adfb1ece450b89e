"""What the settings name is listened on, all of it or nothing."""

import grp
import os
import socket
import stat

import httpx
import pytest
from raw_http import LIVE
from tiny_engine import TinyEngine

from supsupd.config import ConfigError, load_settings
from supsupd.reception import open_server
from supsupd.serving.front import Front
from supsupd.serving.listeners import SocketInUse, SocketRefused


@pytest.fixture
def open_for(tmp_path):
    """Opens a server for settings; it is closed at the end."""
    opened = []

    def make(handed=(), **more):
        (tmp_path / "watch").mkdir(exist_ok=True)
        places = {"watch": [tmp_path / "watch"], "state": tmp_path / "state", "socket": tmp_path / "run" / "s.sock"}
        settings = load_settings(places | more)
        opened.append(open_server(settings, Front(TinyEngine(), settings.serving), handed))
        opened[-1].start()
        return opened[-1]

    yield make
    for server in opened:
        server.stop(1.0)


def lives(transport=None, host="localhost"):
    with httpx.Client(transport=transport) as client:
        return client.get(f"http://{host}{LIVE}").status_code == 200


def test_unix_socket_and_tcp_answer_beside_each_other(open_for, tmp_path):
    server = open_for(http="127.0.0.1:0")
    path, address = server.addresses
    assert path == str(tmp_path / "run" / "s.sock")
    assert lives(httpx.HTTPTransport(uds=path))
    assert lives(host=address)


def test_where_one_thing_cannot_be_listened_on_nothing_is_left(open_for, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        with pytest.raises(SocketInUse):
            open_for(http=f"127.0.0.1:{taken.getsockname()[1]}")
        assert not (tmp_path / "run" / "s.sock").exists()
        with pytest.raises(SocketRefused):
            open_for(grpc=f"127.0.0.1:{taken.getsockname()[1]}")
        assert not (tmp_path / "run" / "s.sock").exists()


def test_a_socket_of_a_group_is_the_groups_and_so_is_the_folder_made_for_it(open_for, tmp_path):
    group = grp.getgrgid(os.getgid())
    open_for(serving={"socket_group": group.gr_name})
    for path, mode in ((tmp_path / "run", 0o750), (tmp_path / "run" / "s.sock", 0o660)):
        assert (stat.S_IMODE(path.stat().st_mode), path.stat().st_gid) == (mode, group.gr_gid)


def test_handed_sockets_take_the_place_of_our_own_and_outlive_us(open_for, tmp_path):
    with socket.socket(socket.AF_UNIX) as unix, socket.create_server(("127.0.0.1", 0)) as tcp:
        unix.bind(str(tmp_path / "theirs"))
        unix.listen()
        server = open_for([unix.dup(), tcp.dup()], http="127.0.0.1:1")
        assert server.addresses == [str(tmp_path / "theirs"), f"127.0.0.1:{tcp.getsockname()[1]}"]
        assert lives(httpx.HTTPTransport(uds=str(tmp_path / "theirs")))
        assert not (tmp_path / "run").exists()
        server.stop(1.0)
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(tmp_path / "theirs"))
            assert unix.accept()


def test_a_handed_socket_that_others_reach_needs_tls(open_for):
    with socket.create_server(("0.0.0.0", 0)) as public, pytest.raises(ConfigError, match="LISTEN_FDS: given "):
        open_for([public])
