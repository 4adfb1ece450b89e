"""Under systemd: what it is told, and when it is told nothing; sockets that it made. Its side is a real socket here."""

import contextlib
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from daemon_process import BIN, START_SECONDS, STOP_SECONDS, WAIT_SECONDS, DaemonProcess, until

from supsupd.client import Client
from supsupd.systemd import Supervisor, take_sockets

LAUNCHER = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.environ["LISTEN_PID"] = str(os.getpid())
os.execv(sys.argv[2], sys.argv[2:])
"""
"""systemd knows the process id before the program begins; a test has to learn it in between."""


class Manager:
    """Whom a service speaks to, over a datagram socket at `path`. A context manager.

    It listens all the time: the system keeps few messages that nobody has read, and the service does not wait.
    """

    def __init__(self, path):
        self.path = str(path)
        self._messages = queue.SimpleQueue()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(self.path)
        self._listening = threading.Thread(target=self._listen)

    def __enter__(self):
        self._listening.start()
        return self

    def __exit__(self, *_):
        self._send(b"")
        self._listening.join()
        self._socket.close()

    def _send(self, message):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sending:
            sending.sendto(message, self.path)

    def _listen(self):
        while message := self._socket.recv(4096):
            self._messages.put(message.decode())

    def told(self, beginning, seconds=WAIT_SECONDS):
        """The next message that begins so, as a dictionary; queue.Empty."""
        while not (message := self._messages.get(timeout=seconds)).startswith(beginning):
            pass
        return dict(line.split("=", 1) for line in message.splitlines())

    def skip(self):
        """Nothing that was said up to now is told."""
        self._send(b"SKIPPED=")
        self.told("SKIPPED=")


@pytest.fixture
def manager(tmp_path):
    with Manager(tmp_path / "notify") as listening:
        yield listening


@contextlib.contextmanager
def listening(path):
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as made:
        made.bind(str(path))
        made.listen()
        yield made


def test_the_whole_life_is_told(tmp_path, manager, monkeypatch):
    monkeypatch.setenv("NOTIFY_SOCKET", manager.path)
    monkeypatch.setenv("WATCHDOG_USEC", "400000")
    with DaemonProcess(tmp_path) as daemon:
        daemon.launch()
        assert str(daemon.socket) in manager.told("READY=1")["STATUS"]
        assert daemon.answers()
        for _ in range(3):
            manager.told("WATCHDOG=1")
        assert_silent_while_it_stands_still(daemon.process, manager)
        before = time.monotonic_ns() // 1000
        daemon.process.send_signal(signal.SIGHUP)
        assert int(manager.told("RELOADING=1")["MONOTONIC_USEC"]) >= before
        manager.told("READY=1")
        children = subprocess.check_output(["ps", "-o", "pid=", "--ppid", str(daemon.process.pid)], text=True).split()
        assert children
        for pid in children:
            environment = Path(f"/proc/{pid}/environ").read_bytes()
            assert b"NOTIFY_SOCKET" not in environment
            assert b"WATCHDOG" not in environment
        assert daemon.stop() == 0
        manager.told("STOPPING=1")


def assert_silent_while_it_stands_still(process, manager):
    process.send_signal(signal.SIGSTOP)
    until(lambda: "T (stopped)" in Path(f"/proc/{process.pid}/status").read_text())
    manager.skip()
    with pytest.raises(queue.Empty):
        manager.told("", seconds=0.5)
    process.send_signal(signal.SIGCONT)
    manager.told("WATCHDOG=1")


def test_a_socket_that_was_made_before_is_served_and_stays(tmp_path):
    """Whoever connects while nobody serves waits, also from one daemon to the next."""
    with listening(tmp_path / "sock") as made, Client(tmp_path / "sock", timeout=START_SECONDS) as client:
        for _ in range(2):
            process = start_with(tmp_path, made)
            try:
                assert client.status()["pid"] == process.pid
                process.send_signal(signal.SIGTERM)
                assert process.wait(STOP_SECONDS) == 0
            finally:
                process.kill()
        assert (tmp_path / "sock").is_socket()


def test_what_is_handed_over_and_cannot_be_served_on_is_refused(tmp_path):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as made:
        made.bind(str(tmp_path / "sock"))
        process = start_with(tmp_path, made)
        assert process.wait(START_SECONDS) == 78
    (line,) = (line for line in (tmp_path / "log").read_text().splitlines() if "LISTEN_FDS" in line)
    assert "expected a stream socket that listens" in line


def start_with(folder, handed):
    """A daemon that finds the socket as descriptor 3, as systemd hands it over."""
    (folder / "watch").mkdir(exist_ok=True)
    program = [BIN / "supsupd", "start", "--watch", folder / "watch", "--state", folder / "state"]
    command = [sys.executable, "-c", LAUNCHER, str(handed.fileno()), *program, "--socket", folder / "sock"]
    environment = os.environ | {"LISTEN_FDS": "1", "LISTEN_FDNAMES": "supsupd.socket"}
    with (folder / "log").open("ab") as log:
        return subprocess.Popen(command, env=environment, pass_fds=[handed.fileno()], stdout=log, stderr=log, cwd="/")


def test_what_the_environment_says_is_taken_once(monkeypatch, tmp_path, manager):
    monkeypatch.setenv("NOTIFY_SOCKET", manager.path)
    monkeypatch.setenv("WATCHDOG_USEC", "3000000")
    monkeypatch.setenv("LISTEN_FDS", "1")
    monkeypatch.setenv("LISTEN_PID", str(os.getpid() + 1))
    supervisor = Supervisor.from_environment()
    assert supervisor.ping_seconds == 1.5
    supervisor.status("waits")
    assert manager.told("") == {"STATUS": "waits"}
    assert take_sockets() == []  # meant for another process
    assert not {"NOTIFY_SOCKET", "WATCHDOG_USEC", "LISTEN_FDS", "LISTEN_PID"} & os.environ.keys()
    Supervisor.from_environment().alive()  # nobody listens: nothing happens


def test_a_watchdog_of_another_process_is_not_ours(monkeypatch, manager):
    monkeypatch.setenv("NOTIFY_SOCKET", manager.path)
    monkeypatch.setenv("WATCHDOG_USEC", "3000000")
    monkeypatch.setenv("WATCHDOG_PID", "1")
    assert Supervisor.from_environment().ping_seconds == float("inf")


def test_a_manager_that_has_gone_disturbs_nobody(tmp_path):
    Supervisor(str(tmp_path / "nobody")).ready("serves")


def test_a_path_of_any_bytes_is_one_line_of_what_is_told(manager):
    Supervisor(manager.path).ready("serves on /a\udce9\nMAINPID=1")
    assert manager.told("READY=1") == {"READY": "1", "STATUS": "serves on /a\\udce9\\nMAINPID=1"}
