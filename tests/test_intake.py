"""Intake over a real store: bytes first, one row for each content, and never more than the queue holds."""

import threading
from pathlib import Path

import numpy as np
import pytest
from daemon_process import until
from digits import draw, drop

from storage import cursors, ledger
from storage.db import Database, upgrade
from storage.spool import Spool
from streams.batch import Batch
from streams.directory import DirectorySettings, DirectorySource
from streams.formats import encode
from supsupd.config import IntakeSettings
from supsupd.intake import Intake, QueueFull


class Store:
    def __init__(self, root: Path, max_queue: int):
        upgrade(root / "state" / "supsup.db")
        self.root = root
        self.database = Database.open(root / "state" / "supsup.db")
        self.spool = Spool(root / "state" / "spool")
        self.intake = Intake(self.database, self.spool, IntakeSettings(max_queue=max_queue), notify=lambda: None)

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
    made = Store(tmp_path, max_queue=3)
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
    first, digest = store.intake.submit("a.npz", payload(0))
    again, same = store.intake.submit("b.npz", payload(0))
    assert (first.duplicate, again.duplicate, digest == same) == (False, True, True)
    assert [row.state for row in store.rows()] == ["staged", "duplicate"]
    assert store.spool.names() == {digest}


def test_a_full_queue_refuses_what_is_submitted_and_takes_it_once_there_is_room(store):
    for seed in range(3):
        store.intake.submit(f"{seed}.npz", payload(seed))
    with pytest.raises(QueueFull, match="3 batches are waiting"):
        store.intake.submit("late.npz", payload(9))
    store.take_one()
    assert not store.intake.submit("late.npz", payload(9))[0].duplicate


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
