"""One HTTP/1.1 connection: uvicorn's, with a bound on everything that a client may send, hold back or leave unread."""

from __future__ import annotations

import asyncio
import logging
import urllib.parse
from collections.abc import Callable
from typing import Any

import httptools
import uvicorn
from starlette.types import ASGIApp, Message
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from supsupd.serving.accepting import Arrivals, Place
from supsupd.serving.front import Front
from supsupd.serving.refusals import Refusal, plain_answer

MAX_HEAD_BYTES = 1 << 16
"""Of the request line and all headers."""
MAX_HEADERS = 128
MAX_CHUNKS = 10_000
MAX_FRAMING_BYTES = 1 << 14
"""Of trailers and chunk extensions, beyond the size and the two line ends that each chunk has."""
CHUNK_FRAMING_BYTES = 16
LINGER_SECONDS = 1.0
"""How long what a refused client still sends is read and dropped: it would else lose the answer."""
_BLANK_LINE = b"\r\n\r\n"

_crashes = logging.getLogger("uvicorn.error")


class Shared(ServerState):
    """What the connections of one server have in common."""

    def __init__(self, front: Front, config: uvicorn.Config) -> None:
        super().__init__()
        self.front = front
        self.config = config
        self.arrivals = Arrivals()
        self.stopping = False
        """Whether requests that come now are refused."""


