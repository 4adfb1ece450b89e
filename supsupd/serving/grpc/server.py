"""The gRPC server: Open Inference Protocol v2 and the standard health service, on TCP and on a Unix socket."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import grpc
import grpc.aio
import structlog

from supsupd.sections import ServerTlsSettings, ServingSettings
from supsupd.serving.access import Access
from supsupd.serving.front import Front
from supsupd.serving.grpc.arriving import Arriving, message_bytes
from supsupd.serving.grpc.calls import Calls
from supsupd.serving.grpc.health import Health
from supsupd.serving.grpc.listening import listen_tcp, listen_unix
from supsupd.serving.grpc.methods import SERVICE, Methods
from supsupd.serving.listeners import Listener
from supsupd.serving.oip.models import Models

log = structlog.get_logger("supsupd.serving")
QUIET_SECONDS = 0.05
"""How long calls that are on their way are still told that the daemon stops: the library would cancel them."""
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
        arriving = Arriving(self._front)
        self._calls = Calls(self._front, Methods(self._models), self._access, arriving)
        service = grpc.method_handlers_generic_handler(SERVICE, self._calls.handlers())
        self.health = Health(self._front, arriving)
        self._server.add_generic_rpc_handlers((service, self.health.handler(), self._calls.of_nothing()))
        try:
            for address in self._addresses:
                self._listen(address)
        except BaseException:
            self._remove_files()
            raise
        await self._server.start()
        log.info("grpc_listening", listening=self.bound)

    async def stop(self, grace: float) -> None:
        """Takes no more calls; those that run have so many seconds to end."""
        self._remove_files()
        self.health.end()
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
        ("grpc.max_receive_message_length", message_bytes(limits)),  # unpacked, too
        ("grpc.max_send_message_length", -1),
        ("grpc.max_allowed_incoming_connections", limits.max_connections),  # of each address
        ("grpc.server_handshake_timeout_ms", int(limits.header_seconds * 1000)),
        ("grpc.max_connection_idle_ms", int(limits.idle_seconds * 1000)),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", PING_SECONDS * 1000),
    ]
