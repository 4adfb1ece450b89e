"""A Kafka topic as a source: our own cursors say where to read on, the broker keeps none."""

import logging
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from streams.batch import Gap
from streams.broker import MAX_UNACKNOWLEDGED, BrokerSource, Held, Message, TlsFiles, client_library, item_of
from streams.source import SourceUnavailable

_QUIET_SECONDS = 0.5  # without a message or the word that there is none: the pass ends, the next one looks again
_QUEUED_KBYTES = 32 << 10
_SILENT = logging.getLogger("supsupd.kafka")  # the client's own: it repeats itself many times a second
_SILENT.propagate = False
_SILENT.addHandler(logging.NullHandler())


@dataclass(frozen=True, slots=True)
class KafkaSettings:
    """Where the batches are, and how to get in.

    servers: `host:port`, more of them with commas.
    start: where to begin in a partition that has no cursor yet; one that is added later is read from its beginning.
    form: of payloads whose headers tell none; None looks at the bytes.
    username, password, mechanism: SASL.
    partitions_seconds: so often new partitions are looked for.
    options: further properties of librdkafka.
    """

    servers: str
    topic: str
    start: Literal["earliest", "latest"] = "earliest"
    form: str | None = None
    max_batch_bytes: int = 256 << 20
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    mechanism: str = "SCRAM-SHA-512"
    tls: TlsFiles | None = None
    timeout_seconds: float = 5.0
    partitions_seconds: float = 60.0
    options: Mapping[str, str] = field(default_factory=dict, repr=False)


