"""Who asks and what they may do. A route says which role it takes; a connection or a token says which role there is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from supsupd.choices import ROLES, Role
from supsupd.serving.bodies import error_answer

CALLER = "supsupd.caller"


@dataclass(frozen=True, slots=True)
class Caller:
    """Who sent a request, as it is written into the history of masks, and what they may do."""

    name: str | None
    role: Role

    def may(self, role: Role) -> bool:
        return ROLES.index(self.role) >= ROLES.index(role)


def caller_of(request: Request) -> Caller:
    """Who sent a request that has been let in."""
    caller: Caller = request.scope["state"][CALLER]
    return caller


class GuardedRoute(Route):
    """A route for callers of a role, or for everybody where that is None."""

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

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        caller: Caller | None = scope["state"].get(CALLER)
        if self.role is None or (caller is not None and caller.may(self.role)):
            await super().handle(scope, receive, send)
        else:
            await error_answer(403, f"forbidden: this takes the role {self.role}")(scope, receive, send)
