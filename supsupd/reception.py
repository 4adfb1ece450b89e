"""The daemon's doors: what is listened on, who is let in, and who answers."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

from supsupd.config import ConfigError, Settings
from supsupd.precautions import is_loopback
from supsupd.sections import split_address
from supsupd.serving.access import Access
from supsupd.serving.front import Front
from supsupd.serving.grpc.extra import grpc_service
from supsupd.serving.http.app import create_app
from supsupd.serving.listeners import Listener, adopt, bind_tcp, bind_unix, tls_context
from supsupd.serving.oip.models import Models
from supsupd.serving.server import BesideHttp, Server
from supsupd.tokens import Tokens


def open_server(settings: Settings, front: Front, handed: Sequence[socket.socket] = ()) -> Server:
    """A server, not started, that listens on what the settings name, and on sockets that were handed over: of a kind,
    Unix or TCP, they take the place of the settings' own.

    Raises SocketRefused, ConfigError and MissingExtra; then nothing is left open.
    """
    addresses = [address for address in (settings.http, settings.grpc) if address is not None]
    hosts = [split_address(address)[0] for address in addresses]
    access = Access(lambda: front.limits, Tokens(settings.state), hosts)
    models = Models(front)
    services = _services(settings, front, models, access)
    with ExitStack() as unless_all_open:
        listeners: list[Listener] = []
        for listener in _listeners(settings, handed):
            listeners.append(listener)
            unless_all_open.callback(listener.close)
            unless_all_open.callback(listener.remove_file)
        server = Server(front, create_app(front, access, models), listeners, services, access)
        unless_all_open.pop_all()
    return server


def _services(settings: Settings, front: Front, models: Models, access: Access) -> list[BesideHttp]:
    addresses: list[str | Path] = [place for place in (settings.grpc, settings.grpc_socket) if place is not None]
    return [grpc_service(front, models, access, addresses, settings.tls)] if addresses else []


def _listeners(settings: Settings, handed: Sequence[socket.socket]) -> Iterator[Listener]:
    tls = tls_context(settings.tls)
    adopted = [adopt(one, tls) for one in handed]
    for listener in adopted:
        if not (listener.is_unix or listener.tls or is_loopback(listener.host)):
            raise ConfigError(
                [
                    f"LISTEN_FDS: given {listener.address}, which other machines may reach, without TLS; expected a"
                    " loopback address in the socket unit; or set tls.certificate and tls.key"
                ]
            )
        yield listener
    if not any(listener.is_unix for listener in adopted):
        yield bind_unix(settings.socket, group=settings.serving.socket_group)
    if settings.http is not None and all(listener.is_unix for listener in adopted):
        yield bind_tcp(*split_address(settings.http), tls)
