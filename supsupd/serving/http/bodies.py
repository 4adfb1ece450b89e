"""What requests bring and answers carry: bodies within their limits, JSON, and errors in one form."""

from __future__ import annotations

import asyncio
import io
import json
import re
import time
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from supsupd.config import ServingSettings
from supsupd.serving.http.codings import CODINGS, pack
from supsupd.serving.memory import SMALL_BYTES, TINY_BYTES, Holding, Stage

if TYPE_CHECKING:
    from supsupd.serving.front import Front

HELD = "supsupd.held"
"""In a request's `state`: what it holds of the memory."""
_NEVER = re.compile(r"q\s*=\s*0(\.0*)?")


class JsonAnswer(JSONResponse):
    """JSON in ASCII: a file name that is not valid Unicode can still be told."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode("ascii")


def error_answer(status: int, text: str, headers: Any = None) -> Response:
    """The one form of every error."""
    return JsonAnswer({"error": text}, status_code=status, headers=headers)


async def list_answer(request: Request, front: Front, look: Callable[..., list[Any]], *given: object) -> Response:
    """The answer with a list, which may be long: it is held until the client has taken it."""
    answer = await front.heavily(lambda: JsonAnswer(look(*given)))
    await holding_of(request, front).take("answered", len(answer.body), "the list")
    return answer


def holding_of(request: Request, front: Front) -> Holding:
    """What a request holds; it is given back when its answer is written."""
    state = request.scope["state"]
    if HELD not in state:
        state[HELD] = front.memory.holding()
    holding: Holding = state[HELD]
    return holding


async def read_words(request: Request, front: Front) -> bytes:
    """The whole body of a request that has not much to say: an object of a few words."""
    coding_of(request)
    return await read_body(request, front, most=SMALL_BYTES)


async def read_body(request: Request, front: Front, stage: Stage = "received", most: int | None = None) -> bytes:
    """The whole body, as it came, within the limits of size, memory and time; nothing is read of one that announces too
    much. most: bytes that make sense here, if fewer than may be.
    """
    limits = front.limits
    most = limits.max_body_bytes if most is None else min(most, limits.max_body_bytes)
    told = request.headers.get("content-length")
    announced = None if told is None else int(told)
    if announced is not None and announced > most:
        raise too_large(most)
    return await _Reading(request, holding_of(request, front), stage, limits, most).whole(announced)


def coding_of(request: Request, codings: Collection[str] = ()) -> str:
    """What the body is coded in, one of `codings` or "identity". Raises HTTPException."""
    coding = request.headers.get("content-encoding", "identity").lower()
    if coding != "identity" and coding not in codings:
        raise HTTPException(415, f"Content-Encoding {coding[:40]} is not supported here")
    return coding


class _Reading:
    """One body while it comes: it is held before it is read, by what is announced or has come."""

    def __init__(self, request: Request, holding: Holding, stage: Stage, limits: ServingSettings, most: int) -> None:
        self._request = request
        self._holding = holding
        self._stage: Stage = stage
        self._limits = limits
        self._most = most
        self._left = limits.body_seconds

    async def whole(self, announced: int | None) -> bytes:
        """All of it, `announced` bytes if that is known. Raises HTTPException, EngineError."""
        await self._take(announced or 0)
        part, more = await self._next()
        if not more and len(part) <= self._most:
            return part  # mostly so, and not copied then
        body, room = io.BytesIO(), announced or TINY_BYTES
        while True:
            if body.tell() + len(part) > self._most:
                raise too_large(self._most)
            if body.tell() + len(part) > room:  # it comes in chunks; how much of it, nobody knows
                room = SMALL_BYTES if body.tell() + len(part) <= SMALL_BYTES else self._most
                await self._take(room)
            body.write(part)
            if not more:
                self._holding.keep(self._stage, body.tell())
                return body.getvalue()  # the same bytes, no copy
            part, more = await self._next()

    async def _take(self, size: int) -> None:
        await self._holding.take(self._stage, size, f"a body of {size} bytes")

    async def _next(self) -> tuple[bytes, bool]:
        """What has come since, and whether there is more."""
        began = time.monotonic()
        try:
            async with asyncio.timeout(self._left):
                message = await self._request.receive()
        except TimeoutError:
            raise HTTPException(408, f"the body did not come within {self._limits.body_seconds:g} s") from None
        self._left -= time.monotonic() - began
        if message["type"] == "http.disconnect":
            raise HTTPException(400, "the body ends too early")
        return message.get("body", b""), message.get("more_body", False)


def compressed(answer: Response, accepted: str) -> Response:
    """The answer in a coding that `Accept-Encoding` names, if it is shorter then."""
    coding = _coding_of(accepted)
    if coding is not None:
        body = pack(bytes(answer.body), coding)
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


def too_large(most: int) -> HTTPException:
    return HTTPException(413, f"the body is larger than {most} bytes")
