"""What is agreed with a JetStream server: the stream, and the durable consumer by which it is read."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from streams.broker import MAX_UNACKNOWLEDGED, TlsFiles
from streams.source import SourceUnavailable


@dataclass(frozen=True, slots=True)
class NatsSettings:
    """Where the batches are, and how to get in.

    url: nats:// or tls://; it may hold `user:password@` or `token@`.
    stream, durable: the stream must exist; the consumer is made if it does not.
    subject: only these, where the stream holds others too.
    credentials_file: a .creds file.
    form: of payloads whose headers tell none; None looks at the bytes.
    ack_wait_seconds: the broker repeats what is not acknowledged for so long; of a consumer that is made here.
    """

    url: str = field(repr=False)
    stream: str
    durable: str = "supsupd"
    subject: str | None = None
    form: str | None = None
    max_batch_bytes: int = 256 << 20
    credentials_file: Path | None = None
    tls: TlsFiles | None = None
    ack_wait_seconds: float = 10.0
    timeout_seconds: float = 5.0


async def stream_of(streams: Any, settings: NatsSettings, where: str) -> Any:
    """The stream's state; `streams` is a JetStream context. Raises SourceUnavailable where there is no such stream."""
    from nats.js.errors import NotFoundError

    try:
        return await streams.stream_info(settings.stream)
    except NotFoundError:
        raise SourceUnavailable(f"{where}: there is no stream {settings.stream}") from None


async def consumer_of(streams: Any, settings: NatsSettings, where: str, stream: Any, read: int) -> Any:
    """The durable consumer's state.

    It is made where it is missing, behind sequence number `read`, and never changed. Raises SourceUnavailable where it
    would lose messages.
    """
    from nats.js.api import AckPolicy
    from nats.js.errors import NotFoundError

    try:
        found = await streams.consumer_info(settings.stream, settings.durable)
    except NotFoundError:
        found = await streams.add_consumer(settings.stream, _new_consumer(settings, stream, read))
    config = found.config
    said = f"{where}: consumer {settings.durable} of stream {settings.stream}"
    if config.deliver_subject:
        raise SourceUnavailable(f"{said} is a push consumer, expected a pull consumer")
    if config.ack_policy != AckPolicy.EXPLICIT:
        raise SourceUnavailable(f"{said} has the ack policy {config.ack_policy}, expected explicit")
    if (config.max_deliver or -1) > 0:
        raise SourceUnavailable(f"{said} gives up after {config.max_deliver} deliveries, expected max_deliver -1")
    if (config.filter_subject or None) != settings.subject:
        given, expected = config.filter_subject or "all subjects", settings.subject or "all subjects"
        raise SourceUnavailable(f"{said} is for {given}, expected {expected}")
    return found


async def first_after(streams: Any, settings: NatsSettings, sequence: int) -> int | None:
    """The number of the first message behind this one that is for us; None: there is none."""
    from nats.js.errors import NotFoundError

    try:
        found = await streams.get_msg(settings.stream, sequence + 1, settings.subject or ">", next=True)
    except NotFoundError:
        return None
    return int(found.seq)


def losing_limits(stream: Any) -> list[str]:
    """The limits by which the stream may throw away what nobody has read yet."""
    from nats.js.api import DiscardPolicy

    limits = ("max_msgs", "max_bytes", "max_msgs_per_subject", "max_age")
    held = [name for name in limits if (getattr(stream.config, name) or 0) > 0]
    return [name for name in held if name == "max_age" or stream.config.discard != DiscardPolicy.NEW]


def _new_consumer(settings: NatsSettings, stream: Any, read: int) -> Any:
    from nats.js.api import AckPolicy, ConsumerConfig, DeliverPolicy, RetentionPolicy

    # A stream that keeps only what is not acknowledged is read whole: some acknowledgements may have been lost.
    whole = read == 0 or stream.config.retention != RetentionPolicy.LIMITS
    return ConsumerConfig(
        durable_name=settings.durable,
        deliver_policy=DeliverPolicy.ALL if whole else DeliverPolicy.BY_START_SEQUENCE,
        opt_start_seq=None if whole else read + 1,
        ack_policy=AckPolicy.EXPLICIT,
        ack_wait=settings.ack_wait_seconds,
        max_ack_pending=MAX_UNACKNOWLEDGED,
        max_deliver=-1,
        filter_subject=settings.subject,
    )