class Connection(HttpToolsProtocol):
    """Reads one request at a time; the next is not looked at before the last one's answer is written.

    What is read is parsed in pieces that end where a request's head, or its body, may end.

    Args:
        shared: what all connections have in common.
        place: among the connections that there may be; it is left at the end.
    """

    def __init__(self, shared: Shared, place: Place) -> None:
        super().__init__(shared.config, shared, place.state, asyncio.get_running_loop())
        self._shared = shared
        self._place = place
        self._timer: asyncio.TimerHandle | None = None
        self._stall: asyncio.TimerHandle | None = None
        self._closing = False
        self._rest = b""  # read, but of later requests
        self._tail = b""  # the last bytes before what is read next, in which a blank line may have begun
        self._in_head = True
        self._head_bytes = 0
        self._body_left = 0  # of a body whose length is known
        self._is_chunked = False
        self._chunks = 0
        self._framing_bytes = 0

    @property
    def _is_busy(self) -> bool:
        """Whether a request is being answered, whether or not all of it is here."""
        return self.cycle is not None and not self.cycle.response_complete

    # -- the connection's life --------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's
        super().connection_made(transport)
        self.write: Callable[[bytes], None] = transport.write
        self._wait_for_head()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._timer, self._stall):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)
        self._place.leave()

    def eof_received(self) -> bool:  # type: ignore[override]  # as asyncio's
        """A client that has only ended its own side still gets the answer to a request that is whole."""
        return self._is_busy and self._in_head and not self._closing

    def is_closing(self) -> bool:
        return self._closing or self.transport.is_closing()

    def close(self) -> None:
        """Ends the connection once all that is written has gone out."""
        if self.is_closing():
            return
        self._closing = True
        is_more_coming = not self._in_head or self._rest
        self._rest = b""
        if is_more_coming and self.transport.can_write_eof():
            self.transport.write_eof()
            self.flow.resume_reading()
            self._arm(0.0 if self._shared.stopping else LINGER_SECONDS, self.transport.close)
        else:
            self._disarm()
            self.transport.close()
        if self._stall is None:
            self._watch_writing()

    def end(self) -> None:
        """Of a server that stops: what is idle ends."""
        if not self._is_busy:
            self.close()

    def cut(self) -> None:
        """Of a server that waits no longer: the request in progress is refused."""
        self._shared.arrivals.cut["shutdown"] += 1
        self.refuse(503, "unavailable: the server stopped before the answer was there")
        self.transport.close()

    def refuse(self, status: int, text: str) -> None:
        """Answers so instead of the application, and closes."""
        if self.is_closing():
            return
        if self._is_busy:
            if self.cycle.response_started:  # half an answer can't be taken back
                self.transport.abort()
                return
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.write(plain_answer(status, text))
        self.close()

    # -- what comes in ----------------------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        if self._rest:
            self._rest += data
        elif not self._closing:
            self._read(data)

    def _read(self, data: bytes) -> None:
        try:
            self._parse(data)
        except httptools.HttpParserUpgrade:  # we offer none: the answer comes over HTTP/1.1, and is the last
            pass
        except httptools.HttpParserError as error:
            refusal = error.__context__
            if isinstance(refusal, Refusal):
                self.refuse(refusal.status, refusal.text)
            else:
                self.refuse(400, f"bad_request: {error}")
        except Refusal as refusal:
            self.refuse(refusal.status, refusal.text)

    def _parse(self, data: bytes) -> None:
        at, end = 0, len(data)
        while at < end and not self._closing:
            if self._in_head and self._is_busy:
                self._rest = data[at:]
                self.flow.pause_reading()
                return
            stop = self._piece(data, at, end)
            self.parser.feed_data(data if stop - at == end else memoryview(data)[at:stop])
            at = stop
        if self._in_head and self._head_bytes:
            self._expect_head()

    def _piece(self, data: bytes, at: int, end: int) -> int:
        """Where what is parsed next ends. Raises Refusal where it would be too much."""
        if self._body_left:
            stop = min(end, at + self._body_left)
            self._body_left -= stop - at
            return stop
        stop = self._after_blank_line(data, at, end)
        if self._in_head:
            self._head_bytes += stop - at
            if self._head_bytes > MAX_HEAD_BYTES:
                raise Refusal(431, f"head_too_large: expected at most {MAX_HEAD_BYTES} bytes of headers")
        else:
            self._framing_bytes += stop - at
            if self._framing_bytes > MAX_FRAMING_BYTES + CHUNK_FRAMING_BYTES * self._chunks + stop - at:
                raise Refusal(431, f"trailers_too_large: expected at most {MAX_FRAMING_BYTES} bytes around the chunks")
        return stop

    def _after_blank_line(self, data: bytes, at: int, end: int) -> int:
        if self._tail:
            split = (self._tail + data[at : at + 3]).find(_BLANK_LINE)
            if split >= 0:
                stop = at + split + 4 - len(self._tail)
                self._tail = b""
                return stop
        found = data.find(_BLANK_LINE, at)
        if found >= 0:
            self._tail = b""
            return found + 4
        self._tail = (self._tail + data[max(at, end - 3) :])[-3:]
        return end

    def _expect_head(self) -> None:
        """The head of a request has begun; what is still to come of it has its time, counted once."""
        if self._timer is None or not self._is_head_timed:
            self._wait_for_head()
        if self.parser.get_http_version() == "0.0" and self._tail.endswith(b"\n") and self.headers is not None:
            raise Refusal(400, "bad_request: expected HTTP/1.1")  # HTTP/0.9, whose requests are one line

    # -- the parser's callbacks; what they raise comes out of `feed_data` -------------------------------------------

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._in_head:  # a trailer, which means nothing here
            return
        if len(self.headers) >= MAX_HEADERS:
            raise Refusal(431, f"head_too_large: expected at most {MAX_HEADERS} headers")
        self.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        self._disarm()
        if self._shared.stopping:
            raise Refusal(503, "unavailable: the server is stopping")
        parser, scope = self.parser, self.scope
        version, fields = parser.get_http_version(), dict(self.headers)
        self._check(version, fields)
        target = httptools.parse_url(self.url)
        raw_path = target.path or b"/"
        path = raw_path.decode("ascii")
        scope["method"] = parser.get_method().decode("ascii")
        scope["http_version"] = version
        scope["path"] = urllib.parse.unquote(path) if "%" in path else path
        scope["raw_path"] = raw_path
        scope["query_string"] = target.query or b""
        self._in_head = False
        self._head_bytes = 0
        self._body_left = int(fields.get(b"content-length", b"0"))
        self._is_chunked = b"transfer-encoding" in fields
        self._chunks = self._framing_bytes = 0
        is_upgrade = parser.should_upgrade()
        self.cycle = _Cycle(
            self,
            expect_100_continue=b"expect" in fields,
            keep_alive=version == "1.1" and not is_upgrade and parser.should_keep_alive(),
        )
        self._start_asgi_task(self.cycle, self.app)  # type: ignore[arg-type]  # Starlette's names of the same

    def _check(self, version: str, fields: dict[bytes, bytes]) -> None:
        """Raises Refusal for what the parser lets pass and we do not."""
        if version not in ("1.1", "1.0"):
            raise Refusal(400, "bad_request: expected HTTP/1.1")
        hosts = [name for name, _ in self.headers].count(b"host")
        if hosts > 1 or (version == "1.1" and not hosts):
            raise Refusal(400, f"bad_request: expected one Host, got {hosts}")
        coding = fields.get(b"transfer-encoding")
        if coding is not None and (version == "1.0" or coding.lower() != b"chunked"):
            raise Refusal(400, "bad_request: expected no Transfer-Encoding but chunked, in HTTP/1.1")
        if fields.get(b"expect", b"100-continue").lower() != b"100-continue":
            raise Refusal(417, "expectation_failed: expected no Expect but 100-continue")
        if self.parser.should_upgrade() and (coding is not None or fields.get(b"content-length", b"0") != b"0"):
            raise Refusal(400, "bad_request: expected no body with Upgrade")

    def on_chunk_header(self) -> None:
        self._chunks += 1
        if self._chunks > MAX_CHUNKS:
            raise Refusal(413, f"too_many_chunks: expected at most {MAX_CHUNKS}")

    def on_body(self, body: bytes) -> None:
        if self._is_chunked:
            self._framing_bytes -= len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._in_head = True
        super().on_message_complete()

    # -- what goes out ----------------------------------------------------------------------------------------------

    def on_response_complete(self) -> None:
        self._shared.total_requests += 1
        if self.is_closing():
            return
        rest, self._rest = self._rest, b""
        if not rest or not self._in_head:
            self.flow.resume_reading()
            self._arm(self._shared.front.limits.idle_seconds, self.close)
            return
        self._arm(self._shared.front.limits.idle_seconds, self.close)
        self._read(rest)
        if not self._rest:
            self.flow.resume_reading()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_writing()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stall is not None and not self._closing:
            self._stall.cancel()
            self._stall = None

    def _watch_writing(self) -> None:
        """A client that takes nothing for too long, of what is waiting to be sent, is cut off."""
        before = self.transport.get_write_buffer_size()
        if before:
            patience = self._shared.front.limits.write_seconds
            self._stall = self.loop.call_later(patience, self._look_at_writing, before)

    def _look_at_writing(self, before: int) -> None:
        if self.transport.get_write_buffer_size() < before:
            self._watch_writing()
        else:
            self._shared.arrivals.cut["write"] += 1
            self.transport.abort()

    # -- time -------------------------------------------------------------------------------------------------------

    def _arm(self, seconds: float, action: Callable[[], Any]) -> None:
        self._disarm()
        self._is_head_timed = False
        self._timer = self.loop.call_later(seconds, action)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _wait_for_head(self) -> None:
        self._arm(self._shared.front.limits.header_seconds, self._head_is_late)
        self._is_head_timed = True

    def _head_is_late(self) -> None:
        self._shared.arrivals.cut["headers"] += 1
        if self._head_bytes:
            seconds = self._shared.front.limits.header_seconds
            self.refuse(408, f"too_slow: the headers did not come within {seconds:g} s")
        else:
            self.close()


