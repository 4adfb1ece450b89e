"""What the Open Inference Protocol has no words for, under /v1."""

import re
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from supsupd.choices import BATCH_STATES, PAGE_ROWS
from supsupd.serving.access import GuardedRoute, caller_of
from supsupd.serving.engine import BadInput, TaskUnknown
from supsupd.serving.front import Front
from supsupd.serving.http.bodies import JsonAnswer, coding_of, list_answer, read_body, read_words
from supsupd.serving.oip import protocol

MAX_NAME = 255
_SHA256 = re.compile(r"[0-9a-f]{64}")
MAX_REFERENCE = 300  # the longest key, with its prefix


class Native:
    """What the Open Inference Protocol has no words for, under /v1."""

    def __init__(self, front: Front) -> None:
        self.front = front
        self.engine = front.engine

    def routes(self) -> list[GuardedRoute]:
        task = "/v1/tasks/{task}"
        return [
            GuardedRoute("/v1/status", self.status),
            GuardedRoute("/v1/tasks", self.tasks),
            GuardedRoute(task + "/retire", self.retire, methods=["POST"], role="admin"),
            GuardedRoute(task + "/reopen", self.reopen, methods=["POST"], role="admin"),
            GuardedRoute(task + "/merge", self.merge, methods=["POST"], role="admin"),
            GuardedRoute(task + "/split", self.split, methods=["POST"], role="admin"),
            GuardedRoute(task + "/rollback", self.rollback, methods=["POST"], role="admin"),
            GuardedRoute(task + "/history", self.history),
            GuardedRoute(task, self.task),
            GuardedRoute(task, self.rename, methods=["PATCH"], role="admin"),
            GuardedRoute("/v1/batches", self.batches),
            GuardedRoute("/v1/batches", self.submit, methods=["POST"], role="submit"),
            GuardedRoute("/v1/batches/{batch}", self.batch),
            GuardedRoute("/v1/batches/{batch}/why", self.why),
            GuardedRoute("/v1/batches/{batch}/retry", self.retry, methods=["POST"], role="admin"),
            GuardedRoute("/v1/batches/{batch}/drop", self.drop, methods=["POST"], role="admin"),
            GuardedRoute("/v1/rejected", self.rejected),
            GuardedRoute("/v1/sources", self.sources),
            GuardedRoute("/v1/sources/{source}/accept", self.accept_gap, methods=["POST"], role="admin"),
            GuardedRoute("/v1/reservoir", self.reservoir),
            GuardedRoute("/v1/scan", self.scan, methods=["POST"], role="submit"),
        ]

    async def status(self, request: Request) -> Response:
        return JsonAnswer(await run_in_threadpool(self.engine.status))

    async def tasks(self, request: Request) -> Response:
        retired = _query(request, "all").get("all", "false")
        if retired not in ("true", "false"):
            raise BadInput("bad_request: all must be true or false")
        return await list_answer(request, self.front, self.engine.tasks, retired == "true")

    async def task(self, request: Request) -> Response:
        return JsonAnswer(await run_in_threadpool(self.engine.task, _reference(request)))

    async def rename(self, request: Request) -> Response:
        name = await self._value(request, "name", str)
        return JsonAnswer(await self.front.patiently(self.engine.rename, _reference(request), name))

    async def retire(self, request: Request) -> Response:
        return JsonAnswer(await self.front.patiently(self.engine.retire, _reference(request), caller_of(request).name))

    async def reopen(self, request: Request) -> Response:
        return JsonAnswer(await self.front.patiently(self.engine.reopen, _reference(request), caller_of(request).name))

    async def merge(self, request: Request) -> Response:
        other = await self._value(request, "other", int, str)
        by = caller_of(request).name
        return JsonAnswer(await self.front.patiently(self.engine.merge, _reference(request), other, by))

    async def split(self, request: Request) -> Response:
        batch = await self._value(request, "from", int)
        by = caller_of(request).name
        return JsonAnswer(await self.front.patiently(self.engine.split, _reference(request), batch, by))

    async def rollback(self, request: Request) -> Response:
        version = await self._value(request, "to", int)
        by = caller_of(request).name
        return JsonAnswer(await self.front.patiently(self.engine.rollback, _reference(request), version, by))

    async def history(self, request: Request) -> Response:
        return await list_answer(request, self.front, self.engine.history, _reference(request))

    async def why(self, request: Request) -> Response:
        return JsonAnswer(await run_in_threadpool(self.engine.why, _batch_id(request)))

    async def batch(self, request: Request) -> Response:
        text = request.path_params["batch"]
        reference = text if _SHA256.fullmatch(text) else _batch_id(request)
        return JsonAnswer(await run_in_threadpool(self.engine.batch, reference))

    async def retry(self, request: Request) -> Response:
        return JsonAnswer(await self.front.patiently(self.engine.retry, _batch_id(request)), status_code=202)

    async def drop(self, request: Request) -> Response:
        return JsonAnswer(await self.front.patiently(self.engine.drop, _batch_id(request)))

    async def rejected(self, request: Request) -> Response:
        page = _page(_query(request, "limit", "after"))
        return await list_answer(request, self.front, self.engine.rejected, *page)

    async def sources(self, request: Request) -> Response:
        return JsonAnswer(await run_in_threadpool(self.engine.sources))

    async def accept_gap(self, request: Request) -> Response:
        return JsonAnswer(await self.front.patiently(self.engine.accept_gap, request.path_params["source"]))

    async def _value(self, request: Request, key: str, *kinds: type) -> Any:
        """The one value of a body {key: value}."""
        body = protocol.parse_object(await read_words(request, self.front))
        value = body.get(key)
        if set(body) != {key} or type(value) not in kinds or (type(value) is int and not 0 <= value < 2**63):
            shown = "N" if int in kinds else '"..."'
            raise BadInput(f'bad_request: expected {{"{key}": {shown}}}')
        return value

    async def batches(self, request: Request) -> Response:
        query = _query(request, "state", "limit", "after")
        state, page = query.get("state"), _page(query)
        if state is not None and state not in BATCH_STATES:
            raise BadInput("bad_request: state must be one of " + ", ".join(BATCH_STATES))
        return await list_answer(request, self.front, self.engine.batches, state, *page)

    async def submit(self, request: Request) -> Response:
        name = _query(request, "name").get("name", "")
        if not 1 <= len(name) <= MAX_NAME or not name.isprintable():
            raise BadInput(f"bad_request: expected ?name= with 1 to {MAX_NAME} printable characters")
        keys = request.headers.getlist("idempotency-key")
        if len(keys) > 1 or not all(1 <= len(key) <= MAX_NAME and key.isprintable() for key in keys):
            raise BadInput(f"bad_request: expected one Idempotency-Key of 1 to {MAX_NAME} printable characters")
        media_type = request.headers.get("content-type")
        coding_of(request)
        payload = await read_body(request, self.front, "posted")
        key, sender = keys[0] if keys else None, caller_of(request).sender
        staged = await self.front.patiently(self.engine.submit, name, payload, media_type, key, sender)
        return JsonAnswer(staged, status_code=202)

    async def reservoir(self, request: Request) -> Response:
        return JsonAnswer(await self.front.patiently(self.engine.reservoir))

    async def scan(self, request: Request) -> Response:
        return JsonAnswer(await run_in_threadpool(self.engine.scan))


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 18  # fits in 64 bits


