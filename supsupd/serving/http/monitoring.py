"""What those ask who look after the daemon: figures for Prometheus, and whether it lives and answers."""

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response

from supsupd.serving.access import GuardedRoute
from supsupd.serving.front import Front
from supsupd.serving.http.bodies import JsonAnswer


class Monitoring:
    """`/metrics`, and health under the names that are usual elsewhere. What a query says besides is passed over."""

    def __init__(self, front: Front) -> None:
        self.front = front

    def routes(self) -> list[GuardedRoute]:
        return [
            GuardedRoute("/metrics", self.metrics),
            GuardedRoute("/healthz", self.live, role=None),
            GuardedRoute("/livez", self.live, role=None),
            GuardedRoute("/readyz", self.ready, role=None),
        ]

    async def metrics(self, request: Request) -> Response:
        accept = request.headers.get("accept", "")
        body, media_type = await run_in_threadpool(self.front.metrics.render, accept)
        return Response(body, media_type=media_type)

    async def live(self, request: Request) -> Response:
        return JsonAnswer({"live": True})

    async def ready(self, request: Request) -> Response:
        if (problem := self.front.problem()) is not None:
            raise problem
        return JsonAnswer({"ready": True})
