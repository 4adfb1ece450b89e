"""The OpenAPI description of what is served: the table of routes, with what is said about each in `described_*`."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import TypeAdapter
from pydantic.json_schema import GenerateJsonSchema
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response

from supsupd import __version__
from supsupd.answers import Failure
from supsupd.serving.access import GuardedRoute
from supsupd.serving.http.bodies import JsonAnswer
from supsupd.serving.http.described_inference import INFERENCE
from supsupd.serving.http.described_monitoring import MONITORING
from supsupd.serving.http.described_native import NATIVE
from supsupd.serving.http.operation import STRING, Operation

OPERATIONS: Mapping[str, Operation] = {**NATIVE, **INFERENCE, **MONITORING}
"""By method and path."""
ERRORS = {
    400: "The request is wrong, and the text says how.",
    401: "There is no valid token.",
    403: "The role is too low, or a web page asks, or the Host is not served here.",
    404: "There is no such thing.",
    408: "The body did not come in time.",
    409: "It makes no sense as things are.",
    413: "The body is too large.",
    415: "The body's Content-Encoding is not supported here.",
    429: "Too many queries wait.",
    500: "An error of the daemon's own; its log has the traceback.",
    501: "A part of the protocol that is not served.",
    503: "Not now: nothing is learned yet, the daemon ends, or something that it needs is away.",
}
LATER = (429, 503)
"""Errors that may say when to ask again."""
_CONVERTOR = re.compile(r":\w+}")


class Description:
    """Answers with the description of these routes and of its own.

    Args:
        routes: all others.
    """

    def __init__(self, routes: Iterable[GuardedRoute]) -> None:
        self.route = GuardedRoute("/openapi.json", self._answer)
        self._routes = [*routes, self.route]

    @functools.cached_property
    def document(self) -> dict[str, Any]:
        return describe(self._routes)

    async def _answer(self, request: Request) -> Response:
        return await run_in_threadpool(lambda: JsonAnswer(self.document))


def describe(routes: Iterable[GuardedRoute]) -> dict[str, Any]:
    """An OpenAPI 3.1 document. Raises KeyError for a route that nothing is said about."""
    schemas = _Schemas(Failure, *(operation.answer for operation in OPERATIONS.values()))
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        for method in sorted((route.methods or set()) - {"HEAD"}):  # which is GET without the body
            path = _CONVERTOR.sub("}", route.path)
            operation = OPERATIONS[f"{method} {path}"]
            paths.setdefault(path, {})[method.lower()] = _operation(path, route, operation, schemas)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "supsupd",
            "version": __version__,
            "description": "/v2 is the Open Inference Protocol, /v1 is what it has no words for. x-role is the least "
            "role of a token; over the Unix socket none is needed.",
        },
        "paths": paths,
        "components": {
            "schemas": schemas.definitions,
            "responses": {str(status): _error(status, schemas) for status in ERRORS},
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
    }


def _operation(path: str, route: GuardedRoute, operation: Operation, schemas: _Schemas) -> dict[str, Any]:
    parameters = [
        {"name": name, "in": place, "required": place == "path" or name in operation.required, "schema": schema}
        for place, schemas_by_name in (
            ("path", {name: operation.path.get(name, STRING) for name in re.findall(r"{(\w+)}", path)}),
            ("query", operation.query),
            ("header", operation.headers),
        )
        for name, schema in schemas_by_name.items()
    ]
    described: dict[str, Any] = {
        "summary": operation.summary,
        "security": [] if route.role is None else [{"token": []}],
        "x-role": route.role,
        "parameters": parameters,
        "responses": _responses(path, route, operation, schemas),
    }
    if operation.body:
        content = {media_type: {"schema": schema} for media_type, schema in operation.body.items()}
        described["requestBody"] = {"content": content, "required": operation.body_required}
    return described


def _responses(path: str, route: GuardedRoute, operation: Operation, schemas: _Schemas) -> dict[str, Any]:
    statuses = {400, 403, 500, 503, *operation.errors}
    statuses |= {401} if route.role is not None else set()
    statuses |= {404} if "{" in path else set()
    statuses |= {408, 413, 415} if operation.body else set()
    errors = {str(status): {"$ref": f"#/components/responses/{status}"} for status in sorted(statuses)}
    if operation.answer is None and not operation.media_types:
        return errors
    content: dict[str, Any] = {media_type: {} for media_type in operation.media_types}
    if operation.answer is not None:
        content["application/json"] = {"schema": schemas.of(operation.answer)}
    return {str(operation.status): {"description": operation.summary, "content": content}} | errors


def _error(status: int, schemas: _Schemas) -> dict[str, Any]:
    described: dict[str, Any] = {
        "description": ERRORS[status],
        "content": {"application/json": {"schema": schemas.of(Failure)}},
    }
    if status in LATER:
        seconds = {"type": "string", "pattern": "^[0-9]+$"}
        described["headers"] = {"Retry-After": {"description": "Seconds.", "schema": seconds}}
    return described


class _Untitled(GenerateJsonSchema):
    """Without titles that repeat the names of fields."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


class _Schemas:
    """JSON schemas of types, shared among all that refer to them."""

    def __init__(self, *types: Any) -> None:
        kinds = [kind for kind in types if kind is not None]
        self._found, shared = TypeAdapter.json_schemas(
            [(index, "serialization", TypeAdapter(kind)) for index, kind in enumerate(kinds)],
            ref_template="#/components/schemas/{model}",
            schema_generator=_Untitled,
        )
        self._kinds = kinds
        self.definitions: dict[str, Any] = shared["$defs"]

    def of(self, kind: Any) -> dict[str, Any]:
        return self._found[self._kinds.index(kind), "serialization"]