class KafkaSource(BrokerSource):
    """The `Source` of all partitions of one topic, without a consumer group's membership.

    A cursor's key is "topic/partition", its position the next offset to read. Order holds within a partition. Raises
    MissingExtra.
    """

    def __init__(self, settings: KafkaSettings, *, name: str, cursors: Mapping[str, str]) -> None:
        self._kafka = client_library("confluent_kafka", "kafka")
        super().__init__(name, cursors, f"kafka at {settings.servers}", _secrets(settings))
        self.errors = (OSError, self._kafka.KafkaException)
        self._settings = settings
        self._consumer: Any = None
        self._next: dict[int, int] = {}  # the next offset to take, by partition
        self._at_end: set[int] = set()
        self._heard: deque[Any] = deque()  # what a wait has already taken from the client
        self._failure: Any = None
        self._taken = 0
        self._looked_at = 0.0

    # Connection.

    def _open(self) -> None:
        if self._consumer is not None:
            return
        self._failure = None
        self._heard.clear()
        self._at_end.clear()
        self._consumer = self._kafka.Consumer(self._properties(), logger=_SILENT)
        first = not self._next
        for partition in self._partitions():
            self._begin(partition, self._settings.start if first else "earliest")
        if self._blocked is None:
            self._assign()

    def _disconnect(self) -> None:
        consumer, self._consumer = self._consumer, None
        if consumer is not None:
            consumer.close()

    def _properties(self) -> dict[str, Any]:
        settings, tls = self._settings, self._settings.tls
        properties: dict[str, Any] = {
            "bootstrap.servers": settings.servers,
            "client.id": "supsupd",
            "group.id": f"supsupd-{self.name}",  # demanded by the client; nothing is committed under it
            "enable.auto.commit": False,
            "enable.auto.offset.store": False,
            "auto.offset.reset": "error",
            "isolation.level": "read_committed",
            "enable.partition.eof": True,
            "queued.min.messages": MAX_UNACKNOWLEDGED,
            "queued.max.messages.kbytes": _QUEUED_KBYTES,
            "socket.timeout.ms": max(int(1000 * settings.timeout_seconds), 1000),
            "reconnect.backoff.ms": 500,
            "fetch.wait.max.ms": 100,  # so soon the broker says that a partition has no more
            "fetch.queue.backoff.ms": 10,  # how long a full queue is left alone: the client would wait a second
            "error_cb": self._failed,
        }
        if settings.username is not None:
            properties |= {"sasl.mechanism": settings.mechanism, "sasl.username": settings.username}
            properties["sasl.password"] = settings.password or ""
        protocol = ("SASL_" if settings.username is not None else "") + ("SSL" if tls else "PLAINTEXT")
        properties["security.protocol"] = protocol.lower()
        if tls is not None:
            files = {"ca": tls.ca_file, "certificate": tls.cert_file, "key": tls.key_file}
            properties |= {f"ssl.{name}.location": str(path) for name, path in files.items() if path}
        return properties | dict(settings.options)

    def _failed(self, error: Any) -> None:
        """The client's own thread of errors; it would go on trying in silence."""
        codes = self._kafka.KafkaError
        if error.fatal() or error.code() in (codes._ALL_BROKERS_DOWN, codes._AUTHENTICATION, codes._SSL):
            self._failure = error

    def _partitions(self) -> list[int]:
        self._looked_at = time.monotonic()
        topics = self._consumer.list_topics(timeout=self._settings.timeout_seconds).topics
        topic = topics.get(self._settings.topic)
        if topic is None or topic.error is not None:
            raise SourceUnavailable(f"{self._where}: there is no topic {self._settings.topic}")
        return sorted(topic.partitions)

    def _begin(self, partition: int, start: str) -> None:
        """Finds where to read on, or blocks where that is no more."""
        key = self._key(partition)
        low, high = self._consumer.get_watermark_offsets(
            self._kafka.TopicPartition(self._settings.topic, partition), timeout=self._settings.timeout_seconds
        )
        if partition not in self._next:
            begin = low if start == "earliest" else high
            self._next[partition] = int(self._cursors.get(key, begin))
        following = self._next[partition]
        if following < low:
            self._miss(partition, f"offsets {following} to {low - 1} are lost: removed before they were read", low)
        elif following > high:
            self._miss(partition, f"it ends at {high} but was read up to {following}: it was made anew", low)

    def _assign(self) -> None:
        places = [self._kafka.TopicPartition(self._settings.topic, *place) for place in sorted(self._next.items())]
        self._consumer.assign(places)

    def _miss(self, partition: int, reason: str, position: int) -> None:
        key = self._key(partition)
        self._block(Gap(self.name, key, str(position), f"partition {key}: {reason}"), (self._taken,))

    def _accepted(self, gap: Gap) -> None:
        self._next[int(gap.key.rpartition("/")[2])] = int(gap.position)
        self._disconnect()

    def _key(self, partition: int) -> str:
        return f"{self._settings.topic}/{partition}"

    # Messages.

    def _fetch(self, count: int) -> bool:
        if time.monotonic() - self._looked_at > self._settings.partitions_seconds:
            self._look_for_partitions()
        before, quiet_since = self._taken, time.monotonic()
        while self._taken - before < count and self._blocked is None:
            message = self._heard.popleft() if self._heard else self._poll(0.02)
            if message is not None:
                self._take(message)
                quiet_since = time.monotonic()
            elif len(self._at_end) == len(self._next) or time.monotonic() - quiet_since > _QUIET_SECONDS:
                break
        return self._taken > before

    def _look_for_partitions(self) -> None:
        known = set(self._next)
        new = [partition for partition in self._partitions() if partition not in known]
        for partition in new:
            self._begin(partition, "earliest")
        if new:
            places = [self._kafka.TopicPartition(self._settings.topic, one, self._next[one]) for one in new]
            self._consumer.incremental_assign(places)

    def _poll(self, seconds: float) -> Any:
        message = self._consumer.poll(seconds)
        if self._failure is not None:
            raise self._kafka.KafkaException(self._failure)
        return message

    def _take(self, message: Any) -> None:
        partition, codes = message.partition(), self._kafka.KafkaError
        error = message.error()
        if error is None:
            self._at_end.discard(partition)
            self._take_payload(message)
        elif error.code() == codes._PARTITION_EOF:
            self._at_end.add(partition)
        elif error.code() in (codes._AUTO_OFFSET_RESET, codes.OFFSET_OUT_OF_RANGE):
            self._begin(partition, "earliest")
            if self._blocked is None:
                raise self._kafka.KafkaException(error)
        elif not error.retriable():
            raise self._kafka.KafkaException(error)

    def _take_payload(self, message: Any) -> None:
        partition, offset, payload = message.partition(), message.offset(), message.value() or b""
        if offset < self._next[partition]:
            return
        found = message.headers() or ()
        headers = {name.lower(): (text or b"").decode("utf-8", "surrogateescape") for name, text in found}
        key = self._key(partition)
        told = Message(key, str(offset + 1), None, f"{key}/{offset}", payload, headers)
        self._taken += 1
        self._next[partition] = offset + 1
        item = item_of(self.name, told, self._settings.form, self._settings.max_batch_bytes)
        self._hold(item, (self._taken,), None, len(payload))

    def _listen(self, seconds: float) -> bool:
        message = self._poll(seconds)
        if message is None:
            return False
        self._heard.append(message)
        return message.error() is None

    def _confirm(self, held: Sequence[Held]) -> None:
        """The cursors that were stored with the batches are the acknowledgement."""

    def _reason(self, error: BaseException) -> str:
        told = error.args[0] if error.args and isinstance(error, self._kafka.KafkaException) else None
        return super()._reason(OSError(told.str()) if told is not None else error)

    def _order(self, position: str) -> tuple[int, ...]:
        return (int(position),)


def _secrets(settings: KafkaSettings) -> list[str | None]:
    return [settings.password, *(text for name, text in settings.options.items() if "password" in name)]
