"""The laws of every source. A new one earns its place by joining KINDS.

A kind says in `can` what its laws may ask of it; EXPECTED repeats it, so that a law cannot be left out unnoticed:
restart: what was not acknowledged comes again to another source; acks: the broker waits for acknowledgements, which can
be lost; away: it can be cut off; gap: it can lose messages, and it can be seen; bound: it holds a bounded number.
"""

import hashlib
import os
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
from brokers import KafkaBench, NatsBench, RedisBench, tansu_path

from streams.batch import Arrival, Batch, Gap, digest_of
from streams.broker import MAX_UNACKNOWLEDGED
from streams.directory import DirectorySettings, DirectorySource
from streams.formats import encode
from streams.source import Source, SourceUnavailable
from streams.stdin import MAGIC, StdinSource

GOOD = [encode(Batch(np.full((2, 3), number, np.float32), np.arange(2))) for number in range(4)]


class ListSource:
    """The plainest source there can be: the laws say no more than this."""

    def __init__(self, contents, cursors):
        self.name = "list"
        self._contents = contents
        self._read = self._seen = int(cursors.get("list", "0"))
        self._wake = threading.Event()

    def iter_arrivals(self):
        number = self._read
        while (number := max(number, self._read)) < len(self._contents):
            payload = self._contents[number]
            number += 1
            self._seen = max(number, self._seen)
            yield Arrival(self.name, f"list/{number}", "npz", digest_of(payload), payload, "list", str(number))

    def acknowledge(self, items):
        for item in items:
            self._read = int(item.position)

    def postpone(self, item):
        raise AssertionError("nothing here grows")

    def pending(self):
        return self._seen - self._read

    def problem(self):
        return None

    def wait(self, timeout):
        self._wake.wait(timeout)
        self._wake.clear()

    def poke(self):
        self._wake.set()

    def close(self):
        pass


class ListKind:
    can = frozenset({"restart"})

    def __init__(self, tmp_path):
        self._contents = []

    def publish(self, payload):
        self._contents.append(payload)

    def source(self, cursors):
        return ListSource(self._contents, cursors)

    def cleanup(self):
        pass


class DirectoryKind:
    can = frozenset({"restart"})

    def __init__(self, tmp_path):
        self._folder = tmp_path
        self._count = 0

    def publish(self, payload):
        self._count += 1
        path = self._folder / f"b{self._count}.npz"
        path.write_bytes(payload)
        os.utime(path, ns=(0, self._count))

    def source(self, cursors):
        settings = DirectorySettings(settle_seconds=0, incomplete_seconds=0)
        return DirectorySource(self._folder, name="directory", cursors=cursors, settings=settings)

    def cleanup(self):
        pass


class StdinKind:
    can = frozenset({"bound"})

    def __init__(self, tmp_path):
        self._read, self._write = os.pipe()
        os.write(self._write, MAGIC)

    def publish(self, payload):
        os.write(self._write, len(payload).to_bytes(4, "big") + payload)

    def source(self, cursors):
        return StdinSource(fd=self._read)

    def cleanup(self):
        os.close(self._read)
        os.close(self._write)


class NatsKind(NatsBench):
    can = frozenset({"restart", "acks", "away", "gap", "bound"})

    def __init__(self, tmp_path):
        super().__init__()


class RedisKind(RedisBench):
    can = frozenset({"restart", "acks", "away", "gap", "bound"})

    def __init__(self, tmp_path):
        super().__init__()


class KafkaKind(KafkaBench):
    can = frozenset({"restart", "bound"} | ({"away"} if tansu_path() else set()))

    def __init__(self, tmp_path):
        super().__init__()


class RemovedKafkaKind(KafkaBench):
    """The mock cluster throws away what is over 5 MiB."""

    can = frozenset({"gap"})

    def __init__(self, tmp_path):
        super().__init__(mock=True)

    def lose(self):
        for _ in range(16):
            self.publish(b"x" * 900_000)


KINDS = [ListKind, DirectoryKind, StdinKind, NatsKind, RedisKind, KafkaKind, RemovedKafkaKind]
EXPECTED = {
    "ListKind": {"restart"},
    "DirectoryKind": {"restart"},
    "StdinKind": {"bound"},
    "NatsKind": {"restart", "acks", "away", "gap", "bound"},
    "RedisKind": {"restart", "acks", "away", "gap", "bound"},
    "KafkaKind": {"restart", "bound"},
    "RemovedKafkaKind": {"gap"},
}


def needs(*abilities):
    def mark(law):
        law.needs = set(abilities)
        return law

    return mark


