"""A Redis stream as a source: a consumer group that acknowledges what is durable here."""

import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import structlog

from streams.batch import Gap, Refusal
from streams.broker import FOREIGN, BrokerSource, Held, Message, TlsFiles, address_of, client_library, item_of
from streams.source import SourceUnavailable

_log = structlog.get_logger("supsupd.streams")
_START = "0-0"
_LAST_SEQUENCE = 2**64 - 1


@dataclass(frozen=True, slots=True)
class RedisSettings:
    """Where the batches are, and how to get in.

    url: redis:// or rediss://, with `/NUMBER` of the database; it may hold `user:password@`.
    stream: the key. Entries have a field `payload`, and if they like `name` and `format` or `content-type`.
    group, consumer: one daemon, one group; the group, and an empty stream, are made if they are missing.
    form: of payloads whose entries tell none; None looks at the bytes.
    claim_idle_seconds: what another consumer of the group has left lying for so long is taken over.
    """

    url: str = field(repr=False)
    stream: str
    group: str = "supsupd"
    consumer: str = "supsupd"
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    tls: TlsFiles | None = None
    form: str | None = None
    max_batch_bytes: int = 256 << 20
    claim_idle_seconds: float = 60.0
    timeout_seconds: float = 5.0


class RedisSource(BrokerSource):
    """The `Source` of one Redis stream.

    A cursor's key is the stream, its position an entry's id. What this consumer had fetched before and did not
    acknowledge comes first. Raises MissingExtra.
    """

    def __init__(self, settings: RedisSettings, *, name: str, cursors: Mapping[str, str]) -> None:
        self._redis = client_library("redis", "redis")
        address = address_of(settings.url, 6379)
        super().__init__(name, cursors, f"redis at {address}", [*address.secrets, settings.password])
        self.errors = (OSError, self._redis.exceptions.RedisError)
        self._settings = settings
        self._client: Any = None
        self._recovered: str | None = _START  # how far our own pending entries were read; None: all
        self._claimed_at: float | None = None
        self._delivered = _START  # the last entry that the group has delivered
        self._warned = False

    # Connection.

    def _open(self) -> None:
        if self._client is not None:
            return
        settings = self._settings
        files = settings.tls or TlsFiles()
        tls = {"ssl_ca_certs": files.ca_file, "ssl_certfile": files.cert_file, "ssl_keyfile": files.key_file}
        self._client = self._redis.Redis.from_url(
            settings.url,
            protocol=2,
            socket_timeout=settings.timeout_seconds,
            socket_connect_timeout=settings.timeout_seconds,
            health_check_interval=30,
            retry=self._redis.retry.Retry(self._redis.backoff.NoBackoff(), 0),
            **{"username": settings.username} if settings.username else {},
            **{"password": settings.password} if settings.password else {},
            **{name: str(path) for name, path in tls.items() if path},
        )
        self._recovered, self._claimed_at = _START, None
        self._meet()

    def _disconnect(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            with suppress(*self.errors):
                client.close()

    def _meet(self) -> None:
        """Finds the group, or makes it at the cursor; blocks where the stream is not the one that was read."""
        key, read = self._settings.stream, self._cursors.get(self._settings.stream, _START)
        stream = self._stream()
        if stream is None and read != _START:
            return self._miss(f"it is gone, after it was read up to {read}", _START)
        if stream is not None and _parts(_text(stream["last-generated-id"])) < _parts(read):
            last = _text(stream["last-generated-id"])
            return self._miss(f"it ends at {last} but was read up to {read}: it was made anew or restored", _START)
        if stream is not None and (group := self._group()) is not None:
            return self._look_for_foreign(read, _text(group["last-delivered-id"]))
        first = _first(stream)
        if read != _START and first is not None and _parts(_before(first)) > _parts(read):
            return self._miss(f"its group is gone, and entries between {read} and {first} may be lost", _before(first))
        self._client.xgroup_create(key, self._settings.group, id=read, mkstream=True)
        stream = self._stream()
        if stream and read == _START and "entries-added" in stream:
            self._go_on_from(read, stream)
        return None

    def _stream(self) -> dict[str, Any] | None:
        """XINFO STREAM; None where there is no such key."""
        try:
            info: dict[str, Any] = self._client.xinfo_stream(self._settings.stream)
        except self._redis.exceptions.ResponseError as error:
            if "no such key" in str(error):
                return None
            raise
        return info

    def _group(self) -> dict[str, Any] | None:
        groups: Iterable[dict[str, Any]] = self._client.xinfo_groups(self._settings.stream)
        return next((group for group in groups if _text(group["name"]) == self._settings.group), None)

    def _go_on_from(self, position: str, stream: Mapping[str, Any]) -> None:
        """Tells the group that all before the first entry is behind it."""
        removed = stream["entries-added"] - stream["length"]
        self._client.xgroup_setid(self._settings.stream, self._settings.group, position, entries_read=removed)

    # What is missing.

    def _miss(self, reason: str, position: str, after: str | None = None) -> None:
        gap = Gap(self.name, self._settings.stream, position, f"stream {self._settings.stream}: {reason}")
        held = max((held.order for held in self._held.values()), default=())
        self._block(gap, _parts(after) if after else held)

    def _look_for_foreign(self, read: str, delivered: str) -> None:
        """What is acknowledged beyond the cursor is in another store: that from which ours was backed up."""
        key, group = self._settings.stream, self._settings.group
        if read == _START or not (entries := self._client.xrange(key, f"({read}", delivered, count=1)):
            return
        entry = _text(entries[0][0])
        if not self._client.xpending_range(key, group, entry, entry, count=1):
            self._miss(f"entries {entry} to {delivered} {FOREIGN}", delivered)

    def _look_for_loss(self) -> None:
        """Entries that were trimmed before the group has read them are counted by the broker, from Redis 7 on."""
        group = self._group()
        if group is None:
            raise SourceUnavailable(f"{self._where}: group {self._settings.group} is gone")
        self._delivered = _text(group["last-delivered-id"])
        length = self._client.xlen(self._settings.stream)
        lost = group["lag"] - length if group.get("lag") is not None else None
        if lost is not None and lost <= 0:
            return
        stream = self._stream() or {}
        first = _first(stream)
        following = _before(first) if first else _text(stream.get("last-generated-id", _START))
        if first is not None and _parts(first) <= _parts(self._delivered):
            return
        if "entries-added" not in stream:
            self._warn_of_trimming()
            return
        if lost is None and group.get("entries-read") is not None:
            lost = stream["entries-added"] - stream["length"] - group["entries-read"]
        if lost == 0 or following == self._delivered:
            return
        if _parts(self._cursors.get(self._settings.stream, _START)) >= _parts(following):
            self._go_on_from(following, stream)  # the loss was accepted
            return
        counted = "entries may be" if lost is None else f"{lost} entries are"
        self._miss(
            f"{counted} lost: trimmed before they were read, after {self._delivered}", following, self._delivered
        )

    def _warn_of_trimming(self) -> None:
        if not self._warned:
            self._warned = True
            _log.warning("trimming_cannot_be_seen", source=self.name, reason="Redis counts entries from version 7 on")

    def _accepted(self, gap: Gap) -> None:
        self._disconnect()

    # Messages.

    def _fetch(self, count: int) -> bool:
        if self._recovered is not None:
            return self._recover(count)
        if self._claimed_at is None or time.monotonic() - self._claimed_at > self._settings.claim_idle_seconds:
            return self._claim() or self._fetch(count)
        self._look_for_loss()
        if self._blocked is not None:
            return False
        return self._take(self._read(">", count))

    def _read(self, after: str, count: int) -> list[tuple[bytes, Any]]:
        settings = self._settings
        reply = self._client.xreadgroup(settings.group, settings.consumer, {settings.stream: after}, count=count)
        if isinstance(reply, dict):
            reply = list(reply.items())
        return list(reply[0][1]) if reply else []

    def _recover(self, count: int) -> bool:
        """The next of our own entries that are not acknowledged; True while there may be more."""
        assert self._recovered is not None
        entries = self._read(self._recovered, count)
        self._recovered = _text(entries[-1][0]) if entries else None
        self._take(entries)
        return True

    def _claim(self) -> bool:
        """Takes over what another consumer of the group has left lying; whether there was some."""
        settings = self._settings
        self._claimed_at = time.monotonic()
        start, found = _START, False
        while True:
            idle = int(1000 * settings.claim_idle_seconds)
            start, entries, *rest = self._client.xautoclaim(
                settings.stream, settings.group, settings.consumer, idle, start, count=max(self._room(), 1)
            )
            found |= self._take([*entries, *((gone, None) for gone in (rest[0] if rest else ()))])
            start = _text(start)
            if start == _START or self._room() <= 0:
                return found

    def _take(self, entries: Iterable[tuple[bytes | None, Any]]) -> bool:
        """Whether one of them is new."""
        found = False
        for raw, fields in entries:
            if raw is None:  # claimed, and gone
                continue
            if fields:
                found |= self._take_entry(_text(raw), fields)
            else:
                self._take_gone(_text(raw))
        return found

    def _take_entry(self, entry: str, fields: Mapping[bytes, bytes]) -> bool:
        settings, key = self._settings, self._settings.stream
        headers = {_text(name).lower(): _text(text) for name, text in fields.items() if name != b"payload"}
        payload = fields.get(b"payload")
        told = Message(key, entry, None, f"{key}/{entry}", payload or b"", headers)
        item = item_of(self.name, told, settings.form, settings.max_batch_bytes)
        # The content is a part, since a stream that was made anew may give the same ids to other entries.
        identity = f"{key}:{entry}:{getattr(item, 'sha256', 'large')[:16]}"
        if payload is None:
            reason = "bad_format: no field payload"
            item = Refusal(self.name, item.name, "bad_format", reason, key, entry)
        return self._hold(replace(item, identity=identity), _parts(entry), entry, len(told.payload))

    def _take_gone(self, entry: str) -> None:
        """An entry that was delivered and has no body any more."""
        if _parts(entry) <= _parts(self._cursors.get(self._settings.stream, _START)):
            self._client.xack(self._settings.stream, self._settings.group, entry)  # we had read it
            return
        self._miss(f"entry {entry} was delivered, and deleted or trimmed before it was read", entry, entry)

    def _listen(self, seconds: float) -> bool:
        """Looks without taking: what is lost in between must be seen first."""
        after = {self._settings.stream: self._delivered}
        return bool(self._client.xread(after, count=1, block=max(int(1000 * seconds), 1)))

    def _confirm(self, held: Sequence[Held]) -> None:
        if held:
            self._client.xack(self._settings.stream, self._settings.group, *(one.handle for one in held))

    def _order(self, position: str) -> tuple[int, ...]:
        return _parts(position)


def _text(raw: bytes | str) -> str:
    return raw.decode("utf-8", "surrogateescape") if isinstance(raw, bytes) else raw


def _parts(entry: str) -> tuple[int, int]:
    """An entry's id as numbers: milliseconds, and a sequence number."""
    milliseconds, _, sequence = entry.partition("-")
    return int(milliseconds), int(sequence or 0)


def _first(stream: Mapping[str, Any] | None) -> str | None:
    first = stream.get("first-entry") if stream else None
    return _text(first[0]) if first and first[0] is not None else None


def _before(entry: str) -> str:
    """The id right before an entry's."""
    milliseconds, sequence = _parts(entry)
    return f"{milliseconds}-{sequence - 1}" if sequence else f"{milliseconds - 1}-{_LAST_SEQUENCE}"
