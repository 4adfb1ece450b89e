"""A stream of NATS JetStream as a source: a durable pull consumer that acknowledges what is durable here."""

import asyncio
import json
import queue
import time
from collections.abc import Coroutine, Mapping, Sequence
from contextlib import suppress
from typing import Any

import structlog

from streams.batch import Gap
from streams.broker import FOREIGN, BrokerSource, Held, Message, address_of, client_library, item_of
from streams.loops import LoopThread
from streams.nats_consumer import NatsSettings, consumer_of, first_after, losing_limits, stream_of
from streams.source import SourceUnavailable

__all__ = ["NatsSettings", "NatsSource"]

_LOST = "the connection was lost"
MAX_ROUNDS = 5
"""So often the broker's own time for repeating is waited for before newer messages pass what never came."""
_log = structlog.get_logger("supsupd.streams")


class NatsSource(BrokerSource):
    """The `Source` of one JetStream stream.

    A cursor's key is the stream with the time of its making, its position the sequence number: so a stream that was
    deleted and made anew is seen. What an earlier process fetched and did not acknowledge is waited for, so that the
    order holds through a kill. Raises MissingExtra.
    """

    slice_seconds = 3600.0  # a poke wakes `_listen` itself

    def __init__(self, settings: NatsSettings, *, name: str, cursors: Mapping[str, str]) -> None:
        self._nats = client_library("nats", "nats")
        address = address_of(settings.url, 4222)
        super().__init__(name, cursors, f"nats at {address}", address.secrets)
        self.errors = (OSError, TimeoutError, self._nats.errors.Error)
        self._settings = settings
        self._loop: LoopThread | None = None
        self._client: Any = None
        self._streams: Any = None  # the JetStream context
        self._key = ""
        self._inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._lost = asyncio.Event()
        self._connecting = False
        self._reply = ""
        self._asked = ""
        self._requests = 0
        self._asked_until = 0.0
        self._idle = False
        self._delivered = 0  # where the consumer was when we connected
        self._missing = 0  # of what was delivered before that and is not here yet
        self._missing_until = 0.0
        self._patience = 0.0
        self._rounds = 0  # so often we wait for them
        self._deliveries = 0  # the number of the last one that came
        self._horizon = 0  # all up to here was read, or is gone because nobody wanted it
        self._warned = False

    def pending(self) -> int:
        return len(self._held) + self._outstanding()

    def wait(self, timeout: float) -> None:
        if self._outstanding():
            timeout = min(timeout, max(self._missing_until - time.monotonic(), 0.01))
        super().wait(timeout)

    def close(self) -> None:
        """Hands back what was not acknowledged, so that the next connection need not wait for it."""
        if self._client is not None and self._client.is_connected and self._held:
            with suppress(*self.errors):
                self._run(self._hand_back(sorted(self._held.values(), key=lambda held: held.order)))
        self._disconnect()
        if self._loop is not None:
            self._loop.stop()
            self._loop = None

    # Connection.

    def _open(self) -> None:
        if self._client is not None and self._client.is_connected:
            self._look_for_missing()
            return
        self._disconnect()
        if self._loop is None:
            self._loop = LoopThread(f"nats {self.name}")
        self._loop.run(self._connect(), 3 * self._settings.timeout_seconds)

    def _disconnect(self) -> None:
        client, self._client = self._client, None
        if client is not None and self._loop is not None:
            with suppress(*self.errors):
                self._loop.run(client.close(), self._settings.timeout_seconds)

    async def _connect(self) -> None:
        settings = self._settings
        self._client = client = self._nats.NATS()
        self._connecting = True
        await client.connect(
            servers=[settings.url],
            name=f"supsupd {self.name}",
            allow_reconnect=False,
            connect_timeout=settings.timeout_seconds,
            error_cb=self._fail_while_connecting,
            disconnected_cb=self._cut_off,
            tls=settings.tls.context() if settings.tls else None,
            user_credentials=str(settings.credentials_file) if settings.credentials_file else None,
        )
        self._connecting = False
        self._inbox, self._lost = queue.SimpleQueue(), asyncio.Event()
        self._streams = client.jetstream(timeout=settings.timeout_seconds)
        stream = await stream_of(self._streams, self._settings, self._where)
        self._warn_of_limits(stream)
        self._meet(stream)
        if self._blocked is not None:
            return
        consumer = await consumer_of(self._streams, self._settings, self._where, stream, self._read())
        self._recall(stream, consumer)
        await self._look_for_foreign(stream, consumer)
        self._asked_until = 0.0
        self._reply = client.new_inbox()
        await client.subscribe(f"{self._reply}.*", cb=self._received)

    def _warn_of_limits(self, stream: Any) -> None:
        limits = losing_limits(stream)
        if limits and not self._warned:
            self._warned = True
            _log.warning("stream_may_discard", source=self.name, stream=self._settings.stream, limits=limits)

    # What is missing.

    def _meet(self, stream: Any) -> None:
        """Which stream this is, and how far it was read."""
        state, before = stream.state, max(stream.state.first_seq - 1, 0)
        key = f"{self._settings.stream}@{stream.created.isoformat() if stream.created else 'unknown'}"
        known = [*self._cursors, *filter(None, [self._key])]
        if key != self._key:
            self._key, self._horizon = key, int(self._cursors.get(key, before))
        if key not in known and any(other.startswith(f"{self._settings.stream}@") for other in known):
            self._miss("it was deleted and made anew: what was not read before is lost", before)
        elif state.last_seq < self._horizon:
            reason = (
                f"it ends at {state.last_seq} but was read up to {self._horizon}: it was restored from an older copy"
            )
            self._miss(reason, state.last_seq)

    def _recall(self, stream: Any, consumer: Any) -> None:
        """What the consumer has delivered before us, and nobody acknowledged."""
        self._delivered = consumer.delivered.stream_seq
        unknown = consumer.num_ack_pending - len(self._held)
        self._deliveries = consumer.delivered.consumer_seq
        self._patience = 1.1 * (consumer.config.ack_wait or 30.0) + 0.1
        self._rounds = MAX_ROUNDS
        self._expect(unknown if self._delivered > self._read() else 0)
        if self._settings.subject is not None and self._delivered >= stream.state.first_seq:
            # The consumer has passed these, so that what is missing behind it was of other subjects.
            self._horizon = max(self._horizon, stream.state.first_seq - 1)

    def _outstanding(self) -> int:
        return max(self._missing, 0)

    def _look_for_missing(self) -> None:
        """What should have come again may have gone to the lost connection once more: the broker knows."""
        if not self._outstanding() or time.monotonic() < self._missing_until:
            return
        consumer = self._run(self._streams.consumer_info(self._settings.stream, self._settings.durable))
        self._rounds -= 1
        self._expect(consumer.num_ack_pending - len(self._held) if self._rounds > 0 else 0)

    def _expect(self, count: int) -> None:
        """So many may come again, within the broker's own time."""
        self._missing = count
        self._missing_until = time.monotonic() + self._patience

    def _may_pass(self, held: Held) -> bool:
        """While something may come again, only what follows on what was read without a hole."""
        return super()._may_pass(held) and (not self._outstanding() or self._follows(held.order[0]))

    def _follows(self, sequence: int) -> bool:
        read = self._read()
        between = sum(read < held.order[0] < sequence for held in self._held.values())
        return between >= sequence - read - 1

    def _read(self) -> int:
        """Up to which sequence number all is durable; what was only fetched may be behind a hole."""
        return int(self._cursors.get(self._key, 0))

    def _count_delivery(self, sequence: int, delivery: int) -> None:
        """The broker numbers its deliveries: those that are skipped went to a connection that was lost."""
        skipped, self._deliveries = delivery - self._deliveries - 1, max(delivery, self._deliveries)
        if sequence <= self._delivered:
            self._missing -= 1
        if skipped > 0:
            self._rounds = MAX_ROUNDS
            self._delivered = max(self._delivered, sequence - 1)
            self._expect(self._outstanding() + skipped)

    def _miss(self, reason: str, position: int) -> None:
        gap = Gap(self.name, self._key, str(position), f"stream {self._settings.stream}: {reason}")
        self._block(gap, (self._horizon,))

    def _look_for_loss(self, state: Any) -> None:
        first, read = state.first_seq, self._horizon
        if first > read + 1:
            doubt = "may be lost" if self._settings.subject is not None else "are lost"
            self._miss(f"messages {read + 1} to {first - 1} {doubt}: the broker removed them unread", first - 1)

    async def _look_for_foreign(self, stream: Any, consumer: Any) -> None:
        """What is acknowledged beyond the cursor is in another store: that from which ours was backed up."""
        read, floor = max(self._read(), stream.state.first_seq - 1), consumer.ack_floor.stream_seq
        if self._key not in self._cursors or floor <= read:
            return
        first = await first_after(self._streams, self._settings, read)
        if first is not None and first <= floor:  # else the broker has only passed what is not for us
            self._miss(f"messages {first} to {floor} {FOREIGN}", floor)

    def _accepted(self, gap: Gap) -> None:
        self._horizon = int(gap.position)
        self._disconnect()

    # Messages.

    def _fetch(self, count: int) -> bool:
        stream = self._run(stream_of(self._streams, self._settings, self._where))
        state = stream.state
        self._meet(stream)
        self._look_for_loss(state)
        if self._blocked is not None:
            return False
        fetched, caught_up = self._pull(count)
        fresh = [sequence for sequence in fetched if sequence > self._horizon]
        if fresh and min(fresh) > self._horizon + 1 and self._settings.subject is None:
            self._look_for_loss(self._run(stream_of(self._streams, self._settings, self._where)).state)
        self._horizon = max([self._horizon, *fresh])
        if caught_up and not self._outstanding():
            self._horizon = max(self._horizon, state.last_seq)
        return bool(fetched)

    def _pull(self, count: int) -> tuple[list[int], bool]:
        """The sequence numbers of what came, and whether the broker says that there is no more."""
        fetched = []
        while not self._inbox.empty():
            if (message := self._next_message()).reply:  # and not the end of an older request
                fetched += self._take(message)
        count -= len(fetched)
        if count <= 0:
            return fetched, False
        reply = self._ask({"batch": count, "no_wait": True})
        for _ in range(count):
            try:
                message = self._next_message(1.0)
            except queue.Empty:
                self._run(self._client.flush(self._settings.timeout_seconds))  # is it still there?
                break
            if not message.reply:
                if message.subject != reply:
                    continue
                return fetched, self._is_caught_up(message.headers)
            fetched += self._take(message)
            if message.metadata.num_pending == 0:
                break
        return fetched, False

    def _next_message(self, seconds: float = 0.0) -> Any:
        message = self._inbox.get(timeout=seconds)
        if message is None:
            raise ConnectionResetError(_LOST)
        return message

    def _is_caught_up(self, headers: Mapping[str, str]) -> bool:
        status, text = headers.get("Status"), headers.get("Description", "")
        if status == "503" or "Deleted" in text:
            raise SourceUnavailable(f"{self._where}: consumer {self._settings.durable} is gone")
        return status == "404"

    def _take(self, message: Any) -> list[int]:
        self._asked_until = 0.0  # this may have been what was asked for
        metadata = message.metadata
        sequence = metadata.sequence.stream
        headers = {name.lower(): text for name, text in (message.headers or {}).items()}
        position = str(sequence)
        identity = f"{self._key}:{position}@{metadata.timestamp.isoformat()}"
        told = Message(self._key, position, identity, f"{metadata.stream}/{sequence}", message.data, headers)
        item = item_of(self.name, told, self._settings.form, self._settings.max_batch_bytes)
        if not self._hold(item, (sequence,), message.reply, len(message.data)):
            self._deliveries = max(self._deliveries, metadata.sequence.consumer)
            return []
        self._count_delivery(sequence, metadata.sequence.consumer)
        return [sequence]

    def _listen(self, seconds: float) -> bool:
        self._idle = True
        try:
            if self._inbox.empty():
                if time.monotonic() > self._asked_until:
                    self._asked_until = time.monotonic() + seconds
                    self._ask({"batch": 1, "expires": int(seconds * 1e9)})
                self._wake.wait(seconds)
        finally:
            self._idle = False
        return not self._inbox.empty()

    def _confirm(self, held: Sequence[Held]) -> None:
        if held:
            self._run(self._acknowledge_twice([one.handle for one in held]))

    async def _acknowledge_twice(self, replies: Sequence[str]) -> None:
        """Every acknowledgement is itself acknowledged."""
        timeout = self._settings.timeout_seconds
        await asyncio.gather(*(self._client.request(reply, b"+ACK", timeout=timeout) for reply in replies))

    async def _hand_back(self, held: Sequence[Held]) -> None:
        for one in held:
            await self._client.publish(one.handle, b"-NAK")
        await self._client.flush(self._settings.timeout_seconds)

    def _order(self, position: str) -> tuple[int, ...]:
        return (int(position),)

    # The loop's thread.

    def _run(self, work: Coroutine[Any, Any, Any]) -> Any:
        assert self._loop is not None
        return self._loop.run(self._unless_lost(work), 2 * self._settings.timeout_seconds)

    async def _unless_lost(self, work: Coroutine[Any, Any, Any]) -> Any:
        """The client itself would wait for an answer that cannot come any more."""
        task, lost = asyncio.ensure_future(work), asyncio.ensure_future(self._lost.wait())
        await asyncio.wait({task, lost}, return_when=asyncio.FIRST_COMPLETED)
        lost.cancel()
        if not task.done():
            task.cancel()
            raise ConnectionResetError(_LOST)
        return await task

    def _ask(self, request: Mapping[str, Any]) -> str:
        """Sends a pull request; the subject of what the broker says about it."""
        self._requests += 1
        self._asked = reply = f"{self._reply}.{self._requests}"
        subject = f"$JS.API.CONSUMER.MSG.NEXT.{self._settings.stream}.{self._settings.durable}"
        self._run(self._client.publish(subject, json.dumps(request).encode(), reply=reply))
        return reply

    async def _cut_off(self) -> None:
        self._lost.set()
        self._inbox.put(None)
        await self._woken()

    async def _received(self, message: Any) -> None:
        if message.reply or message.subject == self._asked:
            self._inbox.put(message)
            await self._woken()

    async def _woken(self) -> None:
        if self._idle:
            self._wake.set()

    async def _fail_while_connecting(self, error: Exception) -> None:
        """The client would try again and again; later on, the calls themselves raise what matters."""
        if self._connecting:
            raise error