class _Cycle(RequestResponseCycle):
    """One request and its answer, which is the last one of its connection where that ends."""

    def __init__(self, connection: Connection, expect_100_continue: bool, keep_alive: bool) -> None:
        super().__init__(
            scope=connection.scope,
            transport=connection,  # type: ignore[arg-type]  # it decides how to close
            flow=connection.flow,
            logger=connection.logger,
            access_logger=connection.access_logger,
            access_log=False,
            default_headers=connection.server_state.default_headers,
            message_event=asyncio.Event(),
            expect_100_continue=expect_100_continue,
            keep_alive=keep_alive,
            on_response=connection.on_response_complete,
        )
        self._front = connection._shared.front

    async def run_asgi(self, app: ASGIApp) -> None:  # type: ignore[override]  # Starlette's names of the same
        try:
            await app(self.scope, self.receive, self.send)  # type: ignore[arg-type]
        except Exception:  # the last edge: it is logged, and whoever asked is told
            _crashes.exception("Exception in ASGI application")
            if self.response_started:
                self.transport.abort()
            else:
                self.transport.refuse(500, "internal error; the daemon's log says more")
        finally:
            self.on_response = _nothing  # breaks the cycle of references

    async def send(self, message: Message) -> None:  # type: ignore[override]
        if not self.response_started and (self.more_body or self._front.draining):
            self.keep_alive = False  # what is left of a body that nobody reads is not waited for
        await super().send(message)  # type: ignore[arg-type]


def _nothing() -> None:
    pass
