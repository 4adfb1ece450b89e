"""A real daemon over TCP: what it writes is its user's alone, and no token is ever in its log."""

import grp
import os
import stat

import httpx
import pytest
from credentials import REFUSED, Credentials
from daemon_process import QUICK, DaemonProcess
from digits import draw, held_out
from tcp_daemon import tcp_addresses

from supsupd.choices import ROLES
from supsupd.client import Client

GROUP = next(group for group in grp.getgrall() if group.gr_gid in os.getgroups() or os.geteuid() == 0)
OF_A_GROUP = f'[serving]\nsocket_group = "{GROUP.gr_name}"\n'


class SafeDaemon(DaemonProcess):
    """Started under a umask; it makes run/ and predictions/ by itself."""

    def __init__(self, folder, umask, config):
        flags = ["--http", "127.0.0.1:0", "--predictions", folder / "predictions"]
        super().__init__(folder, *flags, config=QUICK + config)
        self.umask = umask
        self.socket = folder / "run" / "deep" / "sock"
        self.client = Client(self.socket)
        self.credentials = Credentials(self.state)
        self.made = [self.state, folder / "run", folder / "predictions"]

    def launch(self):
        before = os.umask(self.umask)
        try:
            return super().launch()
        finally:
            os.umask(before)


@pytest.fixture(scope="module", params=[(0o000, ""), (0o077, OF_A_GROUP)], ids=["000", "077 and a group"])
def daemon(request, tmp_path_factory):
    """It has learned a task, and written down what it says to unlabelled rows."""
    with SafeDaemon(tmp_path_factory.mktemp("safe"), *request.param) as daemon:
        for turn in range(3):
            daemon.drop(f"{turn}", **draw(0, turn))
        daemon.drop("asked", x=held_out(0)[0][:5])
        daemon.start().wait()
        yield daemon


def test_all_that_is_made_is_the_users_alone_whatever_the_umask(daemon):
    paths = {path for folder in daemon.made for path in (folder, *folder.rglob("*")) if not path.is_socket()}
    assert {"supsup.db", "lock", "tokens.json", "spool", "asked.npz.json", "run"} <= {path.name for path in paths}
    for path in paths - {daemon.socket.parent}:
        assert mode_of(path) == (0o700 if path.is_dir() else 0o600), path


def test_the_socket_is_its_owners_or_its_groups(daemon):
    status = daemon.socket.stat()
    if OF_A_GROUP in daemon.config.read_text():
        assert (mode_of(daemon.socket), status.st_gid) == (0o660, GROUP.gr_gid)
        assert (mode_of(daemon.socket.parent), daemon.socket.parent.stat().st_gid) == (0o750, GROUP.gr_gid)
    else:
        assert (mode_of(daemon.socket), mode_of(daemon.socket.parent)) == (0o600, 0o700)


def test_no_token_is_in_the_log_whatever_was_sent(daemon):
    (address,) = tcp_addresses(daemon)
    credentials = daemon.credentials
    with httpx.Client(base_url=f"http://{address}", trust_env=False) as client:
        for state in REFUSED:
            headers = [("Authorization", value) for value in credentials.refused[state]]
            assert client.get("/v1/status", headers=headers).status_code == 401
        for role in ROLES:
            for path in ("/v1/status", "/v1/status?trash=1", "/none", f"/v1/status?token={credentials.granted[role]}"):
                client.post(path, headers={"Authorization": credentials.granted[role]})
                client.get(path)
        admin = {"Authorization": credentials.granted["admin"]}
        assert client.post("/v1/tasks/1/retire", headers=admin).status_code == 200
        assert client.post("/v1/tasks/1/reopen", headers=admin).status_code == 200
    log = daemon.log.read_text()
    assert [secret for secret in credentials.secrets if secret in log] == []
    assert "Bearer" not in log


def mode_of(path):
    return stat.S_IMODE(path.lstat().st_mode)