def publish(kind, numbers=range(4)):
    for number in numbers:
        kind.publish(GOOD[number % 4])


def collect(source: Source, count, acknowledge=True):
    """Passes until `count` items have come."""
    items = []
    deadline = time.monotonic() + 60
    while len(items) < count:
        assert time.monotonic() < deadline, f"{len(items)} of {count} came"
        for item in source.iter_arrivals():
            items.append(item)
            if acknowledge:
                source.acknowledge([item])
        if len(items) < count:
            source.wait(1)
    return items


def cursors_of(items):
    return {item.key: item.position for item in items}


def check_everything_comes_once_in_order(kind, make):
    publish(kind)
    source = make({})
    items = collect(source, 4)
    assert [item.payload for item in items] == GOOD
    assert {item.source for item in items} == {source.name}
    assert len({(item.key, item.identity or item.position) for item in items}) == 4
    assert list(source.iter_arrivals()) == []
    assert source.pending() == 0


def check_arrivals_are_whole_and_have_a_form_and_a_printable_name(kind, make):
    publish(kind)
    for item in collect(make({}), 4):
        assert isinstance(item, Arrival)
        assert item.sha256 == hashlib.sha256(item.payload).hexdigest()
        assert item.form == "npz"
        assert item.name
        assert item.name.isprintable()


def check_a_pass_repeats_what_is_not_acknowledged(kind, make):
    publish(kind)
    source = make({})
    first = collect(source, 4, acknowledge=False)
    source.acknowledge(first[:1])
    assert list(source.iter_arrivals()) == first[1:]
    source.acknowledge(first[1:3])
    assert list(source.iter_arrivals()) == first[3:]


def check_what_is_handed_over_is_pending_until_it_is_acknowledged(kind, make):
    publish(kind)
    source = make({})
    items = collect(source, 4, acknowledge=False)
    for acknowledged in range(4):
        assert source.pending() == 4 - acknowledged
        source.acknowledge([items[acknowledged]])
    assert source.pending() == 0


def check_a_late_acknowledgement_counts_in_the_running_pass(kind, make):
    publish(kind)
    source = make({})
    first, second, *rest = collect(source, 4, acknowledge=False)
    running = source.iter_arrivals()
    assert next(running) == first
    source.acknowledge([first, second])
    assert list(running) == rest


def check_an_abandoned_pass_can_be_begun_anew(kind, make):
    publish(kind)
    source = make({})
    collect(source, 4, acknowledge=False)
    next(source.iter_arrivals())
    assert [item.payload for item in source.iter_arrivals()] == GOOD


def check_what_comes_later_is_found(kind, make):
    publish(kind)
    source = make({})
    collect(source, 4)
    publish(kind, [2])
    assert [item.payload for item in collect(source, 1)] == [GOOD[2]]


@needs("restart")
def check_what_is_not_acknowledged_comes_again_after_a_restart(kind, make):
    publish(kind)
    killed = make({})
    items = collect(killed, 4, acknowledge=False)
    killed.acknowledge(items[:2])
    cursors = cursors_of(items[:2])
    source = make(cursors)
    cursors.clear()  # they were copied
    again = collect(source, 2)
    assert [item.payload for item in again] == GOOD[2:]
    assert [item.identity for item in again] == [item.identity for item in items[2:]]


@needs("restart")
def check_what_is_acknowledged_does_not_come_again_after_a_restart(kind, make):
    publish(kind)
    source = make({})
    items = collect(source, 4)
    source.close()
    again = make(cursors_of(items))
    assert list(again.iter_arrivals()) == []
    publish(kind, [0])
    assert len(collect(again, 1)) == 1


@needs("acks")
def check_a_lost_acknowledgement_brings_the_same_identities_again(kind, make):
    publish(kind)
    source = make({})
    items = collect(source, 4, acknowledge=False)
    kind.lose_acks()
    with pytest.raises(SourceUnavailable):
        source.acknowledge(items)
    kind.proxy.accept()
    again = collect(make(cursors_of(items)), 4)
    assert {item.identity for item in again} == {item.identity for item in items}
    assert cursors_of(again) == cursors_of(items)  # they do not turn the cursor back
    assert kind.pending() == 0


@needs("acks")
def check_a_lost_reply_to_an_acknowledgement_does_no_harm(kind, make):
    publish(kind)
    source = make({})
    items = collect(source, 4, acknowledge=False)
    kind.proxy.lose_replies()
    with pytest.raises(SourceUnavailable):
        source.acknowledge(items)
    kind.proxy.accept()
    for item in source.iter_arrivals():
        assert replace(item, position="") in [replace(one, position="") for one in items]
        source.acknowledge([item])
    assert kind.pending() == 0


