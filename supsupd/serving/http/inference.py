"""Open Inference Protocol v2 under /v2."""

import re
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response

from supsupd.serving.access import GuardedRoute, caller_of
from supsupd.serving.engine import ExtensionNotSupported
from supsupd.serving.front import Front
from supsupd.serving.http.bodies import JsonAnswer, coding_of, compressed, holding_of, read_body, read_words
from supsupd.serving.http.codings import CODINGS, Measure, measure, unpack
from supsupd.serving.oip import protocol
from supsupd.serving.oip.models import LIGHT_BYTES, LIGHT_TEXT, Models
from supsupd.serving.oip.protocol import InferAnswer, InferRequest, ProtocolError
from supsupd.serving.oip.strict_json import field, parse_object

JSON_BYTES = "inference-header-content-length"
NOT_SERVED = (
    "/v2/systemsharedmemory/{rest:path}",
    "/v2/cudasharedmemory/{rest:path}",
    "/v2/trace/setting",
    "/v2/models/{model}/trace/setting",
)
LIGHT_PACKED = 1 << 13
"""A coded body that takes a few milliseconds at most, whatever it unpacks to."""
VALUE_BYTES, BRAIN_RATIO = 8, 2
"""The most that a number of JSON takes in a tensor; what two raw bytes of BF16 do, in twos."""
_DIGITS = re.compile(r"[0-9]{1,18}")


class Inference:
    """Open Inference Protocol v2 under /v2."""

    def __init__(self, front: Front, models: Models) -> None:
        self.front = front
        self.models = models

    def routes(self) -> list[GuardedRoute]:
        repository = "/v2/repository/models/{model}"
        routes = []
        for model in ("/v2/models/{model}", "/v2/models/{model}/versions/{version}"):
            routes += [
                GuardedRoute(model + "/infer", self.infer, methods=["POST"]),
                GuardedRoute(model, self.metadata),
                GuardedRoute(model + "/ready", self.model_ready),
                GuardedRoute(model + "/config", self.config),
                GuardedRoute(model + "/stats", self.statistics),
            ]
        return [
            routes[0],  # first, and the one before `{model}`: they are tried in order
            GuardedRoute("/v2/models/stats", self.statistics),
            *routes[1:],
            GuardedRoute("/v2", self.server),
            GuardedRoute("/v2/", self.server),
            GuardedRoute("/v2/health/live", self.live, role=None),
            GuardedRoute("/v2/health/ready", self.ready, role=None),
            GuardedRoute("/v2/repository/index", self.index, methods=["POST"]),
            GuardedRoute(repository + "/load", self.load, methods=["POST"], role="admin"),
            GuardedRoute(repository + "/unload", self.unload, methods=["POST"], role="admin"),
            GuardedRoute("/v2/logging", self.logging),
            GuardedRoute("/v2/logging", self.change_logging, methods=["POST"], role="admin"),
            *(GuardedRoute(path, self.not_served, methods=["GET", "POST"]) for path in NOT_SERVED),
        ]

    async def server(self, request: Request) -> Response:
        return JsonAnswer(self.models.server_metadata())

    async def live(self, request: Request) -> Response:
        return JsonAnswer({"live": True})

    async def ready(self, request: Request) -> Response:
        if (problem := self.front.problem()) is not None:
            raise problem
        return JsonAnswer({"ready": True})

    async def model_ready(self, request: Request) -> Response:
        name, version = _model(request)
        if (problem := await self.models.problem(name, version)) is not None:
            raise problem
        return JsonAnswer({"name": name, "ready": True})

    async def metadata(self, request: Request) -> Response:
        return JsonAnswer(await self.models.metadata(*_model(request)))

    async def config(self, request: Request) -> Response:
        return JsonAnswer(await self.models.config(*_model(request)))

    async def statistics(self, request: Request) -> Response:
        return JsonAnswer(await self.models.statistics(*_model(request)))

    async def index(self, request: Request) -> Response:
        ready = field(await self._object(request), "ready", bool, False)
        listed = await self.models.index(ready)
        return await self.front.heavily(JsonAnswer, listed)

    async def load(self, request: Request) -> Response:
        parameters = field(await self._object(request), "parameters", dict, {})
        await self.models.load(request.path_params["model"], parameters, caller_of(request).name)
        return JsonAnswer({})

    async def unload(self, request: Request) -> Response:
        field(await self._object(request), "parameters", dict, {})
        await self.models.unload(request.path_params["model"], caller_of(request).name)
        return JsonAnswer({})

    async def logging(self, request: Request) -> Response:
        return JsonAnswer(self.models.log_settings())

    async def change_logging(self, request: Request) -> Response:
        return JsonAnswer(self.models.log_settings(await self._object(request), caller_of(request).name))

    async def not_served(self, request: Request) -> Response:
        raise ExtensionNotSupported("shared memory and trace settings are not served")

    async def infer(self, request: Request) -> Response:
        name, version = _model(request)
        self.models.check_name(name, version)
        coding = coding_of(request, CODINGS)
        holding = holding_of(request, self.front)
        asked = await self._decoded(request, await read_body(request, self.front), coding)
        answer = await self.models.infer(name, version, asked, holding)
        is_local = request.client is None  # on a Unix socket, packing only takes time
        accepted = "" if is_local else request.headers.get("accept-encoding", "")
        if sum(tensor.nbytes for tensor in answer.outputs) <= LIGHT_TEXT:
            return _written(answer, asked)
        return await self.front.heavily(lambda: compressed(_written(answer, asked), accepted))

    async def _decoded(self, request: Request, body: bytes, coding: str) -> InferRequest:
        """What a body says; it holds the memory for what it becomes before it does."""
        json_bytes = _json_bytes(request)
        row_shape = (await self.models.shapes())["input_shape"] if json_bytes == 0 else None
        text_bytes = len(body) if json_bytes is None else json_bytes
        if coding == "identity" and (row_shape or (len(body) <= LIGHT_BYTES and text_bytes <= LIGHT_TEXT)):
            return _decode(body, json_bytes, row_shape)
        most, holding = self.front.limits.max_body_bytes, holding_of(request, self.front)
        away = run_in_threadpool if len(body) <= LIGHT_PACKED else self.front.heavily
        found = await away(measure, body, coding, most, json_bytes)
        await holding.take("decoded", _needed(found, coding), "what this request becomes")
        asked = await away(lambda: _decode(unpack(body, coding, most), json_bytes, row_shape))
        if json_bytes is None:  # nothing is left of the text
            holding.keep("decoded", sum(tensor.nbytes for tensor in asked.inputs))
        if json_bytes is None or coding != "identity":
            holding.give("received")
        return asked

    async def _object(self, request: Request) -> dict[str, Any]:
        """The body, an object; none stands for an empty one."""
        body = await read_words(request, self.front)
        return parse_object(body) if body else {}


