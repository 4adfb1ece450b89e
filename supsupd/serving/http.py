"""The socket's HTTP: each route reads, asks the engine in a worker thread, and answers JSON."""

import json
import re
from typing import Any

import anyio
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

import supsupd
from supsupd.sections import ServingSettings
from supsupd.serving import protocol
from supsupd.serving.engine import (
    BATCH_STATES,
    MODEL_NAME,
    BadInput,
    Engine,
    EngineError,
    NoModelYet,
    TaskUnknown,
)
from supsupd.serving.peer import peer_of

MAX_NAME = 255
LIGHT_BYTES = 1 << 16
"""A body that is decoded in well under a millisecond."""
_SHA256 = re.compile(r"[0-9a-f]{64}")
MAX_REFERENCE = 300  # the longest key, with its prefix


def create_app(engine: Engine, settings: ServingSettings) -> Starlette:
    """The ASGI application that serves `engine`."""
    routes = [*_Inference(engine, settings).routes(), *_Native(engine, settings).routes()]
    app = Starlette(
        routes=routes,
        middleware=[Middleware(_RefuseWebPages)],
        exception_handlers={
            HTTPException: _answer_http_error,
            EngineError: _answer_engine_error,
            protocol.ProtocolError: _answer_protocol_error,
            Exception: _answer_crash,
        },
    )
    app.router.redirect_slashes = False  # protocol clients follow no redirects
    return app


