"""The two forms of the client: one waits for an answer, the other is awaited."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import httpx

from supsupd.client.calls import Call, DaemonUnavailable, Pause, Plan
from supsupd.client.requests import Requests

T = TypeVar("T")


class _Connection(Requests):
    """Where the daemon is, and how it is reached."""

    def __init__(
        self,
        address: Path | str,
        timeout: float = 60.0,
        *,
        token: str | None = None,
        verify: Path | str | None = None,
        certificate: Path | str | tuple[Path | str, Path | str] | None = None,
    ) -> None:
        """
        Args:
            address: the path of a Unix socket, or http://HOST:PORT or https://HOST:PORT, with what path may stand
                before /v1 and /v2.
            timeout: seconds for each request.
            token: as `supsupd token create` prints it.
            verify: a PEM file of the authorities that the daemon's certificate may be of; None: the system's.
            certificate: a PEM file of this client's own certificate and its key, or one of each.

        Raises ValueError for an address that is no URL, and OSError for a PEM file that can't be used.
        """
        self.address = str(address)
        self.timeout = timeout
        transport: dict[str, Any]
        if self.address.startswith("https://"):
            transport = {"verify": _trust(verify, certificate)}
        elif self.address.startswith("http://"):
            transport = {"verify": False}
        else:
            transport = {"verify": False, "uds": self.address}
        try:
            self._connect(
                transport,
                base_url="http://localhost" if "uds" in transport else self.address,
                timeout=timeout,
                headers={} if token is None else {"Authorization": f"Bearer {token}"},
            )
        except httpx.InvalidURL as error:
            raise ValueError(f"{self.address}: {error}") from None

    def _connect(self, transport: dict[str, Any], **settings: Any) -> None:
        raise NotImplementedError

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.address!r})"

    @contextlib.contextmanager
    def _reached(self) -> Iterator[None]:
        """What keeps a request from being answered is a DaemonUnavailable."""
        try:
            yield
        except httpx.TimeoutException:
            raise DaemonUnavailable(f"supsupd at {self.address} did not answer in {self.timeout:g} s") from None
        except httpx.TransportError as error:
            raise DaemonUnavailable(f"no supsupd answers at {self.address}: {error}") from None


class Client(_Connection):
    """A connection to a daemon, a context manager; one thread at a time.

    Every method raises DaemonUnavailable or DaemonError.
    """

    def _connect(self, transport: dict[str, Any], **settings: Any) -> None:
        self._http = httpx.Client(transport=httpx.HTTPTransport(**transport), **settings)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def carry_out(self, plan: Plan[T]) -> T:
        """What comes of a plan's calls, made one after another."""
        steps = iter(plan)
        step = next(steps)
        while True:
            try:
                step = steps.send(self._do(step))
            except StopIteration as end:
                result: T = end.value
                return result

    def _do(self, step: Call[Any] | Pause) -> Any:
        if isinstance(step, Pause):
            return time.sleep(step.seconds)
        with self._reached():
            response = self._http.request(**step.request)
        return step.read(response)


class AsyncClient(_Connection):
    """The same for asyncio: every method is awaited. An asynchronous context manager; any number of tasks at once."""

    def _connect(self, transport: dict[str, Any], **settings: Any) -> None:
        self._http = httpx.AsyncClient(transport=httpx.AsyncHTTPTransport(**transport), **settings)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        await self._http.aclose()

    async def carry_out(self, plan: Plan[T]) -> T:
        """What comes of a plan's calls, made one after another."""
        steps = iter(plan)
        step = next(steps)
        while True:
            try:
                step = steps.send(await self._do(step))
            except StopIteration as end:
                result: T = end.value
                return result

    async def _do(self, step: Call[Any] | Pause) -> Any:
        if isinstance(step, Pause):
            return await asyncio.sleep(step.seconds)
        with self._reached():
            response = await self._http.request(**step.request)
        return step.read(response)


def _trust(verify: Path | str | None, certificate: Path | str | tuple[Path | str, Path | str] | None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=verify)
    if certificate is not None:
        context.load_cert_chain(*(certificate if isinstance(certificate, tuple) else (certificate,)))
    return context
