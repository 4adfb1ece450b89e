"""Calls over gRPC: who is let in, how long a request may take to come, and what every error looks like."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import grpc
import grpc.aio
import structlog

from supsupd.choices import Role
from supsupd.logs import REQUEST
from supsupd.serving.access import Access, Caller
from supsupd.serving.engine import DeadlineExceeded, EngineError
from supsupd.serving.front import Front
from supsupd.serving.grpc.arriving import Arriving
from supsupd.serving.grpc.messages import MESSAGE
from supsupd.serving.grpc.methods import Call, Method, Methods, refuse_method
from supsupd.serving.http.refusals import RETRY_SECONDS
from supsupd.serving.http.requests import HEADER, id_of_request
from supsupd.serving.memory import Holding, MemoryFull, let_go
from supsupd.serving.metrics import NO_ROUTE
from supsupd.serving.oip.strict_json import ProtocolError

CODES = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.NOT_FOUND,
    408: grpc.StatusCode.DEADLINE_EXCEEDED,
    409: grpc.StatusCode.FAILED_PRECONDITION,
    413: grpc.StatusCode.RESOURCE_EXHAUSTED,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    501: grpc.StatusCode.UNIMPLEMENTED,
    503: grpc.StatusCode.UNAVAILABLE,
}
"""What an error of the engine, with a status as in HTTP, is called by gRPC."""
STREAM_REQUESTS = 32
"""Of one stream, that are answered at a time."""
MOST_STREAMS = 16
"""At a time: each may have a message half here, of which nothing is known."""
STREAM = "ModelStreamInfer"
REQUEST_ID = HEADER.decode()
MAY_COME_AGAIN = (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE)
OUR_FAULT = (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNAVAILABLE)

log = structlog.get_logger("supsupd.requests")
_level = logging.getLogger("supsupd.requests")
Context = Any  # grpc.aio.ServicerContext, which has no types


@dataclass(slots=True)
class _Outcome:
    """How a call ends; unless something else is said, by its client's going away."""

    request_id: str
    code: grpc.StatusCode = grpc.StatusCode.CANCELLED
    text: str = ""

    def trailers(self) -> tuple[tuple[str, str], ...]:
        """Metadata at the end: the call's id, and when to try again."""
        later = (("retry-after", str(RETRY_SECONDS)),) if self.code in MAY_COME_AGAIN else ()
        return ((REQUEST_ID, self.request_id), *later)