class JsonAnswer(JSONResponse):
    """JSON in ASCII: a file name that is not valid Unicode can still be told."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode("ascii")


class _Inference:
    """Open Inference Protocol v2 under /v2."""

    def __init__(self, engine: Engine, settings: ServingSettings) -> None:
        self.engine = engine
        self.settings = settings

    def routes(self) -> list[Route]:
        model = "/v2/models/{model}"
        return [
            Route(model + "/infer", self.infer, methods=["POST"]),  # first: they are tried in order
            Route("/v2", self.server),
            Route("/v2/", self.server),
            Route("/v2/health/live", self.live),
            Route("/v2/health/ready", self.ready),
            Route(model, self.model),
            Route(model + "/ready", self.ready),
        ]

    async def server(self, request: Request) -> Response:
        return JsonAnswer(protocol.server_metadata(supsupd.__version__))

    async def live(self, request: Request) -> Response:
        return JsonAnswer({"live": True})

    async def ready(self, request: Request) -> Response:
        """Of the server and of its one model alike: ready to predict."""
        name = _model_name(request)
        if not await run_in_threadpool(self.engine.ready):
            raise NoModelYet
        return JsonAnswer({**name, "ready": True})

    async def model(self, request: Request) -> Response:
        _model_name(request)
        model = await run_in_threadpool(self.engine.model)
        if model is None:
            raise NoModelYet
        return JsonAnswer(protocol.model_metadata(model))

    async def infer(self, request: Request) -> Response:
        _model_name(request)
        if "inference-header-content-length" in request.headers:
            raise BadInput("bad_request: binary tensor data is not supported; send JSON data")
        body = await _read_body(request, self.settings)
        if len(body) > LIGHT_BYTES:
            # Decoding and encoding megabytes of JSON would hold up the loop as much as predicting.
            return await run_in_threadpool(lambda: self._answer(protocol.decode_request(body)))
        asked = protocol.decode_request(body)
        if self.engine.is_light(len(asked.x), asked.task):
            return self._answer(asked)
        return await run_in_threadpool(self._answer, asked)

    def _answer(self, request: protocol.InferRequest) -> Response:
        prediction = self.engine.predict(request.x, request.task, request.per_sample, request.method, request.objective)
        return JsonAnswer(protocol.encode_response(prediction, request))


class _Native:
    """What the Open Inference Protocol has no words for, under /v1."""

    def __init__(self, engine: Engine, settings: ServingSettings) -> None:
        self.engine = engine
        self.settings = settings

    def routes(self) -> list[Route]:
        task = "/v1/tasks/{task:path}"  # a key may hold slashes
        return [
            Route("/v1/status", self.status),
            Route("/v1/tasks", self.tasks),
            Route(task + "/retire", self.retire, methods=["POST"]),
            Route(task + "/reopen", self.reopen, methods=["POST"]),
            Route(task + "/merge", self.merge, methods=["POST"]),
            Route(task + "/split", self.split, methods=["POST"]),
            Route(task + "/rollback", self.rollback, methods=["POST"]),
            Route(task + "/history", self.history),
            Route(task, self.task),
            Route(task, self.rename, methods=["PATCH"]),
            Route("/v1/batches", self.batches),
            Route("/v1/batches", self.submit, methods=["POST"]),
            Route("/v1/batches/{batch}", self.batch),
            Route("/v1/batches/{batch}/why", self.why),
            Route("/v1/batches/{batch}/retry", self.retry, methods=["POST"]),
            Route("/v1/batches/{batch}/drop", self.drop, methods=["POST"]),
            Route("/v1/rejected", self.rejected),
            Route("/v1/sources", self.sources),
            Route("/v1/sources/{source}/accept", self.accept_gap, methods=["POST"]),
            Route("/v1/reservoir", self.reservoir),
            Route("/v1/scan", self.scan, methods=["POST"]),
        ]

    async def status(self, request: Request) -> Response:
        return JsonAnswer(await run_in_threadpool(self.engine.status))

    async def tasks(self, request: Request) -> Response:
        retired = _query(request, "all").get("all", "false")
        if retired not in ("true", "false"):
            raise BadInput("bad_request: all must be true or false")
        return JsonAnswer(await run_in_threadpool(self.engine.tasks, retired == "true"))

    async def task(self, request: Request) -> Response:
        return JsonAnswer(await run_in_threadpool(self.engine.task, _reference(request)))

    async def rename(self, request: Request) -> Response:
        name = await self._value(request, "name", str)
        return JsonAnswer(await run_in_threadpool(self.engine.rename, _reference(request), name))

    async def retire(self, request: Request) -> Response:
        return JsonAnswer(await run_in_threadpool(self.engine.retire, _reference(request), peer_of(request.scope)))

    async def reopen(self, request: Request) -> Response:
        return JsonAnswer(await run_in_threadpool(self.engine.reopen, _reference(request), peer_of(request.scope)))

    async def merge(self, request: Request) -> Response:
        other = await self._value(request, "other", int, str)
        by = peer_of(request.scope)
        return JsonAnswer(await run_in_threadpool(self.engine.merge, _reference(request), other, by))

    async def split(self, request: Request) -> Response:
        batch = await self._value(request, "from", int)
        by = peer_of(request.scope)
        return JsonAnswer(await run_in_threadpool(self.engine.split, _reference(request), batch, by))

    async def rollback(self, request: Request) -> Response:
        version = await self._value(request, "to", int)
        by = peer_of(request.scope)
        return JsonAnswer(await run_in_threadpool(self.engine.rollback, _reference(request), version, by))

    async def history(self, request: Request) -> Response:
        return JsonAnswer(await run_in_threadpool(self.engine.history, _reference(request)))

    async def why(self, request: Request) -> Response:
        return JsonAnswer(await run_in_threadpool(self.engine.why, _batch_id(request)))

    async def batch(self, request: Request) -> Response:
        text = request.path_params["batch"]
        reference = text if _SHA256.fullmatch(text) else _batch_id(request)
        return JsonAnswer(await run_in_threadpool(self.engine.batch, reference))

    async def retry(self, request: Request) -> Response:
        return JsonAnswer(await run_in_threadpool(self.engine.retry, _batch_id(request)), status_code=202)

    async def drop(self, request: Request) -> Response:
        return JsonAnswer(await run_in_threadpool(self.engine.drop, _batch_id(request)))

    async def rejected(self, request: Request) -> Response:
        limit = _limit(_query(request, "limit"))
        return JsonAnswer(await run_in_threadpool(self.engine.rejected, limit))

    async def sources(self, request: Request) -> Response:
        return JsonAnswer(await run_in_threadpool(self.engine.sources))

    async def accept_gap(self, request: Request) -> Response:
        return JsonAnswer(await run_in_threadpool(self.engine.accept_gap, request.path_params["source"]))

    async def _value(self, request: Request, key: str, *kinds: type) -> Any:
        """The one value of a body {key: value}."""
        body = protocol.parse_object(await _read_body(request, self.settings))
        value = body.get(key)
        if set(body) != {key} or type(value) not in kinds or (type(value) is int and not 0 <= value < 2**63):
            shown = "N" if int in kinds else '"..."'
            raise BadInput(f'bad_request: expected {{"{key}": {shown}}}')
        return value

    async def batches(self, request: Request) -> Response:
        query = _query(request, "state", "limit")
        state, limit = query.get("state"), _limit(query)
        if state is not None and state not in BATCH_STATES:
            raise BadInput("bad_request: state must be one of " + ", ".join(BATCH_STATES))
        return JsonAnswer(await run_in_threadpool(self.engine.batches, state, limit))

    async def submit(self, request: Request) -> Response:
        name = _query(request, "name").get("name", "")
        if not 1 <= len(name) <= MAX_NAME or not name.isprintable():
            raise BadInput(f"bad_request: expected ?name= with 1 to {MAX_NAME} printable characters")
        key = request.headers.get("idempotency-key")
        if key is not None and not (1 <= len(key) <= MAX_NAME and key.isprintable()):
            raise BadInput(f"bad_request: expected an Idempotency-Key of 1 to {MAX_NAME} printable characters")
        media_type = request.headers.get("content-type")
        payload = await _read_body(request, self.settings)
        staged = await run_in_threadpool(self.engine.submit, name, payload, media_type, key)
        return JsonAnswer(staged, status_code=202)

    async def reservoir(self, request: Request) -> Response:
        return JsonAnswer(await run_in_threadpool(self.engine.reservoir))

    async def scan(self, request: Request) -> Response:
        return JsonAnswer(await run_in_threadpool(self.engine.scan))


class _RefuseWebPages:
    """A browser sends `Origin` with every cross-site request; no page has any business here."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and any(name == b"origin" for name, _ in scope["headers"]):
            await _error(403, "requests from web pages are refused")(scope, receive, send)
        else:
            await self.app(scope, receive, send)


