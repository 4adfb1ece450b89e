"""The sources that the settings name, each with how far it was read before."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from storage.cursors import load_cursors
from storage.db import Database
from streams.broker import TlsFiles
from streams.directory import DirectorySettings, DirectorySource
from streams.names import printable
from supsupd.config import Settings
from supsupd.sections import KafkaTopic, NatsStream, RedisStream, TlsSettings

if TYPE_CHECKING:
    from streams.source import Source

STDIN = "stdin"


def make_sources(settings: Settings, database: Database) -> Iterator[Source]:
    """Nothing is opened yet. Raises MissingExtra where a source needs a library that is not installed."""
    for folder in settings.watch:
        # Named by its path, of whatever bytes: the cursors survive another order of folders.
        name = printable(str(folder))
        yield DirectorySource(folder, name=name, cursors=_cursors(database, name), settings=_directory(settings))
    for stream in settings.sources:
        yield _broker(stream, settings.intake.max_batch_bytes, _cursors(database, stream.name))
    if settings.stdin:
        from streams.stdin import StdinSource

        yield StdinSource(name=STDIN, max_batch_bytes=settings.intake.max_batch_bytes)


def _directory(settings: Settings) -> DirectorySettings:
    intake = settings.intake
    return DirectorySettings(
        settle_seconds=intake.settle_seconds,
        incomplete_seconds=intake.incomplete_seconds,
        max_batch_bytes=intake.max_batch_bytes,
        marker=intake.marker,
        watching=intake.watching,
    )


def _broker(stream: NatsStream | RedisStream | KafkaTopic, most: int, cursors: Mapping[str, str]) -> Source:
    """Client libraries are imported only where a source needs them."""
    if isinstance(stream, NatsStream):
        from streams.nats import NatsSettings, NatsSource

        nats = NatsSettings(
            stream.url,
            stream.stream,
            durable=stream.durable,
            subject=stream.subject,
            form=stream.format,
            max_batch_bytes=most,
            credentials_file=stream.credentials,
            tls=_tls(stream.tls),
        )
        return NatsSource(nats, name=stream.name, cursors=cursors)
    if isinstance(stream, RedisStream):
        from streams.redis import RedisSettings, RedisSource

        redis = RedisSettings(
            stream.url,
            stream.key,
            group=stream.group,
            consumer=stream.consumer,
            form=stream.format,
            max_batch_bytes=most,
            tls=_tls(stream.tls),
        )
        return RedisSource(redis, name=stream.name, cursors=cursors)
    from streams.kafka import KafkaSettings, KafkaSource

    kafka = KafkaSettings(
        stream.servers,
        stream.topic,
        start=stream.start,
        form=stream.format,
        max_batch_bytes=most,
        options=stream.options,
    )
    return KafkaSource(kafka, name=stream.name, cursors=cursors)


def _tls(settings: TlsSettings | None) -> TlsFiles | None:
    return None if settings is None else TlsFiles(settings.ca, settings.certificate, settings.key)


def _cursors(database: Database, name: str) -> dict[str, str]:
    with database.read() as session:
        return load_cursors(session, name)
