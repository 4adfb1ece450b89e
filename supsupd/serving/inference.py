"""Open Inference Protocol v2 under /v2."""

from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

import supsupd
from supsupd.serving import protocol
from supsupd.serving.access import GuardedRoute
from supsupd.serving.bodies import JsonAnswer, read_body
from supsupd.serving.engine import MODEL_NAME, BadInput, NoModelYet
from supsupd.serving.front import Front

LIGHT_BYTES = 1 << 16
"""A body that is decoded in well under a millisecond."""


class Inference:
    """Open Inference Protocol v2 under /v2."""

    def __init__(self, front: Front) -> None:
        self.front = front
        self.engine = front.engine

    def routes(self) -> list[GuardedRoute]:
        model = "/v2/models/{model}"
        return [
            GuardedRoute(model + "/infer", self.infer, methods=["POST"]),  # first: they are tried in order
            GuardedRoute("/v2", self.server),
            GuardedRoute("/v2/", self.server),
            GuardedRoute("/v2/health/live", self.live, role=None),
            GuardedRoute("/v2/health/ready", self.ready, role=None),
            GuardedRoute(model, self.model),
            GuardedRoute(model + "/ready", self.ready),
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
        body = await read_body(request, self.front.limits)
        is_light = len(body) <= LIGHT_BYTES  # megabytes of JSON would hold up the loop as much as predicting
        asked = protocol.decode_request(body) if is_light else await run_in_threadpool(protocol.decode_request, body)
        prediction = await self.front.infer(asked.question)
        if is_light:
            return JsonAnswer(protocol.encode_response(prediction, asked))
        return await run_in_threadpool(lambda: JsonAnswer(protocol.encode_response(prediction, asked)))


def _model_name(request: Request) -> dict[str, str]:
    """{"name": model} where the path names one, else {}. Raises 404 for any model but ours."""
    name = request.path_params.get("model")
    if name not in (None, MODEL_NAME):
        raise HTTPException(404, f"unknown_model: the one model here is {MODEL_NAME}")
    return {} if name is None else {"name": name}
