"""A real daemon over loopback TCP, with a token, that has learned three tasks."""

import subprocess
from contextlib import contextmanager

from daemon_process import BIN, DaemonProcess, until
from learned_state import learn_stream


def token_for(state, role="admin"):
    """A new token, as an operator makes one."""
    command = [BIN / "supsupd", "token", "create", "--role", role, "--state", state]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]


def tcp_addresses(daemon):
    """HOST:PORT of everything that the daemon says it listens on over TCP."""
    *_, ready = until(lambda: daemon.events("ready"))  # it answers a little before it says so
    return [address for address in ready["listening"] if not address.startswith(("/", "unix:"))]


@contextmanager
def tcp_daemon(folder, *flags):
    """(daemon, its HOST:PORT for HTTP, a token for the role admin)."""
    learn_stream(folder)
    (folder / "state").chmod(0o700)
    token = token_for(folder / "state")
    with DaemonProcess(folder, "--http", "127.0.0.1:0", *flags) as daemon:
        daemon.start()
        yield daemon, tcp_addresses(daemon)[0], token