@needs("bound")
def check_no_more_is_held_than_may_be_unacknowledged(kind, make):
    publish(kind, range(2 * MAX_UNACKNOWLEDGED))
    source = make({})
    items = collect(source, MAX_UNACKNOWLEDGED, acknowledge=False)
    assert len(items) == MAX_UNACKNOWLEDGED
    for _ in range(3):
        assert list(source.iter_arrivals()) == items
    assert source.pending() == MAX_UNACKNOWLEDGED
    source.acknowledge(items)
    rest = collect(source, MAX_UNACKNOWLEDGED)
    assert [item.payload for item in rest] == [GOOD[number % 4] for number in range(MAX_UNACKNOWLEDGED)]


@needs("gap")
def check_nothing_passes_a_gap_before_it_is_accepted(kind, make):
    publish(kind, [0])
    source = make({})
    read = collect(source, 1)
    source.close()
    publish(kind, [1, 2])
    kind.lose()
    publish(kind, [3])
    source = make(cursors_of(read))
    for _ in range(2):
        (gap,) = source.iter_arrivals()
        assert isinstance(gap, Gap)
        assert gap.source == source.name
        assert gap.reason.isprintable()
        assert source.problem() == gap.reason
    (again,) = make(cursors_of(read)).iter_arrivals()
    assert again == gap
    source.acknowledge([gap])
    assert source.problem() is None
    assert collect(source, 1)[-1] is not gap


@needs("away")
def check_a_source_that_is_away_says_so_and_goes_on_once_it_is_back(kind, make):
    publish(kind, [0, 1])
    source = make({})
    first = collect(source, 2, acknowledge=False)
    source.acknowledge(first[:1])
    kind.proxy.refuse()
    for _ in range(3):
        with pytest.raises(SourceUnavailable, match=r"connection|transport failure|brokers"):
            for item in source.iter_arrivals():
                assert item == first[1]  # it is held already
            source.wait(0.1)
            list(source.iter_arrivals())
            source.acknowledge(first[:0])
    assert source.problem()
    kind.proxy.accept()
    publish(kind, [2])
    rest = collect(source, 2)
    assert [item.payload for item in rest] == GOOD[1:3]
    assert source.problem() is None


@needs("away")
def check_it_may_be_away_at_the_start(kind, make):
    publish(kind, [0])
    kind.proxy.refuse()
    source = make({})
    with pytest.raises(SourceUnavailable):
        list(source.iter_arrivals())
    kind.proxy.accept()
    assert len(collect(source, 1)) == 1


def check_a_poke_ends_the_wait(kind, make):
    source = make({})
    list(source.iter_arrivals())
    source.poke()
    started = time.monotonic()
    source.wait(60)  # poked before
    waiting = threading.Thread(target=source.wait, args=(60,))
    waiting.start()
    source.poke()
    waiting.join(20)
    assert not waiting.is_alive()
    assert time.monotonic() - started < 40


def check_what_arrives_ends_the_wait(kind, make):
    source = make({})
    list(source.iter_arrivals())
    started = time.monotonic()
    threading.Timer(0.1, publish, (kind, [0])).start()
    assert len(collect(source, 1)) == 1
    assert time.monotonic() - started < 40


def check_a_wait_ends_in_time(kind, make):
    source = make({})
    list(source.iter_arrivals())
    started = time.monotonic()
    source.wait(0.01)
    make({}).wait(0.01)  # before its first pass too
    assert time.monotonic() - started < 20


def check_close_may_be_called_twice(kind, make):
    publish(kind)
    source = make({})
    next(source.iter_arrivals(), None)
    source.close()
    source.close()
    make({}).close()


LAWS = [law for name, law in sorted(globals().items()) if name.startswith("check_")]


@pytest.mark.parametrize(
    ("kind_type", "law"),
    [
        pytest.param(kind, law, id=f"{kind.__name__}-{law.__name__}")
        for kind in KINDS
        for law in LAWS
        if getattr(law, "needs", set()) <= kind.can
    ],
)
def test_every_source_keeps_the_law(kind_type, law, tmp_path):
    kind = kind_type(tmp_path)
    made = []

    def make(cursors):
        made.append(kind.source(cursors))
        return made[-1]

    try:
        law(kind, make)
    finally:
        for source in made:
            source.close()
        kind.cleanup()


def test_no_law_is_left_out_unnoticed():
    assert {kind.__name__: kind.can - {"away"} for kind in KINDS} == {
        name: abilities - {"away"} for name, abilities in EXPECTED.items()
    }
