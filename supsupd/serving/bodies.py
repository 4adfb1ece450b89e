"""What requests bring and answers carry: bodies within their limits, JSON, and errors in one form."""

import json
from typing import Any

import anyio
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from supsupd.config import ServingSettings


class JsonAnswer(JSONResponse):
    """JSON in ASCII: a file name that is not valid Unicode can still be told."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode("ascii")


def error_answer(status: int, text: str, headers: Any = None) -> Response:
    """The one form of every error."""
    return JsonAnswer({"error": text}, status_code=status, headers=headers)


async def read_body(request: Request, settings: ServingSettings) -> bytes:
    """The whole body, within the limits of size and time; nothing is read of one that announces too much."""
    coding = request.headers.get("content-encoding", "identity")
    if coding != "identity":
        raise HTTPException(415, f"Content-Encoding {coding} is not supported")
    if int(request.headers.get("content-length", "0")) > settings.max_body_bytes:
        raise _too_large(settings)
    try:
        with anyio.fail_after(settings.body_seconds):
            return await _collect(request, settings)
    except TimeoutError:
        raise HTTPException(408, f"the body did not come within {settings.body_seconds:g} s") from None
    except ClientDisconnect:
        raise HTTPException(400, "the body ends too early") from None


async def _collect(request: Request, settings: ServingSettings) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > settings.max_body_bytes:
            raise _too_large(settings)
    return bytes(body)


def _too_large(settings: ServingSettings) -> HTTPException:
    return HTTPException(413, f"the body is larger than {settings.max_body_bytes} bytes")
