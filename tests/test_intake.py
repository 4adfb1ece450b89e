"""Intake over a real store: bytes first, one row for each content, and never more than the queue holds."""

import errno
import os
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from daemon_process import until
from digits import draw, drop

from storage import cursors, gaps, ledger
from storage.db import Database, upgrade
from storage.durable import Files, SyncFailed
from storage.gaps import GapUnknown
from storage.spool import Spool
from streams.batch import Arrival, Batch, Gap, digest_of
from streams.decoder import InlineDecoder
from streams.directory import DirectorySettings, DirectorySource
from streams.formats import encode
from streams.reading import Reading
from streams.source import SourceUnavailable
from supsupd.health import Health
from supsupd.intake import GROUP_ITEMS, Intake
from supsupd.sections import IntakeSettings
from supsupd.staging import QueueFull, Staging


class Store:
    def __init__(self, root: Path, max_queue: int, files: Files | None = None, fatal=lambda who, error: None):
        upgrade(root / "state" / "supsup.db")
        self.root = root
        self.database = Database.open(root / "state" / "supsup.db")
        self.spool = Spool(root / "state" / "spool", files)
        settings = IntakeSettings(max_queue=max_queue, min_free_bytes=0)
        self.health = Health(fatal)
        self.intake = Intake(
            Staging(self.database, self.spool, settings, InlineDecoder(Reading())),
            settings,
            lambda: None,
            self.health,
        )

    def rows(self):
        with self.database.read() as session:
            return ledger.list_batches(session)

    def staged(self):
        return sum(row.state == "staged" for row in self.rows())

    def take_one(self):
        with self.database.write() as session:
            row = ledger.claim(session)
            ledger.finish(session, row.id, ledger.Outcome("quarantined", reason="test"))

    def source(self, name):
        folder = self.root / name
        folder.mkdir(exist_ok=True)
        with self.database.read() as session:
            known = cursors.load_cursors(session, name)
        settings = DirectorySettings(settle_seconds=0.01, incomplete_seconds=0.05)
        return DirectorySource(folder, name=name, cursors=known, settings=settings)


@pytest.fixture
def store(tmp_path):
    made = Store(tmp_path, max_queue=6)  # three of one source
    yield made
    made.database.close()


def payload(seed):
    return encode(Batch(**draw(0, seed, 8)))


def one_pass(store, source):
    """The intake's loop until it has covered a full pass."""
    store.intake.add(source)
    progress, stopping = store.intake.progress[-1], threading.Event()
    thread = threading.Thread(target=store.intake.loop, args=(progress, stopping))
    thread.start()
    return progress, stopping, thread


def finish(source, stopping, thread):
    stopping.set()
    source.poke()
    thread.join(10)
    source.close()
    assert not thread.is_alive()


def test_equal_content_is_one_batch_whichever_way_it_comes(store):
    first, digest = store.intake.staging.submit("a.npz", "npz", payload(0))
    again, same = store.intake.staging.submit("b.npz", "npz", payload(0))
    assert (first.duplicate, again.duplicate, digest == same) == (False, True, True)
    assert [row.state for row in store.rows()] == ["staged", "duplicate"]
    assert store.spool.names() == {digest}


def test_a_full_queue_refuses_what_is_submitted_and_takes_it_once_there_is_room(store):
    for seed in range(3):
        store.intake.staging.submit(f"{seed}.npz", "npz", payload(seed), None, "uid 1")
    with pytest.raises(QueueFull, match="as many batches of this sender are waiting as may"):
        store.intake.staging.submit("late.npz", "npz", payload(9), None, "uid 1")
    store.take_one()
    assert not store.intake.staging.submit("late.npz", "npz", payload(9), None, "uid 1")[0].duplicate


def test_a_source_that_always_has_more_keeps_no_other_one_out(tmp_path):
    store = Store(tmp_path, max_queue=8)
    flood = ScriptedSource(*(message(n, n) for n in range(40)))
    _, *first = one_pass(store, flood)
    until(lambda: store.staged() == 4)
    late = ScriptedSource(*(replace(message(100 + n, n), source="late") for n in range(2)))
    late.name = "late"
    _, *second = one_pass(store, late)
    until(lambda: [row.source for row in store.rows()].count("late") == 2)  # nothing was learned meanwhile
    finish(flood, *first)
    finish(late, *second)
    store.database.close()


def test_a_source_waits_while_the_queue_is_full_and_loses_nothing(store):
    for turn in range(7):
        drop(store.root / "in" / f"{turn}.npz", turn, **draw(0, turn, 8))
    source = store.source("in")
    progress, stopping, thread = one_pass(store, source)
    taken = 0
    while taken < 7:
        until(lambda: store.staged() > 0)
        assert store.staged() <= 3
        store.take_one()
        taken += 1
    until(lambda: progress.passes > 0)
    finish(source, stopping, thread)
    assert [row.name for row in store.rows()] == [f"{turn}.npz" for turn in range(7)]


