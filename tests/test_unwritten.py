"""What fails beside the store is told and passed: predictions that cannot be written are kept, and learning goes on."""

import errno
import hashlib
import json
import threading
from contextlib import contextmanager

import pytest
from daemon_process import ask, edit, until
from digits import draw, held_out

from storage import ledger, predictions
from storage.backends import backend_of
from storage.backup import make_backup, restore_backup
from storage.db import Database, StoreError, upgrade, verify
from storage.durable import Files
from storage.models import BatchRow
from storage.spool import Spool
from streams.batch import Batch
from streams.formats import encode
from streams.names import printable
from supsupd.config import Settings
from supsupd.health import Health
from supsupd.learning.device import pick_device, use_threads
from supsupd.predictions import place_of
from supsupd.sections import NetworkSettings
from supsupd.worker import Worker


class Lives:
    """A worker in its own thread over a state with one task, as the daemon has it; stopped and started again."""

    def __init__(self, root, kind=Database, files=None):
        use_threads(1)
        self._kind, self._files = kind, files
        self.out = root / "out"
        watch, network = [root / "watch"], NetworkSettings(hidden=[100])
        paths = {"state": root / "state", "socket": root / "sock", "predictions": self.out}
        watch[0].mkdir()
        self.settings = Settings(watch=watch, network=network, **paths)
        upgrade(self.settings.store)
        self.health = Health()
        self._stopping = threading.Event()

    def __enter__(self):
        self.database = self._kind.open(self.settings.store)
        self.spool = Spool(self.settings.state / "spool", self._files)
        self.worker = Worker(self.settings, self.database, self.spool, pick_device("cpu"), health=self.health)
        self.worker.load()
        self._stopping.clear()
        self._thread = threading.Thread(target=self.worker.loop, args=(self._stopping,))
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._stopping.set()
        self.worker.notify()
        self._thread.join()
        self.database.close()

    def stage(self, name, batch, source="test"):
        """Its id."""
        payload = encode(Batch(batch["x"], batch.get("y")))
        sha256 = hashlib.sha256(payload).hexdigest()
        self.spool.store({sha256: payload})
        entry = ledger.Entry(source, name, sha256, len(payload), len(batch["x"]), "y" in batch)
        with self.database.write() as session:
            staged = ledger.stage(session, entry)
        self.worker.notify()
        return staged.id

    def state(self, batch):
        with self.database.read() as session:
            return ledger.load_batch(session, batch).state

    def learn(self, seed):
        """A good batch is learned, whatever came before."""
        batch = self.stage(f"good {seed}", draw(0, seed))
        until(lambda: self.state(batch) == "committed")
        return batch

    def ask(self, name, seed, source="test", rows=5):
        """An unlabelled batch, scored."""
        batch = self.stage(name, {"x": held_out(0)[0][seed : seed + rows]}, source)
        until(lambda: self.state(batch) == "scored")
        return batch

    def kept(self):
        with self.database.read() as session:
            return [row.id for row in predictions.list_kept(session, 1000)]

    def file(self, name, source="test"):
        return self.out.joinpath(*place_of(source, None, name))

    def problems(self):
        return [(problem["who"], problem["kind"]) for problem in self.health.show()]


UNWRITTEN = [("predictions", "predictions_unwritten")]


@pytest.fixture
def lives(tmp_path):
    with Lives(tmp_path) as lives:
        for seed in range(3):
            batch = lives.stage(f"first {seed}", draw(0, seed))
        until(lambda: lives.state(batch) == "committed")
        yield lives


