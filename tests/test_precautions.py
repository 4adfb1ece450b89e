"""What keeps the daemon from starting: each set-up that is not safe, refused in one line that says how to mend it."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from certificates import Authority

from supsupd.precautions import is_loopback
from supsupd.serving.peer import show_user
from supsupd.tokens import Tokens

BIN = Path(sys.executable).parent
NOBODY = 65534
ME = show_user(os.geteuid())
only_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can make what is another user's")
SET_UPS = []


def set_up(*marks):
    """Registers what makes `place` unsafe, and gives the flags and the lines that are told."""

    def register(make):
        SET_UPS.append(pytest.param(make, id=make.__name__, marks=marks))
        return make

    return register


class Place:
    """Where a daemon would be safe to start: its state, its socket in run/, its configuration."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.watch, self.state, self.socket = folder / "in", folder / "state", folder / "run" / "sock"
        self.config = folder / "config.toml"
        for made in (self.watch, self.state, self.socket.parent):
            made.mkdir(mode=0o700)
        self.config.touch()
        self.tokens = Tokens(self.state)

    def start(self, *flags):
        paths = ["--watch", self.watch, "--state", self.state, "--socket", self.socket, "--config", self.config]
        command = [BIN / "supsupd", "start", *paths, *flags]
        return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path)


@set_up()
def state_that_all_may_write_to(place):
    place.state.chmod(0o777)
    yield "command line: --state"
    yield f": given {place.state} (mode 0777), which others may write to; expected a folder of {ME} alone;"
    yield f" run: chmod go-w {place.state}"


@set_up()
def state_that_a_group_may_write_to(place):
    place.state.chmod(0o770)
    yield "command line: --state"
    yield f": given {place.state} (mode 0770), which others may write to; expected a folder of {ME} alone;"
    yield f" run: chmod go-w {place.state}"


@set_up()
def state_that_is_a_symbolic_link(place):
    place.state.rename(place.folder / "real")
    place.state.symlink_to(place.folder / "real")
    yield f"command line: --state: given {place.state}, a symbolic link; expected the folder itself;"
    yield f" set state to {place.folder / 'real'}"


@set_up()
def state_that_is_a_file(place):
    place.state.rmdir()
    place.state.touch()
    yield f"command line: --state: given {place.state}, which is not a folder; expected a folder, or nothing there yet"


@set_up(only_root)
def state_of_another_user(place):
    os.chown(place.state, NOBODY, NOBODY)
    yield "command line: --state"
    yield f": given {place.state} of nobody (65534); expected a folder of root (0); run this as its owner,"
    yield f" or: chown -R 0 {place.state}"


@set_up()
def tokens_that_others_may_read(place):
    place.tokens.create("predict")
    place.tokens.path.chmod(0o644)
    yield f"tokens: {place.tokens.path} is open to others (mode 0644); run: chmod 600 {place.tokens.path}"


@set_up()
def tokens_behind_a_symbolic_link(place):
    place.tokens.create("predict")
    place.tokens.path.rename(place.folder / "tokens")
    place.tokens.path.symlink_to(place.folder / "tokens")
    yield f"tokens: {place.tokens.path} is a symbolic link; put the file itself there"


@set_up(only_root)
def tokens_of_another_user(place):
    place.tokens.create("predict")
    os.chown(place.tokens.path, NOBODY, NOBODY)
    yield f"tokens: {place.tokens.path} belongs to another user; remove it, and make new tokens"


@set_up()
def tokens_that_are_damaged(place):
    place.tokens.create("predict")
    place.tokens.path.write_text('{"version": 1, "tokens": [{"id": "secret"')
    yield f"tokens: {place.tokens.path} is not a file of tokens; restore it, or remove it and make new"


@set_up()
def http_without_a_token(place):
    yield ["--http", "127.0.0.1:8000"]
    yield "command line: --http"
    yield f": given 127.0.0.1:8000 without any valid token in {place.tokens.path}; expected one at least;"
    yield f" run: supsupd token create --role predict --state {place.state}"


@set_up()
def grpc_with_an_expired_token(place):
    place.tokens.create("predict", days=1)
    place.tokens.path.write_text(place.tokens.path.read_text().replace('"expires": "20', '"expires": "19'))
    place.config.write_text('grpc = "localhost:8001"\n')
    yield f"{place.config}:1: grpc"
    yield f": given localhost:8001 without any valid token in {place.tokens.path}; expected one at least;"
    yield f" run: supsupd token create --role predict --state {place.state}"


@set_up()
def http_for_other_machines_without_tls(place):
    place.tokens.create("predict")
    yield ["--http", "0.0.0.0:8000"]
    yield "command line: --http"
    yield ": given 0.0.0.0:8000, which other machines may reach, without TLS; expected a loopback address"
    yield " such as 127.0.0.1:8000; or set tls.certificate and tls.key"


@set_up()
def http_by_a_name_without_tls(place):
    place.tokens.create("predict")
    yield ["--http", "box.example:8000"]
    yield "command line: --http"
    yield ": given box.example:8000, which other machines may reach, without TLS; expected a loopback address"
    yield " such as 127.0.0.1:8000; or set tls.certificate and tls.key"


@set_up()
def a_certificate_without_a_key(place):
    issued = Authority(place.folder).issue()
    place.config.write_text(f'[tls]\ncertificate = "{issued.certificate}"\n')
    yield f"{place.config}:1: tls.key: given nothing; expected a PEM file, since tls.certificate is set"