def test_a_file_is_staged_once_however_often_the_daemon_starts(store):
    drop(store.root / "in" / "a.npz", 0, **draw(0, 0, 8))
    drop(store.root / "in" / "bad.npz", 1, x=np.full((4, 64), np.nan))
    for _ in range(3):
        source = store.source("in")
        progress, stopping, thread = one_pass(store, source)
        until(lambda: progress.passes > 0 and not source.pending())  # noqa: B023 - called before the next round
        finish(source, stopping, thread)
    assert [(row.name, row.state) for row in store.rows()] == [("a.npz", "staged"), ("bad.npz", "quarantined")]


# -- sources that say what a test wants -------------------------------------------------------------------------------


class ScriptedSource:
    """Yields what is put into `items`, or raises it, until it is acknowledged."""

    def __init__(self, *items):
        self.name = "line-3"
        self.items = list(items)
        self.acknowledged = []
        self.postponed = []
        self.away = False
        self._wake = threading.Event()

    def iter_arrivals(self):
        if self.away:
            raise SourceUnavailable("line-3: connection refused")
        for item in list(self.items):
            yield item
            if isinstance(item, Gap):
                return

    def acknowledge(self, items):
        self.acknowledged += items
        self.items = [item for item in self.items if item not in items]

    def postpone(self, item):
        self.postponed.append(item)
        self.items.remove(item)

    def problem(self):
        return None

    def pending(self):
        return len(self.items)

    def wait(self, timeout):
        self._wake.wait(timeout)
        self._wake.clear()

    def poke(self):
        self._wake.set()

    def close(self):
        pass


def message(seed, sequence):
    content = payload(seed)
    return Arrival("line-3", f"S/{sequence}", "npz", digest_of(content), content, "S", str(sequence), f"S:{sequence}")


def problems(store):
    return {problem["who"]: problem["kind"] for problem in store.health.show()}


def test_nothing_is_acknowledged_before_its_row_is_there(store):
    source = ScriptedSource(message(0, 1), message(1, 2))
    acknowledge, seen = source.acknowledge, []
    source.acknowledge = lambda items: (seen.append((len(items), len(store.rows()))), acknowledge(items))
    progress, stopping, thread = one_pass(store, source)
    until(lambda: progress.passes > 0)
    finish(source, stopping, thread)
    assert seen == [(2, 2)]


def test_a_gap_stops_its_source_until_it_is_accepted_even_through_a_restart(store):
    gap = Gap("line-3", "S", "9", "messages 2 to 9 are gone")
    source = ScriptedSource(message(0, 1), gap, message(1, 10))
    progress, stopping, thread = one_pass(store, source)
    until(lambda: progress.gap is not None)
    finish(source, stopping, thread)
    assert [row.name for row in store.rows()] == ["S/1"]
    assert problems(store) == {"line-3": "gap"}

    again = ScriptedSource(gap, message(1, 10))
    progress, stopping, thread = one_pass(store, again)
    until(lambda: progress.gap is not None)
    with store.database.read() as session:
        assert [row.accepted_at for row in gaps.list_gaps(session)] == [None]
    with pytest.raises(GapUnknown, match="there is no source other"):
        store.intake.accept_gap("other")
    store.intake.progress[:] = [progress]
    assert store.intake.accept_gap("line-3").reason == "messages 2 to 9 are gone"
    until(lambda: progress.passes > 0)
    finish(again, stopping, thread)
    assert again.acknowledged[0] == gap
    assert [row.name for row in store.rows()] == ["S/1", "S/10"]
    assert problems(store) == {}
    with store.database.read() as session:
        assert cursors.load_cursors(session, "line-3") == {"S": "10"}


def test_a_source_that_is_away_is_said_and_comes_back_by_itself(store):
    source = ScriptedSource(message(0, 1))
    source.away = True
    progress, stopping, thread = one_pass(store, source)
    until(lambda: problems(store) == {"line-3": "source_unavailable"})
    source.away = False
    until(lambda: progress.passes > 0)
    assert problems(store) == {}
    finish(source, stopping, thread)
    assert len(store.rows()) == 1


def test_a_source_that_is_back_has_no_problem_though_its_pass_goes_on(store):
    source = ScriptedSource(*(message(number, number) for number in range(5)))
    source.away = True
    progress, stopping, thread = one_pass(store, source)
    until(lambda: problems(store) == {"line-3": "source_unavailable"})
    source.away = False
    until(lambda: store.staged() == 3)
    until(lambda: problems(store) == {})
    assert progress.passes == 0
    finish(source, stopping, thread)


