"""The servers that `serve_peers.py` and `serve_crowd.py` ask over TCP, each a process of its own."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from common import DaemonProcess
from local_daemon import own_environment, script

from supsupd.client import Client

CANNED = Path(__file__).resolve().with_name("canned_server.py")
TICKS = os.sysconf("SC_CLK_TCK")


class ServerFailed(Exception):
    """A server did not start, ended, or did not answer as it should."""


@dataclass(frozen=True)
class Server:
    """A running server.

    Args:
        address: HOST:PORT.
        pid: its first process.
        headers: what lets a request in.
    """

    address: str
    pid: int
    headers: dict[str, str] = field(default_factory=dict)

    def cpu_seconds(self) -> float:
        """The processor time that it and its children have taken."""
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text(encoding="utf-8").split()
        stats = [Path(f"/proc/{pid}/stat").read_text(encoding="utf-8") for pid in (self.pid, *children)]
        fields = [stat.rsplit(")", 1)[1].split() for stat in stats]  # from the state on, the third
        return sum(int(found[11]) + int(found[12]) for found in fields) / TICKS


@contextmanager
def daemon_on_tcp(state: Path, settings: str = "") -> Iterator[tuple[DaemonProcess, Server]]:
    """A daemon with a copy of `state`, over TCP with a token, beside its Unix socket; `settings`: further TOML."""
    (port,) = free_ports(1)
    with tempfile.TemporaryDirectory(prefix="supsupd-") as name:
        root = Path(name)
        shutil.copytree(state, root / "state")
        config = root / "supsupd.toml"
        config.write_text(f'http = "127.0.0.1:{port}"\n{settings}', encoding="utf-8")
        command = [script("supsupd"), "token", "create", "--role", "predict", "--state", root / "state"]
        made = subprocess.run(command, check=True, capture_output=True, text=True, env=own_environment())
        daemon = DaemonProcess(root, config)
        try:
            daemon.await_ready()
            with Client(daemon.socket) as client:
                pid = client.status()["pid"]
            yield daemon, Server(f"127.0.0.1:{port}", pid, {"Authorization": f"Bearer {made.stdout.split()[-1]}"})
        except Exception as error:
            error.add_note(f"the end of the daemon's log:\n{daemon.tail()}")
            raise
        finally:
            daemon.stop()


@contextmanager
def canned_server(folder: Path, answer: bytes) -> Iterator[Server]:
    """One that does nothing but answer everything so."""
    path = folder / "answer"
    path.write_bytes(answer)
    with subprocess.Popen([sys.executable, CANNED, path], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield Server(f"127.0.0.1:{int(process.stdout.readline())}", process.pid)
        finally:
            process.terminate()


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that nothing listens on now."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [listener.getsockname()[1] for listener in sockets]
    for listener in sockets:
        listener.close()
    return ports
