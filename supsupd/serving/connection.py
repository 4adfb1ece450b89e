"""One HTTP/1.1 connection: uvicorn's, with a bound on everything that a client may send, hold back or leave unread."""

from __future__ import annotations

import asyncio
import urllib.parse
from collections.abc import Callable

import httptools
import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from supsupd.serving.accepting import Arrivals, Place
from supsupd.serving.exchange import Exchange
from supsupd.serving.framing import MAX_HEADERS, Framing
from supsupd.serving.front import Front
from supsupd.serving.refusals import Refusal, plain_answer

LINGER_SECONDS = 1.0
"""How long what a refused client still sends is read and dropped: it would else lose the answer."""
STOPPING_LINGER_SECONDS = 0.1
JOIN_BYTES = 1 << 16
"""Up to this size copying a body costs less than a system call of its own."""


class Shared(ServerState):
    """What the connections of one server have in common."""

    connections: set[Connection]  # type: ignore[assignment]

    def __init__(self, front: Front, config: uvicorn.Config) -> None:
        super().__init__()
        self.front = front
        self.config = config
        self.arrivals = Arrivals()
        self.stopping = False
        """Whether requests that come now are refused."""


class Connection(HttpToolsProtocol):
    """Reads one request at a time: the next is not looked at before the answer to the last one is written.

    Args:
        shared: what all connections have in common.
        place: among the connections that there may be; it is left at the end.
    """

    cycle: Exchange

    def __init__(self, shared: Shared, place: Place) -> None:
        super().__init__(shared.config, shared, place.state, asyncio.get_running_loop())
        self.shared = shared
        self._place = place
        self._framing = Framing()
        self._rest = b""  # read, but of later requests
        self._closing = False
        self._head_is_next = False
        self._held = b""  # an answer's head, which goes out with the first of its body
        self._timer: asyncio.TimerHandle | None = None  # of a head, of idleness, or of the end
        self._times_head = False
        self._stall: asyncio.TimerHandle | None = None
        self.url = b""

    @property
    def is_busy(self) -> bool:
        """Whether a request is being answered, though not all of it may be here."""
        return self.cycle is not None and not self.cycle.response_complete

    # -- the connection's life --------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's
        super().connection_made(transport)
        self._wait_for_head()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._timer, self._stall):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)
        self._place.leave()

    def eof_received(self) -> bool:  # type: ignore[override]  # as asyncio's
        """A client that has only ended its own side gets the answer to a request that is whole."""
        is_wanted = self.is_busy and self._framing.in_head and self.transport.can_write_eof()
        if is_wanted:
            self.cycle.keep_alive = False
        return is_wanted

    def is_closing(self) -> bool:
        return self._closing or self.transport.is_closing()

    def close(self) -> None:
        """Ends the connection once all that is written has gone out."""
        if self.is_closing():
            return
        self._closing = True
        self._flush()
        is_more_to_come = not self._framing.in_head or self._framing.head_bytes or self._rest
        self._rest = b""
        if is_more_to_come and self.transport.can_write_eof():
            self.transport.write_eof()
            self.flow.resume_reading()
            self._arm(STOPPING_LINGER_SECONDS if self.shared.stopping else LINGER_SECONDS, self.transport.close)
        else:
            self._disarm()
            self.transport.close()
        if self._stall is None:
            self._watch_writing()

    def cut(self) -> None:
        """Of a server that waits no longer: a request in progress is refused."""
        if self.is_busy and not self._closing:
            self.shared.arrivals.cut["shutdown"] += 1
            self.refuse(503, "unavailable: the server stopped before the answer was there")
            self.transport.close()
        else:
            self.transport.abort()

    def refuse(self, status: int, text: str) -> None:
        """Answers so instead of the application, and closes."""
        if self.is_closing():
            return
        if self.is_busy:
            self.cycle.drop()
            if self.cycle.response_started and not self._held:  # half an answer can't be taken back
                self.transport.abort()
                return
        self._held = b""
        self.shared.arrivals.answered[str(status)] += 1
        self.transport.write(plain_answer(status, text))
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
        except httptools.HttpParserUpgrade:  # there is none: the answer comes over HTTP/1.1, and is the last one
            pass
        except (httptools.HttpParserError, Refusal) as error:
            cause = error.__context__ if isinstance(error, httptools.HttpParserCallbackError) else error
            refusal = cause if isinstance(cause, Refusal) else Refusal(400, f"bad_request: {cause}")
            self.refuse(refusal.status, refusal.text)

    def _parse(self, data: bytes) -> None:
        framing, at = self._framing, 0
        while at < len(data) and not self._closing:
            if framing.in_head and self.is_busy:
                self._rest = data[at:]
                self.flow.pause_reading()
                return
            stop = framing.piece(data, at)
            self.parser.feed_data(memoryview(data)[at:stop])
            at = stop
        if framing.is_chunked:
            framing.check_chunks()
        if framing.head_bytes:
            self._expect_head()

    def _expect_head(self) -> None:
        """A head has begun: the rest of it has its time, counted once."""
        if not self._times_head:
            self._wait_for_head()
        if self.url and self.parser.get_http_version() == "0.0" and self._framing.ends_with_line():
            raise Refusal(400, "bad_request: expected HTTP/1.1")  # a request of HTTP/0.9 is one line

    # -- the parser's callbacks; Refusal comes out of `feed_data` as the context of its own error --------------------

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._framing.in_head:  # a trailer: nothing to us, but the parser takes some for headers
            self.cycle.keep_alive = False
            return
        if len(self.headers) == MAX_HEADERS:
            raise Refusal(431, f"head_too_large: expected at most {MAX_HEADERS} headers")
        self.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        self._disarm()
        if self.shared.stopping:
            raise Refusal(503, "unavailable: the server is stopping")
        parser, scope = self.parser, self.scope
        version, fields = parser.get_http_version(), dict(self.headers)
        is_upgrade = parser.should_upgrade()
        self._check(version, fields, is_upgrade)
        raw_path, query = self._target()
        path = raw_path.decode("ascii")
        scope["method"] = parser.get_method().decode("ascii")
        scope["http_version"] = version
        scope["path"] = urllib.parse.unquote(path) if "%" in path else path
        scope["raw_path"] = raw_path
        scope["query_string"] = query
        self._framing.head_is_complete(int(fields.get(b"content-length", b"0")), b"transfer-encoding" in fields)
        self.cycle = Exchange(
            self,
            expects_continue=b"expect" in fields,
            keep_alive=version == "1.1" and not is_upgrade and parser.should_keep_alive(),
        )
        self._start_asgi_task(self.cycle, self.app)

    def _check(self, version: str, fields: dict[bytes, bytes], is_upgrade: bool) -> None:
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
        if is_upgrade and (coding is not None or fields.get(b"content-length", b"0") != b"0"):
            raise Refusal(400, "bad_request: expected no body with Upgrade")

    def _target(self) -> tuple[bytes, bytes]:
        """The path and the query asked for. Raises Refusal."""
        try:
            target = httptools.parse_url(self.url)
        except httptools.HttpParserInvalidURLError:
            raise Refusal(400, "bad_request: expected a path") from None
        return target.path or b"/", target.query or b""

    def on_chunk_header(self) -> None:
        self._framing.chunk()

    def on_body(self, body: bytes) -> None:
        if self._framing.is_chunked:
            self._framing.data(len(body))
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._framing.message_is_complete()
        super().on_message_complete()

    # -- what goes out ----------------------------------------------------------------------------------------------

    def write(self, data: bytes) -> None:
        if self._head_is_next:
            self._head_is_next = False
            self._held = data
        elif len(data) <= JOIN_BYTES:
            self.transport.write(self._held + data)
            self._held = b""
        else:
            self._flush()
            self.transport.write(data)

    def hold_head(self) -> None:
        """What is written next goes out with what is written after it: one system call, and one wake-up of the
        client, for most answers."""
        self._head_is_next = True

    def _flush(self) -> None:
        if self._held:
            self.transport.write(self._held)
            self._held = b""

    def on_response_complete(self) -> None:
        self.shared.total_requests += 1
        if self.is_closing():
            return
        self._flush()
        self._arm(self.shared.front.limits.idle_seconds, self.close)
        rest, self._rest = self._rest, b""
        if rest:
            self._read(rest)
        if not self._rest and not self._closing:
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
        """A client that takes nothing for too long, of what waits to be sent, is cut off."""
        before = self.transport.get_write_buffer_size()
        patience = self.shared.front.limits.write_seconds
        self._stall = self.loop.call_later(patience, self._look_at_writing, before) if before else None

    def _look_at_writing(self, before: int) -> None:
        if self.transport.get_write_buffer_size() < before:
            self._watch_writing()
        else:
            self.shared.arrivals.cut["write"] += 1
            self.transport.abort()

    # -- time -------------------------------------------------------------------------------------------------------

    def _arm(self, seconds: float, action: Callable[[], None]) -> None:
        self._disarm()
        self._timer = self.loop.call_later(seconds, action)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._times_head = False

    def _wait_for_head(self) -> None:
        self._arm(self.shared.front.limits.header_seconds, self._head_is_late)
        self._times_head = True

    def _head_is_late(self) -> None:
        self.shared.arrivals.cut["headers"] += 1
        if self._framing.head_bytes:
            seconds = self.shared.front.limits.header_seconds
            self.refuse(408, f"too_slow: the headers did not come within {seconds:g} s")
        else:
            self.close()