def _batch_id(request: Request) -> int:
    text: str = request.path_params["batch"]
    if not _is_number(text):
        raise HTTPException(404, f"there is no batch {text[:40]}")
    return int(text)


def _page(query: dict[str, str]) -> tuple[int, int | None]:
    """How many rows of a list are told, and after which id they begin."""
    limit, after = query.get("limit"), query.get("after")
    if limit is not None and (not _is_number(limit) or int(limit) < 1):
        raise BadInput("bad_request: limit must be an integer of 1 or more")
    if after is not None and not _is_number(after):
        raise BadInput("bad_request: after must be an integer of 0 or more")
    return min(PAGE_ROWS, PAGE_ROWS if limit is None else int(limit)), None if after is None else int(after)


def _reference(request: Request) -> str:
    text: str = request.path_params["task"]
    if not 1 <= len(text) <= MAX_REFERENCE or not text.isprintable():  # as every key and name is
        raise TaskUnknown(text[:40])
    return text


def _query(request: Request, *allowed: str) -> dict[str, str]:
    given = [name for name, _ in request.query_params.multi_items()]
    if unknown := set(given) - set(allowed):
        raise BadInput(f"bad_request: unknown query {min(unknown)!r}; expected {' or '.join(allowed)}")
    if len(given) != len(set(given)):
        raise BadInput("bad_request: expected each query once")
    return dict(request.query_params)
