"""A real daemon over loopback TCP, with a token, that has learned three tasks."""

import json
import subprocess
from contextlib import contextmanager

from daemon_process import BIN, DaemonProcess
from learned_state import learn_stream


def token_for(state, role="admin"):
    """A new token, as an operator makes one."""
    command = [BIN / "supsupd", "token", "create", "--role", role, "--state", state]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]


def listening(daemon):
    """What the daemon says that it listens on, by the scheme of each address."""
    for line in reversed(daemon.log.read_text().splitlines()):
        if line.startswith("{") and (told := json.loads(line))["event"] == "ready":
            return told["listening"]
    raise AssertionError("the daemon is not ready")


@contextmanager
def tcp_daemon(folder, *flags):
    """(daemon, its HOST:PORT for HTTP, a token for the role admin)."""
    learn_stream(folder)
    (folder / "state").chmod(0o700)
    token = token_for(folder / "state")
    with DaemonProcess(folder, "--http", "127.0.0.1:0", *flags) as daemon:
        daemon.start()
        yield daemon, listening(daemon), token
