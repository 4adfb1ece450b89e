"""What is sent and how the answer is read, without sending it: the same for every form of the client."""

from __future__ import annotations

import functools
import json
from collections.abc import Awaitable, Callable, Generator, Mapping
from dataclasses import dataclass, field
from typing import Any, Concatenate, Generic, ParamSpec, Protocol, Self, TypeAlias, TypeVar, overload

import httpx

P = ParamSpec("P")
T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class DaemonUnavailable(Exception):
    """No daemon answers at the address."""


class DaemonError(Exception):
    """The daemon said no: `status` is the HTTP status, `text` its reason, `retry_after` the seconds after which it
    may be asked again, if it says so."""

    def __init__(self, status: int, text: str, retry_after: float | None = None) -> None:
        super().__init__(text)
        self.status = status
        self.text = text
        self.retry_after = retry_after


def read_json(response: httpx.Response) -> Any:
    """The JSON of an answer. Raises DaemonError."""
    try:
        answer = response.json()
    except ValueError:
        raise _error(response, f"HTTP {response.status_code} without a JSON answer") from None
    if response.is_success:
        return answer
    text = answer.get("error") if isinstance(answer, dict) else None
    raise _error(response, text or f"HTTP {response.status_code}")


def read_text(response: httpx.Response) -> str:
    """The text of an answer. Raises DaemonError."""
    return response.text if response.is_success else read_json(response)


def read_ok(response: httpx.Response) -> None:
    """That it was done; what the answer says beside that is nothing. Raises DaemonError."""
    if not response.is_success:
        read_json(response)


def read_yes(response: httpx.Response) -> bool:
    """Whether the answer is yes: success, where 503 is no. Raises DaemonError for anything else."""
    if response.status_code == httpx.codes.SERVICE_UNAVAILABLE:
        return False
    read_ok(response)
    return True


def _error(response: httpx.Response, text: str) -> DaemonError:
    seconds = response.headers.get("retry-after", "")
    return DaemonError(response.status_code, text, float(seconds) if seconds.isdecimal() else None)


@dataclass(frozen=True, slots=True)
class Call(Generic[T]):
    """One request, and how its answer is read."""

    method: str
    path: str
    params: Mapping[str, Any] = field(default_factory=dict)
    content: bytes | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    read: Callable[[httpx.Response], T] = read_json

    def __iter__(self) -> Steps[T]:
        answer: T = yield self
        return answer

    @property
    def request(self) -> dict[str, Any]:
        """The arguments of httpx's `request`."""
        return {
            "method": self.method,
            "url": self.path,
            "params": self.params,
            "content": self.content,
            "headers": self.headers,
        }


@dataclass(frozen=True, slots=True)
class Pause:
    """So many seconds before the next step."""

    seconds: float


Steps: TypeAlias = Generator[Call[Any] | Pause, Any, T]
"""Calls, each of which gets its answer sent, and pauses; returns what comes of them."""


class Plan(Protocol[T_co]):
    """A call, or a generator of several."""

    def __iter__(self) -> Steps[T_co]: ...


def to_json(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def given(**values: Any) -> dict[str, Any]:
    """Those that are not None."""
    return {name: value for name, value in values.items() if value is not None}


class Waiting(Protocol):
    """A client that carries a plan out before it returns."""

    def carry_out(self, plan: Plan[T]) -> T: ...


class Awaiting(Protocol):
    """A client that carries a plan out while it is awaited."""

    def carry_out(self, plan: Plan[T]) -> Awaitable[T]: ...


class request(Generic[P, T]):  # noqa: N801 - a decorator
    """A method that plans what the client then carries out: its answer in a `Client`, to be awaited in an
    `AsyncClient`."""

    def __init__(self, plan: Callable[Concatenate[Any, P], Plan[T]]) -> None:
        self._plan = plan
        functools.update_wrapper(self, plan)  # type: ignore[arg-type]  # for help() and signatures

    @overload
    def __get__(self, client: None, owner: type) -> Self: ...
    @overload
    def __get__(self, client: Waiting, owner: type) -> Callable[P, T]: ...
    @overload
    def __get__(self, client: Awaiting, owner: type) -> Callable[P, Awaitable[T]]: ...
    def __get__(self, client: Any, owner: type) -> Any:
        if client is None:
            return self
        return functools.partial(self._carry_out, client)

    def _carry_out(self, client: Any, *args: P.args, **kwargs: P.kwargs) -> Any:
        return client.carry_out(self._plan(client, *args, **kwargs))
