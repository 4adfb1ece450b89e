"""Who asks and what they may do. A route says which role it takes; a connection or a token says which role there is."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

import structlog
from starlette.requests import Request
from starlette.routing import Match, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from supsupd.choices import ROLES, Role
from supsupd.config import ServingSettings
from supsupd.serving.engine import EngineError
from supsupd.serving.http.bodies import HELD, error_answer
from supsupd.serving.peer import is_member, peer_of, show_user
from supsupd.tokens import Tokens

CALLER, ROUTE = "supsupd.caller", "supsupd.route"
"""In a request's `state`: who sent it; the template of its path."""
OWN_HOSTS = frozenset(("localhost", "127.0.0.1", "[::1]"))
EVERY_ADDRESS = frozenset(("0.0.0.0", "[::]"))  # noqa: S104 - as a name of ours it would be anybody's
CHALLENGE = {"WWW-Authenticate": "Bearer"}
_BEARER = re.compile(r"Bearer +(\S+)", re.IGNORECASE)
_MAPPED = "::ffff:"  # before an IPv4 address that came in on a socket of IPv6
_PORT = re.compile(r":\d{1,5}$")

log = structlog.get_logger("supsupd.serving")


class Unauthenticated(EngineError):
    """Nobody knows who this is. One text for all reasons: a guesser learns nothing."""

    status = 401

    def __init__(self) -> None:
        super().__init__("unauthenticated: expected a valid bearer token, of supsupd token create")


class Forbidden(EngineError):
    """Who this is may not do it."""

    status = 403

    def __init__(self, text: str) -> None:
        super().__init__(f"forbidden: {text}")


@dataclass(frozen=True, slots=True)
class Caller:
    """Who sent a request, as it is written into the history of masks, and what they may do.

    sender: who it is for as long as the token or the user is: whose batches and idempotency keys these are.
    """

    name: str | None
    role: Role
    sender: str

    def may(self, role: Role) -> bool:
        return ROLES.index(self.role) >= ROLES.index(role)

    def require(self, role: Role) -> None:
        """Raises Forbidden for a lower role."""
        if not self.may(role):
            raise Forbidden(f"this takes the role {role}, and yours is {self.role}")


class Access:
    """Decides who is let in, over HTTP and gRPC alike. Used in the thread of the event loop.

    Args:
        limits: gives the settings in force.
        tokens: of those who come over TCP; None: nobody does.
        hosts: names that are listened on over TCP.
    """

    def __init__(
        self, limits: Callable[[], ServingSettings], tokens: Tokens | None = None, hosts: Iterable[str] = ()
    ) -> None:
        self._limits = limits
        self._tokens = tokens
        self._owners = (0, os.geteuid())  # root may do everything anyway
        self._hosts = OWN_HOSTS | {_host_name(host) for host in hosts} - EVERY_ADDRESS

    def caller_of_unix(self, connection: socket.socket) -> Caller | None:
        """Who connected to a Unix socket, by the kernel's word; None, and a line in the log, for somebody who has no
        business here, whatever the mode of the file."""
        peer, limits = peer_of(connection), self._limits()
        if peer.uid in self._owners:
            return Caller(show_user(peer.uid), "admin", f"uid {peer.uid}")
        if limits.socket_group is not None and is_member(peer, limits.socket_group):
            return Caller(show_user(peer.uid), limits.socket_group_role, f"uid {peer.uid}")
        log.warning("peer_refused", user=show_user(peer.uid))
        return None

    def caller_of_file(self) -> Caller:
        """Whoever the mode of a Unix socket's file lets in, where the kernel can't be asked: the least of them."""
        limits = self._limits()
        return Caller(None, "admin" if limits.socket_group is None else limits.socket_group_role, "socket")

    def caller_of_token(self, header: str | None) -> Caller:
        """Who sends this value of `Authorization` over TCP. Raises Unauthenticated."""
        bearer = _BEARER.fullmatch(header or "")
        token = None if bearer is None or self._tokens is None else self._tokens.find(bearer[1])
        if token is None:
            raise Unauthenticated
        sender = f"token {token.id}"
        name = f"{sender} ({token.label})" if token.label else sender
        return Caller(name, min(token.role, self._limits().tcp_role, key=ROLES.index), sender)

    def check_host(self, header: str | None, address: str | None) -> None:
        """Raises Forbidden unless a request over TCP is meant for us: a page of another site, whose name was bound to
        our address, says that name.

        header: its `Host`; address: where it came in.
        """
        name = None if header is None else _host_name(header)
        if name is None or not (name in self._hosts or name == address or name in self._named()):
            raise Forbidden("expected a Host that is served here; serving.hosts may name more")

    def _named(self) -> set[str]:
        return {_host_name(host) for host in self._limits().hosts}


