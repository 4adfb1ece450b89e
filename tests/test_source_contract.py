"""The laws of every source. A new one earns its place by joining SOURCES."""

import hashlib
import threading
import time

import numpy as np
import pytest

from streams.batch import Arrival, Batch, BatchRejected, Refusal
from streams.directory import DirectorySettings, DirectorySource
from streams.formats import decode, encode
from streams.source import Source

GOOD = [encode(Batch(np.full((2, 3), i, np.float32), np.arange(2))) for i in range(3)]
CONTENTS = {"b1.npz": GOOD[0], "b2.npz": b"junk", "b9.npz": GOOD[1], "b10.npz": GOOD[2]}


class ListSource:
    """The plainest source there can be: the laws say no more than this."""

    def __init__(self, contents, cursors):
        self.name = "list"
        self._contents = contents
        self._cursors = dict(cursors)
        self._wake = threading.Event()

    def iter_arrivals(self):
        for name, payload in self._contents.items():
            digest = hashlib.sha256(payload).hexdigest()
            if self._cursors.get(name) != digest:
                yield self._item(name, payload, digest)

    def _item(self, name, payload, digest):
        try:
            batch = decode(payload)
        except BatchRejected as error:
            return Refusal(self.name, name, digest, error.code, str(error), name, digest)
        return Arrival(self.name, name, digest, payload, len(batch.x), batch.y is not None, name, digest)

    def acknowledge(self, item):
        self._cursors[item.key] = item.position

    def pending(self):
        return 0

    def wait(self, timeout):
        self._wake.wait(timeout)
        self._wake.clear()

    def poke(self):
        self._wake.set()

    def close(self):
        pass


def make_list_source(tmp_path, cursors):
    return ListSource(CONTENTS, cursors)


def make_directory_source(tmp_path, cursors):
    if not any(tmp_path.iterdir()):
        for name, payload in CONTENTS.items():
            (tmp_path / name).write_bytes(payload)
    settings = DirectorySettings(settle_seconds=0, incomplete_seconds=0)
    return DirectorySource(tmp_path, name="directory", cursors=cursors, settings=settings)


SOURCES = [make_list_source, make_directory_source]


def check_everything_comes_once_in_order(make):
    source: Source = make({})
    items = list(source.iter_arrivals())
    assert [item.name for item in items] == list(CONTENTS)
    assert {item.source for item in items} == {source.name}
    assert len({item.key for item in items}) == len(items)


def check_arrivals_are_whole_and_refusals_have_a_reason(make):
    for item in make({}).iter_arrivals():
        if isinstance(item, Arrival):
            batch = decode(item.payload)
            assert item.sha256 == hashlib.sha256(item.payload).hexdigest()
            assert (item.samples, item.labelled) == (len(batch.x), batch.y is not None)
        else:
            assert item.reason.startswith(f"{item.code}: ")
            assert item.reason.isprintable()


def check_a_pass_repeats_what_is_not_acknowledged(make):
    source = make({})
    first = list(source.iter_arrivals())
    source.acknowledge(first[1])
    assert list(source.iter_arrivals()) == [first[0], *first[2:]]


def check_acknowledging_during_the_pass_changes_nothing_else(make):
    source = make({})
    names = []
    for item in source.iter_arrivals():
        source.acknowledge(item)
        names.append(item.name)
    assert names == list(CONTENTS)
    assert list(source.iter_arrivals()) == []
    assert source.pending() == 0


def check_a_late_acknowledgement_counts_in_the_running_pass(make):
    source = make({})
    first, second, *rest = source.iter_arrivals()
    running = source.iter_arrivals()
    assert next(running) == first
    source.acknowledge(second)
    assert list(running) == rest


def check_cursors_survive_a_restart(make):
    first, *rest = make({}).iter_arrivals()
    cursors = {first.key: first.position}
    again = make(cursors)
    cursors.clear()  # they were copied
    assert list(again.iter_arrivals()) == rest


def check_an_abandoned_pass_can_be_begun_anew(make):
    source = make({})
    next(source.iter_arrivals())
    assert [item.name for item in source.iter_arrivals()] == list(CONTENTS)


def check_a_poke_ends_the_wait(make):
    source = make({})
    source.poke()
    started = time.monotonic()
    source.wait(60)  # poked before
    waiting = threading.Thread(target=source.wait, args=(60,))
    waiting.start()
    source.poke()
    waiting.join(20)
    assert not waiting.is_alive()
    assert time.monotonic() - started < 40


def check_a_wait_ends_in_time(make):
    started = time.monotonic()
    make({}).wait(0.01)
    assert time.monotonic() - started < 20


def check_close_may_be_called_twice(make):
    source = make({})
    list(source.iter_arrivals())
    source.close()
    source.close()


LAWS = [law for name, law in sorted(globals().items()) if name.startswith("check_")]


@pytest.mark.parametrize("make_source", SOURCES)
@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_every_source_keeps_the_law(law, make_source, tmp_path):
    made = []

    def make(cursors):
        made.append(make_source(tmp_path, cursors))
        return made[-1]

    law(make)
    for source in made:
        source.close()
