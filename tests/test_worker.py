"""The learning thread over a real store, in this process, so that it can be stopped at exactly one moment."""

import hashlib
import random
import threading
from contextlib import contextmanager
from itertools import count

import numpy as np
import pytest
from daemon_process import ask, until, what_was_learned
from digits import draw, held_out
from sqlalchemy import func, select

from storage import ledger
from storage.db import CommitUnknown, Database, StoreError, ValueRefused, upgrade
from storage.models import BatchRow
from storage.spool import Spool
from streams.batch import Batch
from streams.formats import encode
from supsupd.config import Settings
from supsupd.learning.device import pick_device, use_threads
from supsupd.sections import NetworkSettings, RecognitionSettings
from supsupd.worker import Worker


class Killed(BaseException):
    """The process is gone."""


class MortalDatabase(Database):
    """Its process dies right after the commit number `last`."""

    last, commits = 0, 0

    @contextmanager
    def write(self):
        with super().write() as session:
            yield session
        self.commits += 1
        if self.commits == self.last:
            raise Killed


class FullDisk(Database):
    """The commits whose numbers are in `full` fail."""

    full, commits = (), 0

    @contextmanager
    def write(self):
        with super().write() as session:
            yield session
            self.commits += 1
            if self.commits in self.full:
                raise StoreError("disk full")


class Doubtful(Database):
    """The answer to many a commit is lost: it is stored, or it is not."""

    lost, quiet, chance = 0, True, random.Random(0)

    @contextmanager
    def write(self):
        with super().write() as session:
            yield session
            if not self.quiet and self.chance.random() < 0.1:
                self.lost += 1
                raise CommitUnknown("the connection broke before the commit")
        if not self.quiet and self.chance.random() < 0.1:
            self.lost += 1
            raise CommitUnknown("the connection broke after the commit")


@pytest.fixture(autouse=True)
def one_thread():
    use_threads(1)  # as the daemon does: bits repeat for the same number


@pytest.fixture
def new_store(tmp_path):
    """Makes settings for an empty state directory."""
    numbers = count()

    def make(**network):
        root = tmp_path / str(next(numbers))
        (root / "watch").mkdir(parents=True)
        shape = NetworkSettings(hidden=[100], **network)
        settings = Settings(watch=[root / "watch"], state=root / "state", socket=root / "sock", network=shape)
        upgrade(settings.store)
        return settings

    return make


def stage(settings, database, batches):
    for number, batch in enumerate(batches):
        payload = encode(Batch(batch["x"], batch.get("y")))
        sha256 = hashlib.sha256(payload).hexdigest()
        Spool(settings.state / "spool").store({sha256: payload})
        entry = ledger.Entry("test", f"{number}", sha256, len(payload), len(batch["x"]), "y" in batch)
        with Database.write(database) as session:
            ledger.stage(session, entry)


@contextmanager
def worker_of(settings, kind=Database, batches=()):
    """A loaded worker as at the daemon's start, over a database of this kind; the batches are staged before."""
    database = kind.open(settings.store)
    try:
        stage(settings, database, batches)
        yield Worker(settings, database, Spool(settings.state / "spool"), pick_device("cpu"))
    finally:
        database.close()


def learn_all(worker):
    worker.load()
    while worker.step():
        pass


def states(settings):
    return [state for (state,) in ask(settings.state, "SELECT state FROM batch ORDER BY id")]


def mixed_stream():
    """Three tasks without order, batches that straddle two, and two without labels before there is a task."""
    tasks = np.random.default_rng(2).integers(0, 3, 24).tolist()
    batches = []
    for turn, task in enumerate(tasks):
        batch = draw(task, turn, rows=32)
        if turn % 3 == 0:
            other = draw((task + 1) % 3, turn, rows=16)
            batch = {key: np.concatenate([batch[key][:16], other[key]]) for key in batch}
        batches.append(batch)
    unlabelled = [{"x": held_out(task)[0][:30]} for task in (0, 1)]
    return [unlabelled[0], *batches[:2], unlabelled[1], *batches[2:]]


def killed_lives(settings, batches, commits):
    """As many lives as it takes, each ending after one of `commits` in turn; returns how many it took."""
    MortalDatabase.open(settings.store).close()
    for life in count():
        with worker_of(settings, MortalDatabase, batches if life == 0 else ()) as worker:
            worker.database.last = commits[life % len(commits)]
            try:
                learn_all(worker)
                return life
            except Killed:
                continue
    raise AssertionError


@pytest.mark.parametrize(
    ("network", "commits"),
    [({}, (3,)), ({}, (2, 4)), ({"normalisation": "feature", "feature_rows": 100}, (3, 2, 5))],
    ids=["after each", "now and then", "while the normalisation is found"],
)
def test_a_crash_after_any_commit_changes_no_bit(new_store, network, commits):
    batches = mixed_stream()
    whole, torn = new_store(**network), new_store(**network)
    with worker_of(whole, batches=batches) as worker:
        learn_all(worker)
    order = [batch for (batch,) in ask(whole.state, "SELECT batch_id FROM decision WHERE kind = 'known' ORDER BY id")]
    assert order != sorted(order), "the stream must have batches that are decided late"
    assert killed_lives(torn, batches, commits) > len(batches) // 3
    expected = what_was_learned(whole.state)
    for part, value in what_was_learned(torn.state).items():
        assert value == expected[part], part


