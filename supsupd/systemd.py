"""The daemon's side of systemd: telling it what we do (`sd_notify`), and taking over sockets that it listens on.

Both are plain conventions of environment variables. They are removed once read: a child must not speak for us, nor
take our descriptors for its own.
"""

from __future__ import annotations

import math
import os
import socket
import time

import structlog

from streams.names import printable

FIRST_DESCRIPTOR = 3

log = structlog.get_logger("supsupd.systemd")


class SocketsUnusable(Exception):
    """What was handed over cannot be served on; the text is one line."""


class Supervisor:
    """Whoever waits to hear of us: systemd, or nobody, and then nothing is said.

    Args:
        address: of a datagram socket, a path or @ and an abstract name; None: nobody listens.
        watchdog_seconds: how often at least it wants to hear `alive`; None: it does not.
    """

    def __init__(self, address: str | None = None, watchdog_seconds: float | None = None) -> None:
        self._address = "\0" + address[1:] if address and address.startswith("@") else address
        self._is_watching = watchdog_seconds is not None
        self.ping_seconds = math.inf if watchdog_seconds is None else watchdog_seconds / 2
        """How often at least to say `alive`."""

    @classmethod
    def from_environment(cls) -> Supervisor:
        """The one that the environment names, which is removed from it."""
        address = os.environ.pop("NOTIFY_SOCKET", None)
        microseconds = os.environ.pop("WATCHDOG_USEC", "")
        whose = os.environ.pop("WATCHDOG_PID", str(os.getpid()))
        watched = address and whose == str(os.getpid()) and microseconds.isdigit() and int(microseconds) > 0
        return cls(address, int(microseconds) / 1e6 if watched else None)

    def ready(self, status: str) -> None:
        self._tell("READY=1", f"STATUS={status}")

    def reloading(self) -> None:
        """`ready` ends it."""
        self._tell("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def stopping(self) -> None:
        self._tell("STOPPING=1")

    def status(self, text: str) -> None:
        """A line for `systemctl status`."""
        self._tell(f"STATUS={text}")

    def alive(self) -> None:
        if self._is_watching:
            self._tell("WATCHDOG=1")

    def _tell(self, *lines: str) -> None:
        if self._address is None:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as to:
                to.setblocking(False)
                to.sendto("\n".join(map(printable, lines)).encode(), self._address)  # paths may have any bytes
        except OSError as error:  # a supervisor that hears nothing acts by itself; work goes on
            log.warning("notify_failed", said=lines[0], reason=str(error))


def take_sockets() -> list[socket.socket]:
    """The listening stream sockets that were handed over at the start (`LISTEN_FDS`), Unix and TCP ones.

    Raises SocketsUnusable for anything else among them.
    """
    count, whose = os.environ.pop("LISTEN_FDS", "0"), os.environ.pop("LISTEN_PID", "")
    names = os.environ.pop("LISTEN_FDNAMES", "").split(":")
    if whose != str(os.getpid()) or not count.isdigit():
        return []
    descriptors = range(FIRST_DESCRIPTOR, FIRST_DESCRIPTOR + int(count))
    return [_adopt(fd, names[i] if i < len(names) else "") for i, fd in enumerate(descriptors)]


def _adopt(descriptor: int, name: str) -> socket.socket:
    wanted = f"LISTEN_FDS: descriptor {descriptor} ({name or 'without a name'})"
    try:
        os.set_inheritable(descriptor, False)
        adopted = socket.socket(fileno=descriptor)
        listens = adopted.type == socket.SOCK_STREAM and adopted.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    except OSError as error:
        raise SocketsUnusable(f"{wanted} is no socket: {error.strerror}") from None
    if not listens or adopted.family not in (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6):
        raise SocketsUnusable(f"{wanted}: expected a stream socket that listens, Unix or TCP (ListenStream=)")
    adopted.setblocking(False)
    return adopted
