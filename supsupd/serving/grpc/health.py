"""`grpc.health.v1.Health`, the standard service: whether queries should be sent here. It is open to everybody, so that
each call has a time to say what it asks, and few may watch."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse

from supsupd.serving.engine import EngineError
from supsupd.serving.front import Front
from supsupd.serving.grpc.arriving import Arriving
from supsupd.serving.grpc.calls import refusal
from supsupd.serving.grpc.methods import SERVICE
from supsupd.serving.oip.strict_json import ProtocolError

NAME = "grpc.health.v1.Health"
CHANGE_SECONDS = 0.5
"""How often it is looked at for those who watch."""
MOST_WATCHERS = 64
"""Each takes a call's place for as long as it likes."""
Context = Any  # grpc.aio.ServicerContext, which has no types


class Health:
    """The server (the empty name) and its one service serve while they are ready. Made in the event loop.

    Args:
        front: knows whether they are.
        arriving: reads messages.
    """

    def __init__(self, front: Front, arriving: Arriving) -> None:
        self._front = front
        self._arriving = arriving
        self._ending = asyncio.Event()
        self.watchers = 0
        """How many watch now."""

    def handler(self) -> grpc.GenericRpcHandler:
        """Of both methods, whose one message is read by hand: else it would have no time to come in."""
        answer = HealthCheckResponse.SerializeToString
        methods = {
            "Check": grpc.stream_unary_rpc_method_handler(self._check, response_serializer=answer),
            "Watch": grpc.stream_stream_rpc_method_handler(self._watch, response_serializer=answer),
        }
        return grpc.method_handlers_generic_handler(NAME, methods)

    def end(self) -> None:
        """Those who watch are told that nothing is served any more, and that is the end."""
        self._ending.set()

    async def _check(self, _: object, context: Context) -> Any:
        state = self._state(await self._service(context))
        if state == HealthCheckResponse.SERVICE_UNKNOWN:
            await context.abort(grpc.StatusCode.NOT_FOUND, "unknown_service: there is no such service")
        return HealthCheckResponse(status=state)

    async def _watch(self, _: object, context: Context) -> None:
        with self._watcher() as is_one:
            if not is_one:
                text = f"overloaded: {self.watchers} watch the health"
                await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, text)
            service = await self._service(context)
            told, is_last = None, False
            while not is_last:
                is_last = self._ending.is_set()
                if (state := self._state(service)) != told:
                    await context.write(HealthCheckResponse(status=state))
                    told = state
                await self._next_look()

    @contextlib.contextmanager
    def _watcher(self) -> Iterator[bool]:
        """Whether there is room for one more."""
        if self.watchers >= MOST_WATCHERS:
            yield False
            return
        self.watchers += 1
        try:
            yield True
        finally:
            self.watchers -= 1

    async def _next_look(self) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._ending.wait(), CHANGE_SECONDS)

    async def _service(self, context: Context) -> str:
        """The service that a call asks about."""
        try:
            with self._front.memory.holding() as holding:
                payload = await self._arriving.message(context, holding)
            service: str = HealthCheckRequest.FromString(payload).service
            return service
        except DecodeError:
            code, text = grpc.StatusCode.INVALID_ARGUMENT, "bad_request: expected a message HealthCheckRequest"
        except (EngineError, ProtocolError) as error:
            code, text = refusal(NAME, error)
        await context.abort(code, text)  # raises
        raise AssertionError

    def _state(self, service: str) -> int:
        if service not in ("", SERVICE):
            return int(HealthCheckResponse.SERVICE_UNKNOWN)
        is_well = not self._ending.is_set() and self._front.problem() is None
        return int(HealthCheckResponse.SERVING if is_well else HealthCheckResponse.NOT_SERVING)