def test_a_commit_whose_answer_is_lost_changes_no_bit(new_store):
    batches = mixed_stream()
    whole, doubtful = new_store(), new_store()
    with worker_of(whole, batches=batches) as worker:
        learn_all(worker)
    expected = what_was_learned(whole.state)
    with worker_of(doubtful, Doubtful, batches) as worker:
        worker.load()
        worker.database.quiet = False
        stopping = threading.Event()
        thread = threading.Thread(target=worker.loop, args=(stopping,))
        thread.start()
        until(lambda: not {"staged", "training"} & set(states(doubtful)))
        worker.database.quiet = True
        stopping.set()
        worker.notify()
        thread.join()
        lost = worker.database.lost
    with worker_of(doubtful) as again:  # the last answer may have been lost
        learn_all(again)
    assert lost > 5
    for part, value in what_was_learned(doubtful.state).items():
        assert value == expected[part], part


def test_a_full_disk_costs_no_batch_and_no_class(new_store):
    settings = new_store()
    batches = [draw(0, turn) for turn in range(3)]
    few = [{key: value[batch["y"] < 8] for key, value in batch.items()} for batch in batches[:2]]
    with worker_of(settings, FullDisk, [*few, batches[2]]) as worker:
        worker.load()
        while states(settings)[1] != "committed":
            worker.step()
        # The claim succeeds; what was learned cannot be stored, nor the batch be put back, at first.
        worker.database.full = range(worker.database.commits + 2, worker.database.commits + 4)
        stopping = threading.Event()
        thread = threading.Thread(target=worker.loop, args=(stopping,))
        thread.start()
        try:
            until(lambda: states(settings)[2] == "committed")
        finally:
            stopping.set()
            worker.notify()
            thread.join()
        learned = worker.predictor.classes.labels
    assert sorted(learned) == list(range(10))
    with worker_of(settings) as again:
        again.load()
        assert again.predictor.classes.labels == learned


def test_unsure_bytes_that_are_damaged_do_not_prevent_the_start(new_store):
    settings = new_store()
    with worker_of(settings, batches=[draw(0, 0, rows=16)]) as worker:
        learn_all(worker)
        assert states(settings) == ["unsure"]
    (spooled,) = (settings.state / "spool").iterdir()
    spooled.write_bytes(b"damaged")
    with worker_of(settings) as worker:
        worker.load()
    assert ask(settings.state, "SELECT state, reason FROM batch") == [
        ("quarantined", f"spool_corrupt: the bytes of {spooled.name} have another hash")
    ]


def test_it_is_busy_until_the_consequences_of_a_batch_are_done_too(new_store):
    settings = new_store()
    seen = []

    class Watched(Database):
        @contextmanager
        def write(self):
            with super().write() as session:
                yield session
            seen.append((states(settings), worker.busy))

    early = {"x": held_out(0)[0][:20]}
    with worker_of(settings, Watched, [early, draw(0, 0), draw(0, 1)]) as worker:
        learn_all(worker)
    decided = [busy for found, busy in seen if found == ["unsure", "committed", "committed"]]
    assert decided == [True]  # "early" waits, nothing is queued: not settled yet
    assert states(settings) == ["scored", "committed", "committed"]


def slow_mixture():
    """A task into whose batches another one grows, and a third one before that is not touched."""
    pure = [draw(3, turn) for turn in range(4)] + [draw(0, turn) for turn in range(10)]
    mixed = []
    for turn in range(1, 41):
        count = round(turn / 40 * 64)
        first, second = draw(0, 100 + turn), draw(1, 1100 + turn)
        order = np.random.default_rng(turn).permutation(64)
        mixed.append({key: np.concatenate([first[key][count:], second[key][:count]])[order] for key in first})
    return pure + mixed


ALARMS = "SELECT task_id, version, batch_id FROM mask_version WHERE reason LIKE 'late alarm%' ORDER BY batch_id"


@pytest.fixture
def set_back(new_store):
    """Settings of a store whose last step was a late alarm, and what the worker knew then."""
    settings = new_store()
    with worker_of(settings, batches=slow_mixture()) as worker:
        worker.load()
        while not ask(settings.state, ALARMS):
            assert worker.step()
        return settings, worker.engine.learner