@contextmanager
def in_the_way(path):
    """A file where a folder should be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("")
    yield
    path.unlink()


def test_predictions_that_cannot_be_written_are_kept_and_written_later(lives):
    with in_the_way(lives.out):
        asked = [lives.ask(f"asked {seed}", seed) for seed in range(20)]
        lives.learn(100)
        assert lives.kept() == asked
        assert lives.problems() == UNWRITTEN
        assert verify(lives.settings.store, lives.settings.state / "spool") == []
    until(lambda: lives.kept() == [])
    until(lambda: lives.problems() == [])
    for seed in range(20):
        assert len(json.loads(lives.file(f"asked {seed}").read_bytes())) == 5


def test_what_is_kept_is_written_after_a_restart(lives):
    with in_the_way(lives.out):
        asked = lives.ask("asked", 0)
        lives.__exit__()
    with lives:
        until(lambda: lives.kept() == [])
        assert len(json.loads(lives.file("asked").read_bytes())) == 5
        assert lives.state(asked) == "scored"


def test_one_file_that_cannot_be_written_holds_up_no_other(lives):
    lives.ask("before", 0)
    lives.file("blocked").joinpath("full").mkdir(parents=True)
    blocked = lives.ask("blocked", 1)
    assert lives.kept() == [blocked]
    with in_the_way(lives.file("late/x").parent):
        late = lives.ask("late/x", 2)
        lives.ask("after", 3)
        assert lives.kept() == [blocked, late]
    until(lambda: lives.kept() == [blocked])
    assert lives.problems() == UNWRITTEN
    assert lives.file("late/x").exists()
    lives.learn(101)


def test_a_file_has_what_was_predicted_for_the_newest_batch_of_its_name(lives):
    with in_the_way(lives.out):
        lives.ask("same", 0, rows=3)
        lives.ask("same", 10, rows=4)
    newest = lives.ask("same", 20, rows=6)
    until(lambda: lives.kept() == [])
    assert len(json.loads(lives.file("same").read_bytes())) == 6
    assert lives.state(newest) == "scored"


def test_two_sources_with_one_name_have_two_files(lives):
    lives.ask("same", 0, rows=3, source="/a")
    lives.ask("same", 10, rows=4, source="/b")
    assert [len(json.loads(lives.file("same", s).read_bytes())) for s in ("/a", "/b")] == [3, 4]


def test_kept_predictions_are_bounded_and_the_oldest_are_given_up(lives, monkeypatch):
    monkeypatch.setattr("supsupd.predictions.MAX_KEPT_BYTES", 400)
    with in_the_way(lives.out):
        asked = [lives.ask(f"asked {seed}", seed) for seed in range(12)]
        kept = lives.kept()
        assert kept == asked[-len(kept) :]
        assert 1 <= len(kept) < 12
        large = lives.ask("large", 0, rows=300)
        assert large not in lives.kept()
        assert lives.kept() == kept


def test_kept_predictions_are_verified_backed_up_and_restored(lives, tmp_path):
    with in_the_way(lives.out):
        asked = lives.ask("asked", 0)
        backend = backend_of(lives.settings.store)
        make_backup(backend, lives.settings.state / "spool", tmp_path / "backup.tar")
    target = tmp_path / "again"
    target.mkdir()
    restored = target / "supsup.db"
    restore_backup(tmp_path / "backup.tar", backend_of(restored), target / "spool")
    assert ask(target, "SELECT batch_id FROM prediction") == [(asked,)]
    assert verify(restored, target / "spool") == []
    edit(target, "UPDATE prediction SET payload = x'00'")
    (problem,) = verify(restored, target / "spool")
    assert problem.startswith(f"prediction: that of batch {asked} is damaged")


@pytest.mark.parametrize(
    "name", ["x" * 255, "a.json/b", "é" * 46, "../../../state/tokens", "/etc/x", printable("a\0b"), ""]
)
def test_after_any_name_the_next_good_batch_is_learned(lives, name):
    lives.ask("a", 50)
    lives.ask(name, 0)
    assert lives.file(name).exists()
    assert lives.kept() == []
    lives.learn(102)
    assert lives.problems() == []


# -- other ways to fail -----------------------------------------------------------------------------------------------


class Picky(Database):
    """It refuses the values of one batch, as PostgreSQL does where they have no JSON: nothing else is wrong."""

    refused = None

    @contextmanager
    def write(self):
        with super().write() as session:
            yield session
            row = None if self.refused is None else session.get(BatchRow, self.refused)
            if row is not None and row.state == "scored":
                raise StoreError("this cannot be stored: Out of range float values are not JSON compliant")


def test_values_that_the_store_refuses_stop_their_batch_alone(tmp_path):
    with Lives(tmp_path, Picky) as lives:
        for seed in range(3):
            first = lives.stage(f"first {seed}", draw(0, seed))
        until(lambda: lives.state(first) == "committed")
        lives.database.refused = first + 1
        refused = lives.stage("refused", {"x": held_out(0)[0][:5]})
        until(lambda: lives.state(refused) == "quarantined")
        lives.learn(100)
        assert ask(lives.settings.state, "SELECT code FROM batch WHERE state = 'quarantined'") == [("learning_failed",)]
        assert lives.problems() == []


def test_one_that_waited_for_a_task_and_fails_does_not_keep_the_others_waiting(tmp_path):
    with Lives(tmp_path, Picky) as lives:
        waiting = [lives.stage(f"early {seed}", {"x": held_out(0)[0][seed : seed + 5]}) for seed in range(3)]
        until(lambda: [lives.state(batch) for batch in waiting] == ["unsure"] * 3)
        lives.database.refused = waiting[0]
        for seed in range(3):
            lives.stage(f"first {seed}", draw(0, seed))
        until(lambda: [lives.state(batch) for batch in waiting] == ["quarantined", "scored", "scored"])
        lives.learn(100)


class BadSector(Files):
    """One payload of the spool cannot be read."""

    bad = None

    def read(self, path):
        if path.name == self.bad:
            raise OSError(errno.EIO, "Input/output error")
        return super().read(path)


def test_a_payload_that_the_disk_cannot_read_stops_its_batch_alone(tmp_path):
    files = BadSector()
    with Lives(tmp_path, files=files) as lives:
        payload = encode(Batch(draw(0, 50)["x"], draw(0, 50)["y"]))
        files.bad = hashlib.sha256(payload).hexdigest()
        lost = lives.stage("lost", draw(0, 50))
        until(lambda: lives.state(lost) == "quarantined")
        for seed in range(3):
            good = lives.stage(f"good {seed}", draw(0, seed))
        until(lambda: lives.state(good) == "committed")
        assert ask(lives.settings.state, "SELECT code FROM batch WHERE state = 'quarantined'") == [("spool_corrupt",)]
