"""What is done around every HTTP request: it gets an id, is counted, and is told in the log."""

from __future__ import annotations

import logging
import re
import secrets
import time
from itertools import count

import structlog
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from supsupd import tracing
from supsupd.logs import REQUEST
from supsupd.serving.access import ROUTE
from supsupd.serving.metrics import Metrics

REQUEST_ID = "supsupd.request_id"
"""In a request's `state`: its id."""
HEADER = b"x-request-id"
_ID = re.compile(rb"[A-Za-z0-9_.-]{1,64}")
_RUN = secrets.token_hex(4)
_NUMBERS = count(1)

log = structlog.get_logger("supsupd.requests")
_level = logging.getLogger("supsupd.requests")


class Requests:
    """The outermost layer of the application but for what answers crashes.

    Args:
        app: answers.
        metrics: told of every answer.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id = id_of_request(next((value for name, value in scope["headers"] if name == HEADER), b""))
        # Not reset: what the server says of a request that failed names it too.
        REQUEST.set(request_id)
        state = scope.setdefault("state", {})
        state[REQUEST_ID] = request_id
        status = 0
        started = time.perf_counter()

        async def tell(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (HEADER, request_id.encode())]
            await send(message)

        try:
            with tracing.request_span(scope["method"], scope["headers"]) as span:
                try:
                    await self.app(scope, receive, tell)
                finally:
                    tracing.finish_request(span, state.get(ROUTE), status)
        except Exception:  # answered with 500 further out
            status = status or 500
            raise
        finally:
            seconds = time.perf_counter() - started
            self.metrics.count_request(state.get(ROUTE), status, seconds)
            if status >= 500 and status != 503:  # that one says: later; whoever asks for the health could fill the log
                log.warning("request_failed", **_told(scope, status, seconds))
            elif _level.isEnabledFor(logging.DEBUG):
                log.debug("request", **_told(scope, status, seconds))


def id_of_request(given: bytes) -> str:
    """The client's own id for a request, if it is one that can be told, else a new one."""
    return given.decode() if _ID.fullmatch(given) else f"{_RUN}-{next(_NUMBERS):x}"


def _told(scope: Scope, status: int, seconds: float) -> dict[str, object]:
    # No query and no headers: they may hold what is nobody's business.
    return {
        "method": scope["method"],
        "path": scope["path"],
        "status": status or None,
        "ms": round(seconds * 1000, 3),
    }