def _host_name(host: str) -> str:
    """As it is compared: without a port, in small letters; an IPv6 address in brackets."""
    if host.count(":") > 1 and not host.startswith("["):
        host = f"[{host}]"
    return _PORT.sub("", host.lower())


def caller_of(request: Request) -> Caller:
    """Who sent a request that has been let in."""
    caller: Caller = request.scope["state"][CALLER]
    return caller


def path_of(scope: Scope) -> str:
    """The path as it was sent. All who look at it read this: decoded, another path could be taken for it."""
    path: bytes = scope["raw_path"]
    return path.decode("latin-1")


class GuardedRoute(Route):
    """A route for callers of a role, or for everybody where that is None.

    A path is taken apart as it was sent, and only then are its parameters decoded: they may hold anything.
    """

    def __init__(
        self,
        path: str,
        endpoint: Callable[..., Any],
        *,
        role: Role | None = "predict",
        methods: Sequence[str] = ("GET",),
    ) -> None:
        super().__init__(path, endpoint, methods=list(methods))
        self.role = role
        self.app = _answered_by(endpoint)  # the framework's looks after errors, which its middleware does as well

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        found = self.path_regex.match(path_of(scope)) if scope["type"] == "http" else None
        if found is None:
            return Match.NONE, {}
        try:
            parameters = {name: unquote(text, errors="strict") for name, text in found.groupdict().items()}
        except UnicodeDecodeError:
            return Match.NONE, {}
        is_allowed = self.methods is not None and scope["method"] in self.methods
        return Match.FULL if is_allowed else Match.PARTIAL, {"endpoint": self.endpoint, "path_params": parameters}

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["state"][ROUTE] = self.path
        if self.role is not None:
            scope["state"][CALLER].require(self.role)
        await super().handle(scope, receive, send)


def _answered_by(endpoint: Callable[..., Any]) -> ASGIApp:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            answer = await endpoint(Request(scope, receive, send))
            await answer(scope, receive, send)
        finally:
            if (holding := scope["state"].pop(HELD, None)) is not None:
                holding.end()

    return app


class Guard:
    """ASGI middleware before all routes: only who is known comes through, but to the paths that are open to all.

    A connection to the Unix socket has its caller in `scope["state"]`, put there when it was made; any other has none,
    and needs a token.
    """

    def __init__(self, app: ASGIApp, access: Access, open_paths: Iterable[str]) -> None:
        self.app = app
        self.access = access
        self.open_paths = frozenset(open_paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            self._let_in(scope)
        except EngineError as error:
            challenge = CHALLENGE if error.status == 401 else None
            await error_answer(error.status, error.text, challenge)(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def _let_in(self, scope: Scope) -> None:
        """Sets the caller. Raises Unauthenticated and Forbidden."""
        if _header(scope, b"origin") != []:
            # A browser sends it with every cross-site request; no page has any business here.
            raise Forbidden("requests from web pages are refused")
        state = scope.setdefault("state", {})
        if CALLER in state:
            return
        hosts, address = _header(scope, b"host"), scope.get("server")
        self.access.check_host(
            hosts[0] if len(hosts) == 1 else None, address and _host_name(address[0].removeprefix(_MAPPED))
        )
        if path_of(scope) not in self.open_paths:
            authorizations = _header(scope, b"authorization")
            state[CALLER] = self.access.caller_of_token(authorizations[0] if len(authorizations) == 1 else None)


def _header(scope: Scope, wanted: bytes) -> list[str]:
    return [value.decode("latin-1") for name, value in scope["headers"] if name == wanted]