async def _read_body(request: Request, settings: ServingSettings) -> bytes:
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


def _model_name(request: Request) -> dict[str, str]:
    """{"name": model} where the path names one, else {}. Raises 404 for any model but ours."""
    name = request.path_params.get("model")
    if name not in (None, MODEL_NAME):
        raise HTTPException(404, f"unknown_model: the one model here is {MODEL_NAME}")
    return {} if name is None else {"name": name}


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 18  # fits in 64 bits


def _batch_id(request: Request) -> int:
    text: str = request.path_params["batch"]
    if not _is_number(text):
        raise HTTPException(404, f"there is no batch {text[:40]}")
    return int(text)


def _limit(query: dict[str, str]) -> int | None:
    limit = query.get("limit")
    if limit is not None and (not _is_number(limit) or int(limit) < 1):
        raise BadInput("bad_request: limit must be an integer of 1 or more")
    return None if limit is None else int(limit)


def _reference(request: Request) -> str:
    text: str = request.path_params["task"]
    if not 1 <= len(text) <= MAX_REFERENCE:
        raise TaskUnknown(text[:40])
    return text


def _query(request: Request, *allowed: str) -> dict[str, str]:
    if unknown := set(request.query_params) - set(allowed):
        raise BadInput(f"bad_request: unknown query {min(unknown)!r}; expected {' or '.join(allowed)}")
    return dict(request.query_params)


def _error(status: int, text: str, headers: Any = None) -> Response:
    return JsonAnswer({"error": text}, status_code=status, headers=headers)


async def _answer_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    own_words = {404: "there is nothing at this path", 405: f"{request.method} is not allowed here"}
    framework = error.detail in ("Not Found", "Method Not Allowed")
    text = own_words[error.status_code] if framework else error.detail
    return _error(error.status_code, text, error.headers)


async def _answer_engine_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, EngineError)
    return _error(error.status, error.text)


async def _answer_protocol_error(request: Request, error: Exception) -> Response:
    return _error(400, str(error))


async def _answer_crash(request: Request, error: Exception) -> Response:
    # Starlette raises the error again after this answer, and uvicorn logs it with its traceback.
    return _error(500, "internal error; the daemon's log says more")
