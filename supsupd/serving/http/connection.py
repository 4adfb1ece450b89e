"""One HTTP/1.1 connection: uvicorn's, with a bound on everything that a client may send, hold back or leave unread."""

from __future__ import annotations

import asyncio
import urllib.parse
from collections.abc import Callable

import httptools
import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from supsupd.serving.front import Front
from supsupd.serving.http.accepting import Arrivals, Place
from supsupd.serving.http.exchange import Exchange
from supsupd.serving.http.framing import MAX_HEADERS, Framing
from supsupd.serving.http.heads import check_head, split_target
from supsupd.serving.http.outgoing import Outgoing
from supsupd.serving.http.refusals import Refusal, plain_answer

LINGER_SECONDS = 1.0
"""How long what a refused client still sends is read and dropped: it would else lose the answer."""
STOPPING_LINGER_SECONDS = 0.1


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
        self._timer: asyncio.TimerHandle | None = None  # of a head, of idleness, or of the end
        self._times_head = False
        self.url = b""

    @property
    def is_busy(self) -> bool:
        """Whether a request is being answered, though not all of it may be here."""
        return self.cycle is not None and not self.cycle.response_complete

    # -- the connection's life --------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's
        super().connection_made(transport)
        self.outgoing = Outgoing(transport, lambda: self.shared.front.limits.write_seconds, self._cut_writing)
        self.write = self.outgoing.write
        self._wait_for_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        self.outgoing.unwatch()
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
        self.outgoing.flush()
        is_more_to_come = not self._framing.in_head or self._framing.head_bytes or self._rest
        self._rest = b""
        if is_more_to_come and self.transport.can_write_eof():
            self.transport.write_eof()
            self.flow.resume_reading()
            self._arm(STOPPING_LINGER_SECONDS if self.shared.stopping else LINGER_SECONDS, self.transport.close)
        else:
            self._disarm()
            self.transport.close()
        self.outgoing.unwatch()
        self.outgoing.watch()

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
            if self.cycle.response_started and not self.outgoing.held:  # half an answer can't be taken back
                self.transport.abort()
                return
        self.outgoing.held = b""
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
        except httptools.HttpParserCallbackError as error:
            refusal = error.__context__
            if not isinstance(refusal, Refusal):
                raise
            self.refuse(refusal.status, refusal.text)
        except httptools.HttpParserError as error:
            self.refuse(400, f"bad_request: {error}")
        except Refusal as refusal:
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
        version, is_upgrade = parser.get_http_version(), parser.should_upgrade()
        fields = check_head(version, self.headers, is_upgrade)
        raw_path, query = split_target(self.url)
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

    def on_response_complete(self) -> None:
        self.shared.total_requests += 1
        if self.is_closing():
            return
        self.outgoing.flush()
        self._arm(self.shared.front.limits.idle_seconds, self.close)
        rest, self._rest = self._rest, b""
        if rest:
            self._read(rest)
        if not self._rest and not self._closing:
            self.flow.resume_reading()

    def pause_writing(self) -> None:
        super().pause_writing()
        self.outgoing.watch()

    def resume_writing(self) -> None:
        super().resume_writing()
        if not self._closing:  # an end is waited for to the last byte
            self.outgoing.unwatch()

    def _cut_writing(self) -> None:
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
