"""The judge finds every kind of wrong that it is there for, and none where there is none."""

import hashlib
import shutil

import pytest
from daemon_process import ask, edit, what_was_learned
from digits import draw
from oracle import Given, violations

from storage import ledger
from storage.db import Database, upgrade
from storage.spool import Spool
from streams.batch import Batch
from streams.formats import encode
from supsupd.config import Settings
from supsupd.learning.device import pick_device
from supsupd.sections import NetworkSettings
from supsupd.worker import Worker

STREAM = "AAAABBBB"


@pytest.fixture(scope="module")
def lived(tmp_path_factory):
    """A state that has learned two tasks, scored one batch and rejected one; and what was accepted."""
    root = tmp_path_factory.mktemp("lived")
    (root / "watch").mkdir()
    network = NetworkSettings(hidden=[30])
    settings = Settings(watch=[root / "watch"], state=root / "state", socket=root / "sock", network=network)
    upgrade(settings.store)
    database, spool = Database.open(settings.store), Spool(settings.state / "spool")
    batches = [draw(ord(task), turn) for turn, task in enumerate(STREAM)]
    batches += [{"x": draw(ord("A"), 99)["x"]}, {"x": draw(ord("A"), 98)["x"][:, :9], "y": draw(ord("A"), 98)["y"]}]
    accepted = []
    for turn, batch in enumerate(batches):
        payload = encode(Batch(batch["x"], batch.get("y")))
        accepted.append(Given(f"{turn}.npz", hashlib.sha256(payload).hexdigest(), "test"))
        spool.store({accepted[-1].sha256: payload})
        entry = ledger.Entry("test", accepted[-1].name, accepted[-1].sha256, len(payload), 64, "y" in batch)
        with database.write() as session:
            ledger.stage(session, entry)
    worker = Worker(settings, database, spool, pick_device("cpu"))
    worker.load()
    while worker.step():
        pass
    database.close()
    return settings.state, accepted


@pytest.fixture
def state(lived, tmp_path):
    return shutil.copytree(lived[0], tmp_path / "state")


def test_a_sound_state_has_no_violations(lived):
    state, accepted = lived
    assert {row[0] for row in ask(state, "SELECT state FROM batch")} == {"committed", "scored", "quarantined"}
    counts = dict(ask(state, "SELECT state, count(*) FROM batch GROUP BY state")) | {"staged": 0}
    assert violations(state, accepted, what_was_learned(state), status={"batches": counts}) == []


SOME = "(SELECT max(id) FROM batch WHERE state = 'committed')"
NEWEST = "(SELECT max(version) FROM mask_version WHERE task_id = 1)"
FIRST_AGAIN = (
    "INSERT INTO batch (source, name, sha256, size, state, task_id, attempts, created_at, updated_at, crashes)"
    " SELECT source, name, sha256, size, 'committed', 1, 1, created_at, updated_at, 0 FROM batch WHERE id = 1"
)
PLANTED = {
    "lost": f"UPDATE batch SET name = 'other' WHERE id = {SOME}",
    "takes effect in 2 rows": FIRST_AGAIN,
    "made 2 versions of task 1": f"UPDATE mask_version SET batch_id = 2 WHERE task_id = 1 AND version <= {NEWEST}",
    "its newest mask is": f"DELETE FROM mask_version WHERE task_id = 1 AND version = {NEWEST}",
    "at version": "UPDATE task SET version = version + 1 WHERE id = 1",
    "nothing says why": f"DELETE FROM decision WHERE batch_id = {SOME}",
    "is scored": "UPDATE batch SET state = 'scored' WHERE id = (SELECT max(batch_id) FROM mask_version)",
    "left over": f"UPDATE batch SET state = 'dropped' WHERE id = {SOME}",
    "network: ": "UPDATE network SET created_at = 'never'",
    "refers to a missing row": "UPDATE mask_version SET batch_id = 999 WHERE task_id = 1",
    "mask of task 1": f"UPDATE mask_version SET bits = zeroblob(length(bits)) WHERE task_id = 1 AND version = {NEWEST}",
    "bytes missing": "UPDATE batch SET state = 'staged' WHERE state = 'scored'",
    "different: ledger": f"UPDATE batch SET decision = 'unsure' WHERE id = {SOME}",
    "different: training": "UPDATE training_state SET payload = zeroblob(9)",
    "missing: ": "DROP INDEX ix_batch_sha256",
}


@pytest.mark.parametrize("found", PLANTED)
def test_a_violation_in_the_store_is_found(lived, state, found):
    if found == "left over":  # its bytes too
        (digest,) = ask(state, f"SELECT sha256 FROM batch WHERE id = {SOME}")[0]
        (state / "spool" / digest).write_bytes(b"")
    edit(state, PLANTED[found])
    problems = violations(state, lived[1], what_was_learned(lived[0]))
    assert any(found in problem for problem in problems), problems


def test_an_order_that_is_not_that_of_the_source_is_found(lived):
    state, (first, second, *rest) = lived
    other = [Given(name, sha256, "another source") for name, sha256, _ in (second, first)]
    assert violations(state, [second, first, *rest]) == ["out of order: 0.npz is batch 1, what came before it 2"]
    assert violations(state, [*rest, first]) != []
    assert violations(state, [*rest, other[1]]) == []


def test_what_lies_in_the_spool_for_nobody_is_found_once_the_daemon_has_started(lived, state):
    for name in ("ab.tmp", "0" * 64):
        (state / "spool" / name).write_bytes(b"")
    assert violations(state, lived[1], killed=True) == []
    found = violations(state, lived[1])
    assert sorted(found) == [f"left over: spool/{'0' * 64}", "left over: spool/ab.tmp"]


def test_bytes_that_are_damaged_or_missing_are_found(lived, state):
    (digest,) = ask(state, "SELECT sha256 FROM batch WHERE state = 'quarantined'")[0]
    (state / "spool" / digest).write_bytes(b"not these")
    assert violations(state, killed=True) == [f"bytes damaged: spool/{digest}"]
    (state / "spool" / digest).unlink()
    assert violations(state, killed=True) == [f"bytes missing: spool/{digest}"]


def test_a_status_that_does_not_add_up_and_a_traceback_are_found(lived, tmp_path):
    log = tmp_path / "log"
    log.write_text(
        '{"event": "fine"}\n{"event": "learning_failed", "exception": "Traceback (most recent call last):"}\n'
    )
    problems = violations(lived[0], status={"batches": {"committed": 1}}, log=log)
    assert [problem.partition(":")[0] for problem in problems] == ["miscounted", "a traceback in the log"]
