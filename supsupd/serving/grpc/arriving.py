"""How messages come in: the library shows one when it is whole, and until then nobody knows how large it is."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc.aio

from supsupd.config import ServingSettings
from supsupd.serving.engine import EngineError
from supsupd.serving.front import Front
from supsupd.serving.memory import TINY_BYTES, Holding
from supsupd.serving.oip.strict_json import ProtocolError

MOST_BYTES = 16 << 20
"""Of a message, also unpacked: below it no message is harmful, however well it packs."""
SOON_SECONDS = 0.1
"""In which small messages are here, on a busy machine too: mostly they come with their call."""
MOST_AT_ONCE = 4
"""Calls whose messages are looked for at a time; the next one's turn comes within SOON_SECONDS."""
MOST_BEFORE = 4
"""Messages that may be here, or half here, and wait for room in the memory."""


def message_bytes(limits: ServingSettings) -> int:
    """The most that a message may have."""
    return min(limits.max_body_bytes, MOST_BYTES)


class Arriving:
    """Messages of calls that have one each. What is small is here at once and takes no notice of the others; what is
    not here soon, or is large, needs room, and only a few may wait for it.

    Args:
        front: gives the limits.
    """

    def __init__(self, front: Front) -> None:
        self._front = front
        self._looking = asyncio.Semaphore(MOST_AT_ONCE)
        self._before = 0

    async def message(self, context: Any, holding: Holding) -> bytes:
        """The message of a call, which holds what it takes. Raises EngineError: 408 where it does not come in time, and
        what `Holding.take` does; ProtocolError.
        """
        async with self._looking:
            reading = asyncio.ensure_future(context.read())
            await asyncio.wait((reading,), timeout=SOON_SECONDS)
        try:
            if not reading.done() or len(reading.result()) > TINY_BYTES:
                await self._in_room(reading, holding)
            payload = reading.result()
        finally:
            reading.cancel()
        if payload is grpc.aio.EOF:
            raise ProtocolError("bad_request: expected a message")
        message: bytes = payload
        return message

    async def _in_room(self, reading: asyncio.Future[Any], holding: Holding) -> None:
        if self._before >= MOST_BEFORE:
            raise EngineError("overloaded: as many large or slow messages wait as may", 429)
        self._before += 1
        try:
            if not reading.done():
                await self._rest(reading)
            await holding.take("received", len(reading.result()), "a message")
        finally:
            self._before -= 1

    async def _rest(self, reading: asyncio.Future[Any]) -> None:
        seconds = self._front.limits.body_seconds
        await asyncio.wait((reading,), timeout=seconds)
        if not reading.done():
            raise EngineError(f"the request did not come within {seconds:g} s", 408)
