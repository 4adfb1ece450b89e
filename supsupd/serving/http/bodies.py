"""What requests bring and answers carry: bodies within their limits, JSON, and errors in one form."""

import asyncio
import json
import re
import zlib
from collections.abc import Collection
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from supsupd.config import ServingSettings
from supsupd.serving.oip.strict_json import ProtocolError

CODINGS = {"gzip": zlib.MAX_WBITS | 16, "deflate": zlib.MAX_WBITS}
"""Content codings and what zlib calls them; "deflate" is a zlib stream."""
FAST = 1
_NEVER = re.compile(r"q\s*=\s*0(\.0*)?")


class JsonAnswer(JSONResponse):
    """JSON in ASCII: a file name that is not valid Unicode can still be told."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode("ascii")


def error_answer(status: int, text: str, headers: Any = None) -> Response:
    """The one form of every error."""
    return JsonAnswer({"error": text}, status_code=status, headers=headers)


async def read_body(request: Request, settings: ServingSettings, codings: Collection[str] = ()) -> bytes:
    """The whole body, within the limits of size and time; nothing is read of one that announces too much.

    codings: of CODINGS, those that it may come in; the limit of size holds for what they unpack to, too.
    """
    coding = request.headers.get("content-encoding", "identity").lower()
    if coding != "identity" and coding not in codings:
        raise HTTPException(415, f"Content-Encoding {coding[:40]} is not supported here")
    if int(request.headers.get("content-length", "0")) > settings.max_body_bytes:
        raise _too_large(settings)
    try:
        async with asyncio.timeout(settings.body_seconds):
            body = await _collect(request, settings)
    except TimeoutError:
        raise HTTPException(408, f"the body did not come within {settings.body_seconds:g} s") from None
    return body if coding == "identity" else await run_in_threadpool(_unpacked, body, coding, settings)


async def _collect(request: Request, settings: ServingSettings) -> bytes:
    parts: list[bytes] = []  # mostly one, which is not copied then
    size, more = 0, True
    while more:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise HTTPException(400, "the body ends too early")
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > settings.max_body_bytes:
            raise _too_large(settings)
        more = message.get("more_body", False)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _unpacked(body: bytes, coding: str, settings: ServingSettings) -> bytes:
    stream = zlib.decompressobj(CODINGS[coding])
    try:
        unpacked = stream.decompress(body, settings.max_body_bytes + 1)
    except zlib.error as error:
        raise ProtocolError(f"bad_request: the body is not {coding}: {error}") from None
    if len(unpacked) > settings.max_body_bytes:
        raise _too_large(settings)
    if not stream.eof or stream.unused_data:
        raise ProtocolError(f"bad_request: the body is not one whole stream of {coding}")
    return unpacked


def compressed(answer: Response, accepted: str) -> Response:
    """The answer in a coding that `Accept-Encoding` names, if it is shorter then."""
    coding = _coding_of(accepted)
    if coding is not None:
        stream = zlib.compressobj(FAST, zlib.DEFLATED, CODINGS[coding])
        body = stream.compress(answer.body) + stream.flush()
        if len(body) < len(answer.body):
            answer.body = body
            answer.headers["Content-Encoding"] = coding
            answer.headers["Content-Length"] = str(len(body))
    return answer


def _coding_of(accepted: str) -> str | None:
    """The first of CODINGS that is accepted by name."""
    for offer in accepted.lower().split(","):
        coding, _, weight = offer.partition(";")
        if coding.strip() in CODINGS and not _NEVER.fullmatch(weight.strip()):
            return coding.strip()
    return None


def _too_large(settings: ServingSettings) -> HTTPException:
    return HTTPException(413, f"the body is larger than {settings.max_body_bytes} bytes")