def _model(request: Request) -> tuple[str, str]:
    """Name and version of the model that the path names; empty where it names none."""
    return request.path_params.get("model", ""), request.path_params.get("version", "")


def _json_bytes(request: Request) -> int | None:
    """How much of the body is JSON; None: all of it. Raises ProtocolError."""
    told = request.headers.get(JSON_BYTES)
    if told is None:
        return None
    if not _DIGITS.fullmatch(told):
        raise ProtocolError("bad_request: Inference-Header-Content-Length must be a number of bytes")
    return int(told)


def _decode(body: bytes, json_bytes: int | None, row_shape: list[int] | None) -> InferRequest:
    """row_shape: of the body that is nothing but one row."""
    return protocol.decode_request(body, json_bytes) if row_shape is None else protocol.decode_raw(body, row_shape)


def _needed(found: Measure, coding: str) -> int:
    """Bytes that a body takes beside itself."""
    unpacked = 0 if coding == "identity" else found.size
    return unpacked + VALUE_BYTES * found.commas + (BRAIN_RATIO * found.size if found.is_brain else 0)


def _written(answer: InferAnswer, asked: InferRequest) -> Response:
    head, raw = protocol.encode_answer(answer, asked)
    if not raw:
        return Response(head, media_type="application/json")
    return Response(b"".join([head, *raw]), media_type="application/octet-stream", headers={JSON_BYTES: str(len(head))})