def test_a_disk_with_room_again_is_no_problem_though_the_queue_is_full(store, monkeypatch):
    for number in range(6):
        store.intake.staging.submit(f"{number}.npz", "npz", payload(number), None, f"uid {number}")
    real, free = os.statvfs, []
    monkeypatch.setattr(os, "statvfs", lambda path: real(path) if free else SimpleNamespace(f_bavail=-1, f_frsize=1))
    source = ScriptedSource(message(7, 1))
    progress, stopping, thread = one_pass(store, source)
    until(lambda: problems(store) == {"line-3": "disk_full"})
    free.append(True)
    until(lambda: problems(store) == {})
    assert (progress.passes, store.staged()) == (0, 6)
    finish(source, stopping, thread)


def test_a_cut_file_that_may_grow_is_postponed_and_one_that_may_not_is_refused(store):
    cut = payload(0)[:-30]
    item = Arrival("line-3", "a.npz", "npz", digest_of(cut), cut, "a", "1", may_grow=True)
    source = ScriptedSource(item)
    progress, stopping, thread = one_pass(store, source)
    until(lambda: progress.passes > 0)
    assert (source.postponed, store.rows()) == ([item], [])
    source.items.append(replace(item, may_grow=False))
    source.poke()
    until(store.rows)
    finish(source, stopping, thread)
    assert [(row.state, row.code) for row in store.rows()] == [("quarantined", "truncated")]


def test_a_failed_sync_is_fatal_and_nothing_is_acknowledged(tmp_path):
    class Failing(Files):
        def sync(self, descriptor):
            super().sync(descriptor)
            raise SyncFailed(errno.EIO, "fsync: Input/output error")

    said = []
    store = Store(tmp_path, max_queue=3, files=Failing(), fatal=lambda who, error: said.append(str(error)))
    source = ScriptedSource(message(0, 1))
    _, stopping, thread = one_pass(store, source)
    until(lambda: said)
    finish(source, stopping, thread)
    assert (source.acknowledged, store.rows()) == ([], [])
    assert "fsync: Input/output error" in said[0]
    store.database.close()


def test_a_failed_sync_is_fatal_also_where_the_source_fails_first(tmp_path):
    class Failing(Files):
        def sync(self, descriptor):
            super().sync(descriptor)
            raise SyncFailed(errno.EIO, "fsync: Input/output error")

    class Leaving(ScriptedSource):
        def iter_arrivals(self):
            yield from super().iter_arrivals()
            raise SourceUnavailable("line-3: connection reset")

    fatal = []
    store = Store(tmp_path, max_queue=1000, files=Failing(), fatal=lambda who, error: fatal.append(error))
    source = Leaving(*(message(number, number) for number in range(GROUP_ITEMS)))
    _, stopping, thread = one_pass(store, source)
    until(lambda: fatal)
    finish(source, stopping, thread)
    assert isinstance(fatal[0], SyncFailed)
    store.database.close()


def test_a_full_disk_is_said_and_intake_goes_on_by_itself_when_there_is_room(tmp_path):
    class Full(Files):
        room = False

        def write(self, path, data):
            if not self.room:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(path, data)

    files = Full()
    store = Store(tmp_path, max_queue=3, files=files)
    source = ScriptedSource(message(0, 1))
    progress, stopping, thread = one_pass(store, source)
    until(lambda: problems(store) == {"line-3": "disk_full"})
    assert source.acknowledged == []
    files.room = True
    until(lambda: progress.passes > 0)
    finish(source, stopping, thread)
    assert (problems(store), len(store.rows())) == ({}, 1)
    store.database.close()


class Forgetful:
    """A folder whose first acknowledgement fails after everything was made durable."""

    def __init__(self, source):
        self.source, self.name, self.failures = source, source.name, 0

    def acknowledge(self, items):
        if not self.failures:
            self.failures += 1
            raise OSError("not now")
        self.source.acknowledge(items)

    def __getattr__(self, name):
        return getattr(self.source, name)


def test_a_file_whose_acknowledgement_failed_is_the_batch_that_it_was(store):
    drop(store.root / "in" / "0.npz", 0, **draw(0, 0, 8))
    (store.root / "in" / "1.npz").write_bytes(b"no batch at all")
    source = Forgetful(store.source("in"))
    progress, stopping, thread = one_pass(store, source)
    until(lambda: progress.passes > 0 and not source.pending())
    finish(source, stopping, thread)
    assert source.failures == 1
    assert [(row.name, row.state) for row in store.rows()] == [("0.npz", "staged"), ("1.npz", "quarantined")]