@set_up()
def a_key_without_a_certificate(place):
    issued = Authority(place.folder).issue()
    place.config.write_text(f'[tls]\nkey = "{issued.key}"\n')
    yield f"{place.config}:1: tls.certificate: given nothing; expected a PEM file, since tls.key is set"


@set_up()
def a_certificate_that_is_missing(place):
    issued = Authority(place.folder).issue()
    place.config.write_text(f'[tls]\ncertificate = "/none.pem"\nkey = "{issued.key}"\n')
    yield f"{place.config}:2: tls.certificate"
    yield f": given /none.pem: No such file or directory; expected a PEM file that {ME} can read"


@set_up()
def a_key_that_others_may_read(place):
    issued = Authority(place.folder).issue()
    issued.key.chmod(0o644)
    place.config.write_text(f'[tls]\ncertificate = "{issued.certificate}"\nkey = "{issued.key}"\n')
    yield f"{place.config}:3: tls.key"
    yield f": given {issued.key} (mode 0644), open to others; expected 0600; run: chmod 600 {issued.key}"


@set_up()
def a_key_of_another_certificate(place):
    authority = Authority(place.folder)
    issued, other = authority.issue(), authority.issue("other")
    place.config.write_text(f'[tls]\ncertificate = "{issued.certificate}"\nkey = "{other.key}"\n')
    yield f"{place.config}:2: tls.certificate, {place.config}:3: tls.key: given {issued.certificate} and {other.key};"
    yield " expected PEM files that belong together and need no password: KEY_VALUES_MISMATCH"


@set_up(only_root)
def a_socket_in_another_users_folder(place):
    os.chown(place.socket.parent, NOBODY, NOBODY)
    yield "command line: --socket"
    yield f": given {place.socket} in a folder of nobody (65534), who could replace it; expected a folder of"
    yield " root (0) or root; choose another"


@set_up()
def a_socket_in_a_folder_that_all_may_write_to(place):
    place.socket.parent.chmod(0o777)
    yield "command line: --socket"
    yield f": given {place.socket} in a folder where anybody could replace it (mode 0777); expected one that"
    yield f" others do not write to; run: chmod o-w {place.socket.parent}"


@set_up()
def a_file_where_the_socket_goes(place):
    place.socket.touch()
    yield "command line: --socket"
    yield f": given {place.socket}, which is not a socket and is left alone; expected a socket, or nothing there"


@set_up(only_root)
def a_socket_of_another_user(place):
    with socket.socket(socket.AF_UNIX) as foreign:
        foreign.bind(str(place.socket))
    os.chown(place.socket, NOBODY, NOBODY)
    yield "command line: --socket"
    yield f": given {place.socket}, a socket of nobody (65534); expected nothing there; choose another path"


@set_up()
def a_file_where_the_socket_of_grpc_goes(place):
    place.config.write_text(f'grpc_socket = "{place.config}"\n')
    yield f"{place.config}:1: grpc_socket"
    yield f": given {place.config}, which is not a socket and is left alone; expected a socket, or nothing"
    yield " there"


@set_up()
def a_group_that_there_is_not(place):
    place.config.write_text('[serving]\nsocket_group = "nosuchgroup"\n')
    yield f"{place.config}:2: serving.socket_group"
    yield ": given 'nosuchgroup'; expected a group of this system; run: groupadd nosuchgroup"


@pytest.mark.parametrize("make", SET_UPS)
def test_an_unsafe_set_up_is_refused_with_the_way_to_mend_it(place, make):
    said = list(make(place))
    flags = said.pop(0) if isinstance(said[0], list) else []
    before = tree_of(place.folder)
    result = place.start(*flags)
    assert (result.returncode, result.stdout, result.stderr) == (78, "", "".join(said) + "\n")
    assert tree_of(place.folder) == before


def test_every_unsafe_thing_is_told_at_once(place):
    place.state.chmod(0o777)
    place.config.write_text('[serving]\nsocket_group = "nosuchgroup"\n')
    result = place.start("--http", "0.0.0.0:80")
    assert [line.partition(": given ")[0] for line in result.stderr.splitlines()] == [
        "command line: --state",
        "command line: --http",
        "command line: --http",
        f"{place.config}:2: serving.socket_group",
    ]


def test_what_is_unsafe_is_named_by_where_it_was_set(place):
    environment = {**os.environ, "SUPSUPD_GRPC": "10.0.0.1:9"}
    place.tokens.create("predict")
    place.config.write_text('\n# for all\nhttp = "0.0.0.0:8000"\n')
    command = [BIN / "supsupd", "config", "check", "--watch", place.watch, "--config", place.config]
    places = ["--state", place.state, "--socket", place.socket]
    result = subprocess.run([*command, *places], capture_output=True, text=True, timeout=60, env=environment)
    assert [line.partition(": given ")[0] for line in result.stderr.splitlines()] == [
        f"{place.config}:3: http",
        "environment: SUPSUPD_GRPC",
    ]


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "localhost", "LOCALHOST", "::1"])
def test_an_address_that_only_this_machine_reaches_needs_no_tls(host):
    assert is_loopback(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "localhost.evil.example", "127.0.0.1.evil", "127.1"])
def test_any_other_address_does(host):
    assert not is_loopback(host)


def tree_of(folder):
    return {path: (path.lstat().st_mode, path.lstat().st_mtime_ns) for path in sorted(folder.rglob("*"))}
