"""What the sources on message brokers share: a bounded window of what was fetched and is not acknowledged yet."""

import importlib
import ssl
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import unquote, urlsplit

import structlog

from streams.batch import Arrival, Gap, Item, Refusal, digest_of
from streams.formats import form_of_media_type, sniff
from streams.names import printable, shortened
from streams.source import SourceUnavailable

MAX_UNACKNOWLEDGED = 64
MAX_HELD_BYTES = 32 << 20
UNKNOWN_FORM = "npz"  # what nobody recognises is kept and refused by the decoder, in the words of this format
FOREIGN = "were acknowledged and are not in the store, as after a restore: they are not delivered again"
_GUESSED_BYTES = 512 << 10  # of a message, before any was seen
_MAX_NAME = 256  # bytes
_MAX_FORM = 32
_log = structlog.get_logger("supsupd.streams")


class MissingExtra(ImportError):
    """The client library of a source is not installed; the text says which extra brings it."""


def client_library(module: str, extra: str) -> Any:
    """The module, or MissingExtra."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtra(f"{extra} needs supsupd[{extra}]: pip install 'supsupd[{extra}]'") from error


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """PEM files. Without `ca_file` the system's authorities count; the other two are this client's own certificate."""

    ca_file: Path | None = None
    cert_file: Path | None = None
    key_file: Path | None = None

    def context(self) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=self.ca_file)
        if self.cert_file is not None:
            context.load_cert_chain(self.cert_file, self.key_file)
        return context


@dataclass(frozen=True, slots=True)
class Message:
    """What a broker delivered. headers: names in small letters."""

    key: str
    position: str
    identity: str | None
    name: str
    payload: bytes
    headers: Mapping[str, str]


@dataclass(slots=True)
class Held:
    """An item that is not acknowledged; `order` is its place in the stream, `handle` what the broker wants back."""

    item: Arrival | Refusal
    order: tuple[int, ...]
    size: int
    handle: Any = None


@dataclass(frozen=True, slots=True)
class Blocked:
    """A gap, and the place in the stream behind which nothing is handed over."""

    gap: Gap
    order: tuple[int, ...]


class BrokerSource(ABC):
    """A `Source` whose subclass says how to connect, fetch and acknowledge. It opens nothing before its first pass."""

    slice_seconds: ClassVar[float] = 0.2  # for so long `_listen` may not notice a poke

    def __init__(self, name: str, cursors: Mapping[str, str], where: str, secrets: Sequence[str | None] = ()) -> None:
        self.name = name
        self.errors: tuple[type[Exception], ...] = (OSError,)  # what the client library raises
        self._where = where
        self._secrets = [secret for secret in secrets if secret]
        self._cursors = dict(cursors)
        self._held: dict[tuple[str, str], Held] = {}
        self._blocked: Blocked | None = None
        self._problem: str | None = None
        self._largest = _GUESSED_BYTES
        self._wake = threading.Event()

    # What a broker's own source adds.

    @abstractmethod
    def _open(self) -> None:
        """Connect unless connected."""

    @abstractmethod
    def _disconnect(self) -> None:
        """Drop the connection, if any; raises nothing."""

    @abstractmethod
    def _fetch(self, count: int) -> bool:
        """Hold at most `count` new messages without waiting for them, or block at a gap; False: there is no more."""

    @abstractmethod
    def _listen(self, seconds: float) -> bool:
        """Wait so long for a message; whether there is one."""

    @abstractmethod
    def _confirm(self, held: Sequence[Held]) -> None:
        """Tell the broker that these are durable, and return only when it knows."""

    @abstractmethod
    def _order(self, position: str) -> tuple[int, ...]:
        """The place in the stream that a cursor stands for."""

    @abstractmethod
    def _accepted(self, gap: Gap) -> None:
        """The operator has accepted the loss, and the cursor says so; the next `_open` starts from there."""

    def _may_pass(self, held: Held) -> bool:
        """Whether it is this one's turn."""
        return self._blocked is None or held.order <= self._blocked.order

    # The protocol.

    def iter_arrivals(self) -> Iterator[Item]:
        """One pass in the stream's order; what was redelivered late waits for the next pass."""
        with self._reaching():
            self._open()
        last: tuple[int, ...] = ()
        while True:
            for token, held in self._turns(last):
                if token in self._held:  # still
                    last = held.order
                    yield self._stamped(held.item)
            if self._blocked is None and self._room() > 0:
                with self._reaching():
                    if self._fetch(self._room()) or self._blocked is not None:
                        continue
            if (blocked := self._blocked) is not None:
                yield blocked.gap
                if self._blocked is not blocked:
                    continue
            break
        if any(held.order < last and self._may_pass(held) for held in self._held.values()):
            self._wake.set()

    def acknowledge(self, items: Sequence[Item]) -> None:
        for item in items:
            self._cursors[item.key] = item.position
            if isinstance(item, Gap):
                self._blocked = None
                self._accepted(item)
        tokens = [token for item in items if not isinstance(item, Gap) and (token := _token(item)) in self._held]
        with self._reaching():
            self._open()
            self._confirm([self._held[token] for token in tokens])
        for token in tokens:
            del self._held[token]

    def postpone(self, item: Arrival) -> None:
        """Messages do not grow."""
        raise AssertionError(f"{item.name} may not grow")

    def pending(self) -> int:
        return len(self._held)

    def problem(self) -> str | None:
        blocked = self._blocked
        return blocked.gap.reason if blocked is not None else self._problem

    def wait(self, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        while not self._wake.is_set() and (left := deadline - time.monotonic()) > 0:
            if self._problem is not None or self._blocked is not None or self._room() <= 0:
                self._wake.wait(left)
            elif self._hears(min(left, self.slice_seconds)):
                break
        self._wake.clear()

    def poke(self) -> None:
        self._wake.set()

    def close(self) -> None:
        self._disconnect()

    # Helpers.

    def _hears(self, seconds: float) -> bool:
        try:
            with self._reaching():
                self._open()
                return self._listen(seconds)
        except SourceUnavailable:
            return True  # the next pass says so

    def _turns(self, last: tuple[int, ...]) -> list[tuple[tuple[str, str], Held]]:
        turns = [entry for entry in self._held.items() if entry[1].order > last and self._may_pass(entry[1])]
        return sorted(turns, key=lambda entry: entry[1].order)

    def _stamped(self, item: Arrival | Refusal) -> Arrival | Refusal:
        """What is redelivered late must not turn the cursor back."""
        reached = self._cursors.get(item.key)
        if reached is None or self._order(item.position) >= self._order(reached):
            return item
        return replace(item, position=reached)

    def _room(self) -> int:
        """How many messages may be fetched: few where they are large."""
        free = MAX_HELD_BYTES - sum(held.size for held in self._held.values())
        by_size = max(free // self._largest, 0 if self._held else 1)
        return min(MAX_UNACKNOWLEDGED - len(self._held), by_size)

    def _hold(self, item: Arrival | Refusal, order: tuple[int, ...], handle: Any = None, size: int = 0) -> bool:
        """Whether it is new; a redelivery only brings a newer handle."""
        token = _token(item)
        known = self._held.get(token)
        if known is not None:
            known.handle = handle
            return False
        self._largest = max(self._largest, size)
        self._held[token] = Held(item, order, size, handle)
        return True

    def _block(self, gap: Gap, order: tuple[int, ...]) -> None:
        if self._blocked is None:
            self._blocked = Blocked(gap, order)

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        """Turns what the client library raises into SourceUnavailable, and drops the connection."""
        expected: tuple[type[Exception], ...] = (SourceUnavailable, *self.errors)
        try:
            yield
        except expected as error:
            self._disconnect()
            text = str(error) if isinstance(error, SourceUnavailable) else f"{self._where}: {self._reason(error)}"
            self._problem = text
            raise SourceUnavailable(text) from None
        self._problem = None

    def _reason(self, error: BaseException) -> str:
        """One printable line without secrets."""
        text = reason_of(error)
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return printable(text)


def _token(item: Arrival | Refusal) -> tuple[str, str]:
    return item.key, item.identity or item.position


def reason_of(error: BaseException) -> str:
    """What went wrong, in one line, without the client library's own names where the system has words for it."""
    inner: BaseException | None = error
    while inner is not None:
        if isinstance(inner, ConnectionRefusedError):
            return "connection refused"
        inner = inner.__cause__ or inner.__context__
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    lines = str(error).strip().splitlines()
    if isinstance(error, TimeoutError) and not lines:
        return "no answer in time"
    return lines[0] if lines else type(error).__name__


@dataclass(frozen=True, slots=True)
class Address:
    """A server's URL, taken apart so that what is printed has no secrets."""

    host: str
    port: int
    secrets: tuple[str, ...] = field(repr=False, default=())

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


def address_of(url: str, default_port: int) -> Address:
    """Raises ValueError, which does not repeat the URL."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port or default_port
    except ValueError:
        host = None
    if not host:
        raise ValueError("expected a URL with a host name")
    userinfo = [unquote(text) for text in (parts.password, None if parts.password else parts.username) if text]
    return Address(host, port, tuple(userinfo))


def item_of(source: str, message: Message, default_form: str | None, max_bytes: int) -> Arrival | Refusal:
    """An arrival as the headers describe it, or a refusal of what is too large."""
    headers = message.headers
    name = shortened(printable(headers.get("supsupd-name") or headers.get("name") or message.name), _MAX_NAME)
    if len(message.payload) > max_bytes:
        reason = f"too_large: {len(message.payload)} bytes, at most {max_bytes} expected"
        return Refusal(source, name, "too_large", reason, message.key, message.position, message.identity)
    return Arrival(
        source=source,
        name=name,
        form=form_of(message.payload, headers, default_form),
        sha256=digest_of(message.payload),
        payload=message.payload,
        key=message.key,
        position=message.position,
        identity=message.identity,
    )


def form_of(payload: bytes, headers: Mapping[str, str], default_form: str | None) -> str:
    """What the sender says, else what is configured, else what the bytes look like."""
    told = headers.get("supsupd-format") or headers.get("format")
    if told:
        return printable(told)[:_MAX_FORM]
    media_type = headers.get("content-type")
    by_type = form_of_media_type(media_type) if media_type else None
    return by_type or default_form or sniff(payload) or UNKNOWN_FORM
