"""Serving: one event loop in a thread of its own, from the first connection to the end of the last."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from email.utils import format_datetime
from typing import Protocol

import structlog
import uvicorn
import uvloop
from starlette.types import ASGIApp

from supsupd.serving.access import Access
from supsupd.serving.front import Front
from supsupd.serving.http.accepting import Acceptor, Arrivals, Place
from supsupd.serving.http.connection import Connection, Shared
from supsupd.serving.listeners import Listener

log = structlog.get_logger("supsupd.serving")
QUIET_SECONDS = 0.05
"""How long a server that stops still reads from connections that are idle: a request on its way is told so."""
CUT_SECONDS = 0.5
"""How long those that are cut off may take to end."""


class BesideHttp(Protocol):
    """What lives and ends with the server, in its event loop."""

    async def start(self) -> None:
        """Returns once it serves."""

    async def stop(self, grace: float) -> None:
        """Refuses what is new, and gives the rest `grace` seconds."""


class Server:
    """Serves `app`, and `services` beside it, from its own thread; signals stay with the main thread.

    Args:
        front: has the limits, and says whether the server drains.
        app: answers requests.
        listeners: where; they are closed at the end.
        services: started and stopped with the server.
        access: knows who may use a Unix socket.
    """

    def __init__(
        self,
        front: Front,
        app: ASGIApp,
        listeners: Sequence[Listener],
        services: Sequence[BesideHttp] = (),
        access: Access | None = None,
    ) -> None:
        self._front = front
        self._access = access or Access(lambda: front.limits)
        self.listeners = listeners
        self._services = services
        self._shared = Shared(front, _protocol_config(app))
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        self._grace = 0.0
        self._failure: Exception | None = None
        self._settled = threading.Event()
        self._turned = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="supsupd-http", daemon=True)

    @property
    def alive(self) -> bool:
        """Whether the thread runs; False after `start` and before `stop` means that serving has failed."""
        return self._thread.is_alive()

    @property
    def arrivals(self) -> Arrivals:
        """What became of the connections so far."""
        return self._shared.arrivals

    @property
    def open_connections(self) -> int:
        return len(self._shared.connections)

    @property
    def silent_seconds(self) -> float:
        """For how long the event loop has done nothing; where all is well, hardly more than a second."""
        return time.monotonic() - self._turned

    @property
    def addresses(self) -> list[str]:
        """What is listened on for HTTP: paths, and HOST:PORT as they were bound."""
        return [listener.address for listener in self.listeners]

    def start(self) -> None:
        """Returns once requests are answered. Raises what kept it, or a service, from starting."""
        self._thread.start()
        self._settled.wait()
        if self._failure is not None:
            self.stop(0.0)
            raise self._failure

    def join(self, timeout: float) -> None:
        """Waits so many seconds, or until the thread has ended."""
        self._thread.join(timeout)

    def stop(self, timeout: float = 8.0) -> bool:
        """Removes the socket files, gives the requests in progress `timeout` seconds to end, then refuses them.
        Returns whether the thread has ended."""
        self._front.draining = True
        for listener in self.listeners:
            listener.remove_file()
        if self._loop is not None and self._stop is not None and self.alive:
            self._grace = timeout
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join(timeout + 2 * CUT_SECONDS)
        for listener in self.listeners:
            listener.close()
        return not self.alive

    def _run(self) -> None:
        try:
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runner.run(self._serve())
        except Exception as error:  # the thread's edge: whoever started it is told, or sees it in `alive`
            self._failure = error
            if self._settled.is_set():
                log.exception("http_server_failed")
        finally:
            self._settled.set()

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        acceptor = Acceptor(self.listeners, self._front, self._access, self._connection)
        acceptor.arrivals = self._shared.arrivals
        self._front.metrics.acceptor = acceptor
        self._stop = asyncio.Event()
        self._keep_date()
        started: list[BesideHttp] = []
        try:
            for service in self._services:
                await service.start()
                started.append(service)
            acceptor.start()
            self._settled.set()
            await self._stop.wait()
        finally:
            acceptor.stop()
            stops = [service.stop(self._grace) for service in started]
            await asyncio.gather(self._end_connections(acceptor), *stops)

    def _connection(self, place: Place) -> Connection:
        return Connection(self._shared, place)

    def _keep_date(self) -> None:
        self._turned = time.monotonic()
        self._shared.default_headers = [(b"date", format_datetime(datetime.now(UTC), usegmt=True).encode())]
        asyncio.get_running_loop().call_later(1.0, self._keep_date)

    async def _end_connections(self, acceptor: Acceptor) -> None:
        self._shared.stopping = True
        deadline = time.monotonic() + self._grace
        await self._empty(acceptor, QUIET_SECONDS)
        acceptor.give_up()
        for connection in list(self._shared.connections):
            if not connection.is_busy:
                connection.close()
        await self._empty(acceptor, deadline - time.monotonic())
        for connection in list(self._shared.connections):
            connection.cut()
        for task in self._shared.tasks:
            task.cancel()
        await self._empty(acceptor, CUT_SECONDS)

    async def _empty(self, acceptor: Acceptor, seconds: float) -> None:
        """Waits for the last connection's end, at most so long."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(acceptor.empty.wait(), seconds)


def _protocol_config(app: ASGIApp) -> uvicorn.Config:
    """What uvicorn's protocol wants to know; everything else is ours."""
    config = uvicorn.Config(
        app,
        http=Connection,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,  # a peer is who connected, not who a header names
    )
    config.load()
    return config