def test_a_late_alarm_takes_mask_and_batches_back_in_one_transaction(set_back):
    settings, learner = set_back
    ((task, version, batch),) = ask(settings.state, ALARMS)
    bits = dict(ask(settings.state, f"SELECT version, bits FROM mask_version WHERE task_id = {task}"))
    assert bits[version] in [bits[earlier] for earlier in bits if earlier < version]
    assert ask(settings.state, f"SELECT version FROM task WHERE id = {task}") == [(version,)]
    taken_back = ask(settings.state, "SELECT id, provisional, reason FROM batch WHERE reason LIKE 'late alarm%'")
    assert len(taken_back) > 1
    assert taken_back[-1][0] == batch
    (provisional,) = {number for _, number, _ in taken_back}
    members = [m.batch.batch_id for m in learner.provisionals[provisional].members]
    assert members == [number for number, _, _ in taken_back]
    kinds = {(kind, owner) for kind, owner in ask(settings.state, _newest_decisions(members))}
    assert kinds == {("unsure", None)}


def _newest_decisions(members):
    ids = ", ".join(map(str, members))
    newest = f"SELECT max(id) FROM decision WHERE batch_id IN ({ids}) GROUP BY batch_id"
    return f"SELECT kind, task_id FROM decision WHERE id IN ({newest})"


def test_a_restart_after_a_late_alarm_goes_on_with_the_same_bits(set_back):
    settings, learner = set_back
    with worker_of(settings) as again:
        again.load()
        rebuilt = again.engine.learner
        for number, provisional in learner.provisionals.items():
            assert np.array_equal(rebuilt.provisionals[number].mask.packed, provisional.mask.packed)
            assert np.array_equal(rebuilt.provisionals[number].wins, provisional.wins)
        for number, task in learner.tasks.items():
            assert np.array_equal(rebuilt.tasks[number].packed, task.packed)
            assert rebuilt.tasks[number].reference == task.reference


def test_the_spool_keeps_what_may_be_taken_back_and_a_restart_leaves_nothing_behind(new_store):
    settings = new_store()
    with worker_of(settings, batches=slow_mixture()) as worker:
        worker.load()
        for _ in range(24):  # into the middle of a window that will be taken back
            worker.step()
            open_batches = ask(settings.state, "SELECT sha256 FROM batch WHERE state IN ('staged', 'unsure')")
            spooled = {path.name for path in (settings.state / "spool").iterdir()}
            assert spooled == {sha256 for (sha256,) in open_batches} | worker.engine.learner.guarded()
        assert worker.engine.learner.guarded()
    with worker_of(settings) as again:
        again.clean_spool()
        open_batches = ask(settings.state, "SELECT sha256 FROM batch WHERE state IN ('staged', 'unsure')")
        spooled = {path.name for path in (settings.state / "spool").iterdir()}
        assert spooled == {sha256 for (sha256,) in open_batches}


def test_lives_that_end_anywhere_leave_every_batch_of_a_slow_mixture_decided_or_waiting(new_store):
    settings = new_store()
    assert killed_lives(settings, slow_mixture(), (7, 3, 12)) > 5
    assert set(states(settings)) <= {"committed", "unsure"}


def test_a_cap_on_new_tasks_makes_the_second_one_wait(new_store):
    capped = RecognitionSettings(max_new_per_hour=1)
    settings = new_store().model_copy(update={"recognition": capped})
    with worker_of(settings, batches=[draw(task, turn) for task in (0, 1) for turn in range(4)]) as worker:
        learn_all(worker)
    assert states(settings) == ["committed"] * 4 + ["unsure"] * 4
    ((reason,),) = ask(settings.state, "SELECT reason FROM batch ORDER BY id DESC LIMIT 1")
    assert reason.endswith("it has to wait: 1 tasks were found in the last hour, at most 1 may be")


def test_what_was_given_up_undecided_may_be_sent_again_and_is_learned_then(new_store):
    """Junk of somebody else's pushes a provisional task out: its batches are not lost for good."""
    narrow = RecognitionSettings(max_provisional=1, patience_batches=1)
    settings = new_store().model_copy(update={"recognition": narrow})
    rng = np.random.default_rng(0)
    junk = [{"x": rng.random((8, 64)).astype(np.float32), "y": rng.integers(0, 5, 8)} for _ in range(4)]
    with worker_of(settings, batches=junk) as worker:
        learn_all(worker)
        given_up = [number for number, state in enumerate(states(settings)) if state == "quarantined"]
        assert given_up
        before = len(states(settings))
        stage(settings, worker.database, [junk[number] for number in given_up])
        assert set(states(settings)[before:]) == {"staged"}


def test_a_batch_whose_outcome_no_store_can_hold_stops_nobody(new_store):
    class Refusing(Database):
        @contextmanager
        def write(self):
            with super().write() as session:
                yield session
                if session.scalar(select(func.count()).where(BatchRow.id == 1, BatchRow.state == "committed")):
                    raise ValueRefused("this cannot be stored: task.accuracy: nan, a finite number expected")

    settings = new_store()
    with worker_of(settings, Refusing, [draw(0, turn) for turn in range(4)]) as worker:
        worker.load()
        stopping = threading.Event()
        thread = threading.Thread(target=worker.loop, args=(stopping,))
        thread.start()
        until(lambda: "staged" not in states(settings) and "training" not in states(settings))
        stopping.set()
        worker.notify()
        thread.join(30)
    assert "quarantined" in states(settings)
