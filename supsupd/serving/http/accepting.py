"""Who gets a connection: up to the limits, in all and of each peer; whoever comes beyond them is told so at once."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import resource
import socket
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import structlog

from supsupd.serving.access import CALLER, Access
from supsupd.serving.front import Front
from supsupd.serving.http.refusals import plain_answer
from supsupd.serving.listeners import Listener

log = structlog.get_logger("supsupd.serving")
BURST = 64
"""Connections that are accepted before those that there are get their turn again."""
NO_ROOM_SECONDS = 0.5
"""How long nothing is accepted once the system has no descriptor or memory left for it."""
_NO_ROOM = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
TLS_CLOSE_SECONDS = 2.0


@dataclass(slots=True)
class Arrivals:
    """What became of all connections so far, for whoever counts it."""

    accepted: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    """By reason: full, peer, stopping, stranger, no_room, tls."""
    answered: Counter[str] = field(default_factory=Counter)
    """What the application never saw, or saw no end of, by the status of the answer."""
    cut: Counter[str] = field(default_factory=Counter)
    """By the time that was over: headers, write, shutdown."""


class Place:
    """One of the connections that there may be, from its acceptance to its end."""

    __slots__ = ("_acceptor", "peer", "state")

    def __init__(self, acceptor: Acceptor, peer: str, state: dict[str, Any]) -> None:
        self._acceptor: Acceptor | None = acceptor
        self.peer = peer
        self.state = state
        """What is known of the peer, for each request's scope."""

    def leave(self) -> None:
        """Makes room for another; once."""
        if self._acceptor is not None:
            self._acceptor.left(self.peer)
            self._acceptor = None


def raise_file_limit() -> None:
    """Lets this process have as many open files as it may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def file_limit() -> int:
    """Connections that leave half of the file descriptors to everything else, so that accepting never lacks one."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 1 << 20 if soft == resource.RLIM_INFINITY else max(1, soft // 2)


class Acceptor:
    """Accepts on listeners, in the thread of the running event loop.

    Args:
        listeners: where.
        front: has the limits.
        access: knows who may use a Unix socket.
        connect: gives the protocol of a connection that has a place.
    """

    def __init__(
        self,
        listeners: Sequence[Listener],
        front: Front,
        access: Access,
        connect: Callable[[Place], asyncio.Protocol],
    ) -> None:
        self._listeners = listeners
        self._front = front
        self._access = access
        self._connect = connect
        self._loop = asyncio.get_running_loop()
        self._starting: set[asyncio.Task[None]] = set()
        self._by_peer: Counter[str] = Counter()
        self._stopping = False
        self.arrivals = Arrivals()
        self.open = 0
        """Connections that there are."""
        self.empty = asyncio.Event()
        """Whether there are none."""
        self.empty.set()

    def start(self) -> None:
        for listener in self._listeners:
            self._loop.add_reader(listener.socket, self._accept, listener)

    def stop(self) -> None:
        """Ends listening. Whoever has been waiting to be accepted is told to try again, so that nobody is left
        without an answer; those of a socket that is not ours wait for the next who listens on it."""
        self._stopping = True
        for listener in self._listeners:
            self._loop.remove_reader(listener.socket)
            if listener.is_ours:
                listener.refuse_newcomers()
                while self._accept_one(listener):
                    pass
            listener.close()

    def give_up(self) -> None:
        """Those whose handshake is not over are closed."""
        for task in self._starting:
            task.cancel()

    def left(self, peer: str) -> None:
        self.open -= 1
        self._by_peer[peer] -= 1
        if not self._by_peer[peer]:
            del self._by_peer[peer]
        if not self.open:
            self.empty.set()

    def _accept(self, listener: Listener) -> None:
        for _ in range(BURST):
            if not self._accept_one(listener):
                return

    def _accept_one(self, listener: Listener) -> bool:
        """Whether there may be more."""
        try:
            connection, address = listener.socket.accept()
        except (BlockingIOError, InterruptedError):
            return False
        except ConnectionAbortedError:  # it was gone before its turn
            return True
        except OSError as error:
            if error.errno in _NO_ROOM:
                self._pause(listener, error)
            return False
        connection.setblocking(False)
        self._admit(connection, listener, address)
        return True

    def _pause(self, listener: Listener, error: OSError) -> None:
        # The listener stays readable: without a pause the loop would turn without end.
        self.arrivals.refused["no_room"] += 1
        log.error("no_room_to_accept", listener=listener.address, reason=error.strerror)
        if not self._stopping:
            self._loop.remove_reader(listener.socket)
            self._loop.call_later(NO_ROOM_SECONDS, self._resume, listener)

    def _resume(self, listener: Listener) -> None:
        if not self._stopping:
            self._loop.add_reader(listener.socket, self._accept, listener)

    def _admit(self, connection: socket.socket, listener: Listener, address: Any) -> None:
        limits = self._front.limits
        if self._stopping:
            self._refuse(connection, listener, "stopping", "the server is stopping")
        elif self.open >= (most := min(limits.max_connections, file_limit())):
            self._refuse(connection, listener, "full", f"there are {most} connections")
        else:
            peer, state = address[0] if address else "", {}
            if listener.is_unix:
                caller = self._access.caller_of_unix(connection)
                if caller is None:
                    self.arrivals.refused["stranger"] += 1
                    connection.close()
                    return
                peer, state = caller.name or "", {CALLER: caller}
            if self._by_peer[peer] >= limits.max_peer_connections:
                most = limits.max_peer_connections
                self._refuse(connection, listener, "peer", f"there are {most} connections of yours")
            else:
                self._begin(connection, listener, Place(self, peer, state))

    def _refuse(self, connection: socket.socket, listener: Listener, reason: str, text: str) -> None:
        self.arrivals.refused[reason] += 1
        with connection, contextlib.suppress(OSError):
            if listener.tls is None:
                connection.send(plain_answer(503, f"unavailable: {text}"))
                connection.shutdown(socket.SHUT_WR)
                connection.recv(1 << 16)  # what is left unread at the close would take the answer with it

    def _begin(self, connection: socket.socket, listener: Listener, place: Place) -> None:
        self.arrivals.accepted += 1
        self.open += 1
        self._by_peer[place.peer] += 1
        self.empty.clear()
        task = self._loop.create_task(self._open(connection, listener, place))
        self._starting.add(task)  # the loop itself holds tasks weakly
        task.add_done_callback(self._starting.discard)

    async def _open(self, connection: socket.socket, listener: Listener, place: Place) -> None:
        options: dict[str, Any] = {}
        if listener.tls is not None:
            patience = self._front.limits.header_seconds
            options = {"ssl_handshake_timeout": patience, "ssl_shutdown_timeout": TLS_CLOSE_SECONDS}
        try:
            if not listener.is_unix:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await self._loop.connect_accepted_socket(
                lambda: self._connect(place), connection, ssl=listener.tls, **options
            )
        except (OSError, asyncio.CancelledError) as error:  # SSLError and TimeoutError too: this is no TLS of ours
            self.arrivals.refused["tls" if listener.tls else "gone"] += 1
            log.debug("connection_failed", peer=place.peer, reason=str(error))
            connection.close()
            place.leave()
