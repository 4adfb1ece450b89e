"""The ASGI application: which routes there are, and what every error looks like."""

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response

from supsupd.serving.access import Access, Guard, path_of
from supsupd.serving.engine import EngineError
from supsupd.serving.front import Front
from supsupd.serving.http.bodies import error_answer
from supsupd.serving.http.inference import Inference
from supsupd.serving.http.monitoring import Monitoring
from supsupd.serving.http.native import Native
from supsupd.serving.http.openapi import Description
from supsupd.serving.http.refusals import RETRY_SECONDS
from supsupd.serving.http.requests import REQUEST_ID, Requests
from supsupd.serving.memory import let_go
from supsupd.serving.oip import protocol
from supsupd.serving.oip.models import Models

MODEL_PATHS = ("/v2/models/", "/v2/repository/models/")


def create_app(front: Front, access: Access | None = None, models: Models | None = None) -> Starlette:
    """The ASGI application that serves what is behind `front`, to those whom `access` lets in; None: over the Unix
    socket alone."""
    access = access or Access(lambda: front.limits)
    routes = [*Inference(front, models or Models(front)).routes(), *Native(front).routes(), *Monitoring(front).routes()]
    routes.append(Description(routes).route)
    open_paths = [route.path for route in routes if route.role is None]
    app = Starlette(
        routes=routes,
        middleware=[
            Middleware(Requests, metrics=front.metrics),
            Middleware(Guard, access=access, open_paths=open_paths),
        ],
        exception_handlers={
            HTTPException: _answer_http_error,
            EngineError: _answer_engine_error,
            protocol.ProtocolError: _answer_protocol_error,
            Exception: _answer_crash,
        },
    )
    app.router.redirect_slashes = False  # protocol clients follow no redirects
    return app


async def _answer_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    let_go(error)
    nothing = "there is nothing at this path"
    if path_of(request.scope).startswith(MODEL_PATHS):
        nothing = f"unknown_model: {nothing}"  # a name with a slash, most likely
    own_words = {404: nothing, 405: f"{request.method} is not allowed here"}
    framework = error.detail in ("Not Found", "Method Not Allowed")
    text = own_words[error.status_code] if framework else error.detail
    headers = {"Allow": _allowed(request)} if error.status_code == 405 else error.headers
    return error_answer(error.status_code, text, headers)


def _allowed(request: Request) -> str:
    """The methods of all routes for this path; the framework names those of the first."""
    path = path_of(request.scope)
    methods = (route.methods for route in request.app.routes if route.path_regex.match(path))
    return ", ".join(sorted(set().union(*methods)))


async def _answer_engine_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, EngineError)
    let_go(error)
    later = {"Retry-After": str(RETRY_SECONDS)} if error.status in (429, 503) else None
    return error_answer(error.status, error.text, later)


async def _answer_protocol_error(request: Request, error: Exception) -> Response:
    let_go(error)
    return error_answer(400, str(error))


async def _answer_crash(request: Request, error: Exception) -> Response:
    # Starlette raises the error again after this answer, and the server logs it with its traceback.
    request_id = request.scope["state"][REQUEST_ID]
    text = f"internal error; the daemon's log says more of request {request_id}"
    return error_answer(500, text, {"X-Request-Id": request_id})
