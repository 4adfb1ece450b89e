"""One request and its answer, on a connection that may have others after it."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from starlette.types import ASGIApp, Message
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

if TYPE_CHECKING:
    from supsupd.serving.http.connection import Connection

log = logging.getLogger("uvicorn.error")


class Exchange(RequestResponseCycle):
    """uvicorn's, but it is the connection that decides how to close, and an answer is the last one where more of its
    request is to come, or the server drains."""

    def __init__(self, connection: Connection, *, expects_continue: bool, keep_alive: bool) -> None:
        super().__init__(
            scope=connection.scope,
            transport=connection,  # type: ignore[arg-type]  # as much of one as is used
            flow=connection.flow,
            logger=log,
            access_logger=log,
            access_log=False,
            default_headers=connection.shared.default_headers,
            message_event=asyncio.Event(),
            expect_100_continue=expects_continue,
            keep_alive=keep_alive,
            on_response=connection.on_response_complete,
        )
        self._connection = connection

    async def run_asgi(self, app: ASGIApp) -> None:  # type: ignore[override]  # Starlette's names of the same types
        try:
            await app(self.scope, self.receive, self.send)  # type: ignore[arg-type]
        except Exception:  # the request's edge: logged, and whoever asked is told
            log.exception("Exception in ASGI application")
            self._connection.refuse(500, "internal error; the daemon's log says more")
        finally:
            self.on_response = _do_nothing  # else the two would hold each other

    async def send(self, message: Message) -> None:  # type: ignore[override]
        if not self.response_started:
            self._connection.outgoing.expect_head()
            if self.more_body or self._connection.shared.front.draining:
                self.keep_alive = False
        await super().send(message)  # type: ignore[arg-type]
        if self.flow.write_paused:  # what the client has not taken is still held
            await self.flow.drain()

    def drop(self) -> None:
        """Nobody waits for the answer any more; the application hears that the client has gone."""
        self.disconnected = True
        self.message_event.set()


def _do_nothing() -> None:
    pass
