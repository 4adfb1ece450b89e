"""Where a request ends in the bytes that come, and how much of it there may be beside its body."""

from __future__ import annotations

from supsupd.serving.http.refusals import Refusal

MAX_HEAD_BYTES = 1 << 16
"""Of the request line and all headers."""
MAX_HEADERS = 128
MAX_CHUNKS = 10_000
MAX_FRAMING_BYTES = 1 << 14
"""Of trailers and chunk extensions, beyond what each chunk needs."""
CHUNK_FRAMING_BYTES = 16
"""A chunk's size and two line ends."""
_BLANK_LINE = b"\r\n\r\n"


class Framing:
    """Cuts what is read into pieces for the parser, so that no piece holds the bytes of two requests.

    A head ends with a blank line, and so does a body in chunks; another body has a length. So a piece ends after each
    blank line, which in a chunk's data may be none, or with the body. All methods raise Refusal where it is too much.
    """

    __slots__ = ("_body_left", "_chunks", "_framing_bytes", "_tail", "head_bytes", "in_head", "is_chunked")

    def __init__(self) -> None:
        self.in_head = True
        """Whether what comes next belongs to a head: of a request that has begun, or of the next one."""
        self.head_bytes = 0
        self.is_chunked = False
        self._body_left = 0  # of a body whose length is known
        self._tail = b""  # the last bytes, in which a blank line may have begun
        self._chunks = 0
        self._framing_bytes = 0

    def piece(self, data: bytes, at: int) -> int:
        """Where in `data` what begins at `at` ends."""
        if self._body_left:
            stop = min(len(data), at + self._body_left)
            self._body_left -= stop - at
            return stop
        stop = self._after_blank_line(data, at)
        if self.in_head:
            self.head_bytes += stop - at
            if self.head_bytes > MAX_HEAD_BYTES:
                raise Refusal(431, f"head_too_large: expected at most {MAX_HEAD_BYTES} bytes of headers")
        else:
            self._framing_bytes += stop - at  # less what turns out to be data
        return stop

    def ends_with_line(self) -> bool:
        """Whether the last piece of a head ended where a line does."""
        return self._tail.endswith(b"\n")

    def head_is_complete(self, body_bytes: int, is_chunked: bool) -> None:
        self.in_head = False
        self.head_bytes = 0
        self.is_chunked = is_chunked
        self._body_left = body_bytes
        self._chunks = self._framing_bytes = 0

    def message_is_complete(self) -> None:
        self.in_head = True

    def chunk(self) -> None:
        """A chunk begins."""
        self._chunks += 1
        if self._chunks > MAX_CHUNKS:
            raise Refusal(413, f"too_many_chunks: expected at most {MAX_CHUNKS}")

    def data(self, size: int) -> None:
        """So many of a chunk's bytes were data."""
        self._framing_bytes -= size

    def check_chunks(self) -> None:
        """Of all that has been parsed."""
        if self._framing_bytes > MAX_FRAMING_BYTES + CHUNK_FRAMING_BYTES * self._chunks:
            raise Refusal(431, f"trailers_too_large: expected at most {MAX_FRAMING_BYTES} bytes beside the chunks")

    def _after_blank_line(self, data: bytes, at: int) -> int:
        if self._tail:
            split = (self._tail + data[at : at + 3]).find(_BLANK_LINE)
            if split >= 0:
                stop = at + split + len(_BLANK_LINE) - len(self._tail)
                self._tail = b""
                return stop
        found = data.find(_BLANK_LINE, at)
        if found >= 0:
            self._tail = b""
            return found + len(_BLANK_LINE)
        self._tail = (self._tail + data[max(at, len(data) - 3) :])[-3:]
        return len(data)
