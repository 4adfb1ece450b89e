"""The gRPC server: Open Inference Protocol v2 and the standard health service, on TCP and on a Unix socket."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import structlog
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from supsupd.sections import ServerTlsSettings, ServingSettings
from supsupd.serving.access import Access
from supsupd.serving.front import Front
from supsupd.serving.grpc.calls import Calls
from supsupd.serving.grpc.listening import listen_tcp, listen_unix
from supsupd.serving.grpc.methods import SERVICE, Methods
from supsupd.serving.listeners import Listener
from supsupd.serving.oip.models import Models

log = structlog.get_logger("supsupd.serving")
QUIET_SECONDS = 0.05
"""How long calls that are on their way are still told that the daemon stops: the library would cancel them."""
HEALTH_SECONDS = 0.5
"""How often those who watch the health are told of changes."""
MOST_WATCHERS = 64
"""Those who watch the health need no token, and each takes a call's place for as long as it likes."""
PING_SECONDS = 5
"""A client may ask so often whether we are there."""


class GrpcService:
    """Serves in the event loop that starts it.

    Args:
        front: gives the limits; those of size and number are as of the start.
        models: answers.
        access: decides who is let in over TCP; a Unix socket lets in whom its mode does.
        addresses: HOST:PORT for TCP, a path for a Unix socket.
        tls: of TCP.
    """

    def __init__(
        self, front: Front, models: Models, access: Access, addresses: Sequence[str | Path], tls: ServerTlsSettings
    ) -> None:
        self.bound: list[str] = []
        """What is listened on once started: HOST:PORT with the port as it is, and paths."""
        self._front = front
        self._models = models
        self._access = access
        self._addresses = addresses
        self._tls = tls
        self._files: list[Listener] = []

    async def start(self) -> None:
        """Returns once calls are answered. Raises SocketRefused and ConfigError."""
        limits = self._front.limits
        self._server = grpc.aio.server(options=_options(limits), maximum_concurrent_rpcs=limits.max_connections)
        self._calls = Calls(self._front, Methods(self._models), self._access)
        service = grpc.method_handlers_generic_handler(SERVICE, self._calls.handlers())
        self._health = _Health(self._models)
        self._server.add_generic_rpc_handlers((service,))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        self._server.add_generic_rpc_handlers((self._calls.of_nothing(),))  # asked last
        try:
            for address in self._addresses:
                self._listen(address)
        except BaseException:
            self._remove_files()
            raise
        await self._server.start()
        log.info("grpc_listening", listening=self.bound)
        self._watching = asyncio.create_task(self._health.keep_true())

    async def stop(self, grace: float) -> None:
        """Takes no more calls; those that run have so many seconds to end."""
        self._remove_files()
        self._watching.cancel()
        await self._health.enter_graceful_shutdown()
        self._calls.end()
        await asyncio.sleep(QUIET_SECONDS)
        await self._server.stop(max(0.0, grace - QUIET_SECONDS))

    def _listen(self, address: str | Path) -> None:
        if isinstance(address, Path):
            self._files.append(listen_unix(self._server, address, self._front.limits.socket_group))
            self.bound.append(str(address))
        else:
            self.bound.append(listen_tcp(self._server, address, self._tls))

    def _remove_files(self) -> None:
        for file in self._files:
            file.remove_file()


def _options(limits: ServingSettings) -> list[tuple[str, int]]:
    return [
        ("grpc.so_reuseport", 0),  # else a second server on the same port would take a share of the calls
        ("grpc.max_receive_message_length", limits.max_body_bytes),  # unpacked, too
        ("grpc.max_send_message_length", -1),
        ("grpc.max_allowed_incoming_connections", limits.max_connections),  # of each address
        ("grpc.server_handshake_timeout_ms", int(limits.header_seconds * 1000)),
        ("grpc.max_connection_idle_ms", int(limits.idle_seconds * 1000)),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", PING_SECONDS * 1000),
    ]


class _Health(health.aio.HealthServicer):
    """`grpc.health.v1.Health`: the server, and its one service, serve while they are ready."""

    def __init__(self, models: Models) -> None:
        super().__init__()
        self._models = models
        self._watchers = 0

    async def Check(self, request: Any, context: Any) -> Any:  # noqa: N802 - the service's name
        await self._refresh()
        return await super().Check(request, context)

    async def Watch(self, request: Any, context: Any) -> None:  # noqa: N802 - the service's name
        if self._watchers >= MOST_WATCHERS:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, f"overloaded: {self._watchers} watch the health")
        self._watchers += 1
        try:
            await super().Watch(request, context)
        finally:
            self._watchers -= 1

    async def keep_true(self) -> None:
        """For those who watch."""
        while True:
            await self._refresh()
            await asyncio.sleep(HEALTH_SECONDS)

    async def _refresh(self) -> None:
        states = health_pb2.HealthCheckResponse
        state = states.SERVING if self._models.is_server_ready() else states.NOT_SERVING
        for service in ("", SERVICE):
            await self.set(service, state)