class Calls:
    """The handlers of all methods, made in the event loop that they run in.

    A method of one message is read by hand, as a stream is: who asks is looked at before the message has come, and it
    has a time to come in.

    Args:
        front: gives the limits.
        methods: answer.
        access: decides who is let in over TCP; a Unix socket lets in whom its mode does.
        arriving: reads messages.
    """

    def __init__(self, front: Front, methods: Methods, access: Access, arriving: Arriving) -> None:
        self._front = front
        self._methods = methods
        self._access = access
        self._arriving = arriving
        self._streams = 0
        self._ending = asyncio.get_running_loop().create_future()

    def handlers(self) -> dict[str, grpc.RpcMethodHandler]:
        handlers = {
            name: grpc.stream_unary_rpc_method_handler(partial(self._answer, name, method))
            for name, method in self._methods.all().items()
        }
        return {**handlers, STREAM: grpc.stream_stream_rpc_method_handler(self._stream)}

    def of_nothing(self) -> grpc.GenericRpcHandler:
        """Of the methods that there are not, for behind all others: who is unknown learns not even that."""
        method = Method(refuse_method)
        return _Any(grpc.stream_unary_rpc_method_handler(partial(self._answer, NO_ROUTE, method)))

    def end(self) -> None:
        """Calls that begin now are refused, and streams that wait for their client end; what runs is still answered."""
        self._ending.set_result(None)

    async def _answer(self, name: str, method: Method, _: object, context: Context) -> bytes:
        with self._counted(name, context) as outcome, self._front.memory.holding() as holding:
            try:
                call = self._let_in(context, method.role, holding)
                payload = await self._arriving.message(context, holding)
                response: bytes = (await method.answer(payload, call)).SerializeToString()
                outcome.code = grpc.StatusCode.OK
                return response
            except Exception as error:  # noqa: BLE001 - the edge: whatever it is, the caller is told in our words
                outcome.code, outcome.text = refusal(name, error)
        return await context.abort(outcome.code, outcome.text, outcome.trailers())  # raises

    async def _stream(self, _: object, context: Context) -> None:
        """Requests that come while others are answered are answered with them; answers keep the order of requests."""
        answers: asyncio.Queue[asyncio.Task[bytes] | None] = asyncio.Queue()
        room = asyncio.Semaphore(STREAM_REQUESTS)
        with self._counted(STREAM, context) as outcome:
            self._streams += 1
            reading = asyncio.create_task(self._read_stream(context, answers, room))
            try:
                while (answer := await answers.get()) is not None:
                    await self._write(context, await answer)
                    room.release()
                await reading  # raises what has ended it
                outcome.code = grpc.StatusCode.OK
                return
            except Exception as error:  # noqa: BLE001 - as above
                outcome.code, outcome.text = refusal(STREAM, error)
            finally:
                self._streams -= 1
                reading.cancel()
        await context.abort(outcome.code, outcome.text, outcome.trailers())

    async def _read_stream(
        self, context: Context, answers: asyncio.Queue[asyncio.Task[bytes] | None], room: asyncio.Semaphore
    ) -> None:
        try:
            # Else a stranger could keep a call's place by saying nothing.
            self._let_in(context, "predict", self._front.memory.holding())
            if self._streams > MOST_STREAMS:
                raise EngineError(f"overloaded: there are {MOST_STREAMS} streams", 429)
            while await room.acquire() and (payload := await self._next(context)) is not grpc.aio.EOF:
                holding = self._front.memory.holding()
                call = self._let_in(context, "predict", holding)  # for each: a token may have been revoked
                await holding.take("received", len(payload), "a message")  # the next one is not read before
                answers.put_nowait(asyncio.create_task(self._stream_answer(payload, call)))
        finally:
            answers.put_nowait(None)

    async def _stream_answer(self, payload: bytes, call: Call) -> bytes:
        """What is wrong with one request is told in its answer: the stream goes on."""
        try:
            with call.holding:
                told = await self._methods.infer(payload, call)
            told.parameters["triton_final_response"].bool_param = True  # each request has one answer
            response = MESSAGE["ModelStreamInferResponse"](infer_response=told)
        except Exception as error:  # noqa: BLE001 - as above
            response = MESSAGE["ModelStreamInferResponse"](error_message=refusal(STREAM, error)[1])
        answer: bytes = response.SerializeToString()
        return answer

    @contextmanager
    def _counted(self, name: str, context: Context) -> Iterator[_Outcome]:
        """Gives a call its id, counts it and tells it in the log."""
        given = next((value for key, value in context.invocation_metadata() or () if key == REQUEST_ID), "")
        outcome = _Outcome(id_of_request(given.encode()))
        REQUEST.set(outcome.request_id)
        context.set_trailing_metadata(outcome.trailers())
        began = time.perf_counter()
        try:
            yield outcome
        finally:
            seconds, code = time.perf_counter() - began, outcome.code
            self._front.metrics.count_call(name, code.name, seconds)
            level = logging.WARNING if code in OUR_FAULT else logging.DEBUG
            if _level.isEnabledFor(level):
                log.log(level, "call", method=name, code=code.name, ms=round(seconds * 1000, 3))

    def _let_in(self, context: Context, role: Role | None, holding: Holding) -> Call:
        """Raises EngineError: Unauthenticated, Forbidden, and 503 at the end."""
        if self._ending.done():
            raise _ending()
        caller = None
        if role is not None:
            caller = self._caller_of(context)
            caller.require(role)
        return Call(caller, context.time_remaining(), holding)

    def _caller_of(self, context: Context) -> Caller:
        if context.peer().startswith("unix:"):
            return self._access.caller_of_file()
        given = [value for key, value in context.invocation_metadata() or () if key == "authorization"]
        return self._access.caller_of_token(given[0] if len(given) == 1 else None)

    async def _write(self, context: Context, message: bytes) -> None:
        """One of the messages of a stream."""
        seconds = self._front.limits.write_seconds
        try:
            async with asyncio.timeout(seconds):
                await context.write(message)
        except TimeoutError:
            raise EngineError(f"the client took nothing for {seconds:g} s", 408) from None

    async def _next(self, context: Context) -> Any:
        """The next message of a stream, or EOF."""
        reading = asyncio.ensure_future(context.read())
        await asyncio.wait((reading, self._ending), return_when=asyncio.FIRST_COMPLETED)
        if reading.done():
            return reading.result()
        reading.cancel()
        raise _ending()


class _Any(grpc.GenericRpcHandler):
    """One handler for whatever is called."""

    def __init__(self, handler: grpc.RpcMethodHandler) -> None:
        self._handler = handler

    def service(self, _: object) -> grpc.RpcMethodHandler:
        return self._handler


def _ending() -> EngineError:
    return EngineError("shutting_down: the daemon takes no more requests", 503)


def refusal(name: str, error: Exception) -> tuple[grpc.StatusCode, str]:
    """What a caller is told of an error; of one that is a bug of ours, nothing."""
    let_go(error)
    if isinstance(error, DeadlineExceeded):
        return grpc.StatusCode.DEADLINE_EXCEEDED, error.text
    if isinstance(error, MemoryFull):
        return grpc.StatusCode.RESOURCE_EXHAUSTED, error.text
    if isinstance(error, EngineError):
        return CODES.get(error.status, grpc.StatusCode.INTERNAL), error.text
    if isinstance(error, ProtocolError):
        return grpc.StatusCode.INVALID_ARGUMENT, str(error)
    log.error("call_crashed", method=name, exc_info=error)
    return grpc.StatusCode.INTERNAL, "internal error; the daemon's log says more"
