"""Staging over a real store: bytes first, one effect for each content and each delivery, nothing rejected is lost."""

import hashlib
import os
import signal
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest
from digits import draw
from structlog.testing import capture_logs

from storage import cursors, ledger
from storage.db import Database, upgrade
from storage.ledger import LedgerConflict
from storage.spool import Spool, SpoolCorrupt
from streams.batch import Arrival, Batch, BatchRejected, Refusal
from streams.decoder import InlineDecoder, ProcessDecoder, ProcessLimits
from streams.formats import encode
from streams.reading import Reading
from supsupd.sections import IntakeSettings
from supsupd.staging import KeyReused, QueueFull, Staging, discard

GOOD = [encode(Batch(**draw(0, seed, 8))) for seed in range(4)]
BAD = b"no batch at all"


class Desk:
    """A staging over a new store, and what one may ask of it."""

    def __init__(self, root, rule="ignored", decoder=None, **settings):
        upgrade(root / "state" / "supsup.db")
        self.database = Database.open(root / "state" / "supsup.db")
        self.spool = Spool(root / "state" / "spool")
        decoder = decoder or InlineDecoder(Reading(with_task=rule != "ignored"))
        settings = {"min_free_bytes": 0, **settings}
        self.staging = Staging(self.database, self.spool, IntakeSettings(**settings), decoder, rule)

    def take(self, *items):
        return self.staging.make_durable([self.staging.look_into(item) for item in items])

    def rows(self):
        with self.database.read() as session:
            return [(row.id, row.state, row.code) for row in ledger.list_batches(session)]

    def row(self, batch_id):
        with self.database.read() as session:
            return ledger.load_batch(session, batch_id)

    def cursors(self, source):
        with self.database.read() as session:
            return cursors.load_cursors(session, source)


@pytest.fixture
def desk_of(tmp_path):
    made = []

    def make(**settings):
        made.append(Desk(tmp_path / str(len(made)), **settings))
        return made[-1]

    yield make
    for desk in made:
        desk.database.close()


@pytest.fixture
def desk(desk_of):
    return desk_of()


def sha256(payload):
    return hashlib.sha256(payload).hexdigest()


def message(payload, sequence, source="line-3"):
    return Arrival(source, f"S/{sequence}", "npz", sha256(payload), payload, "S", str(sequence), f"S:{sequence}")


def file(payload, name="a.npz"):
    return Arrival("in", name, "npz", sha256(payload), payload, name, sha256(payload))


def test_a_group_is_one_row_each_with_bytes_deliveries_and_cursors(desk):
    junk = Refusal("line-3", "x", "not_regular", "not_regular: x", "x", "1")
    staged = desk.take(message(GOOD[0], 7), message(BAD, 8), junk)
    assert [row.id for row in staged] == [1, 2, 3]
    assert desk.rows() == [(1, "staged", None), (2, "quarantined", "bad_format"), (3, "quarantined", "not_regular")]
    assert desk.spool.names() == {sha256(GOOD[0]), sha256(BAD)}
    assert desk.spool.load(sha256(BAD)) == BAD
    assert desk.cursors("line-3") == {"S": "8", "x": "1"}


@pytest.mark.parametrize("payload", [GOOD[0], BAD])
def test_a_delivery_that_comes_again_is_the_batch_that_it_was(desk, payload):
    (first,) = desk.take(message(payload, 7))
    again, within, other = desk.take(message(payload, 7), message(GOOD[1], 9), message(GOOD[1], 9))
    assert (again.id, again.known, within.known, other.known) == (first.id, True, False, True)
    assert other.id == within.id
    assert len(desk.rows()) == 2


def test_other_bytes_under_an_identity_that_came_before_are_warned_of(desk):
    with capture_logs() as logs:
        desk.take(message(GOOD[0], 7))
        desk.take(message(GOOD[0], 7))
        assert [line["event"] for line in logs if line["log_level"] == "warning"] == []
        desk.take(message(GOOD[1], 7), message(GOOD[2], 8))
    assert [line["batch"] for line in logs if line["event"] == "id_reused"] == [1]


def test_a_delivery_that_comes_late_does_not_take_the_cursor_back(desk):
    desk.take(message(GOOD[0], 7), message(GOOD[1], 8))
    desk.take(message(GOOD[0], 7))
    assert desk.cursors("line-3") == {"S": "8"}


def test_equal_content_is_one_batch_and_the_others_are_seen(desk):
    staged = desk.take(message(GOOD[0], 1), message(GOOD[0], 2)) + desk.take(file(GOOD[0]))
    assert [row.duplicate for row in staged] == [False, True, True]
    assert [row.first for row in staged] == [None, 1, 1]
    assert [state for _, state, _ in desk.rows()] == ["staged", "duplicate", "duplicate"]


def test_by_identity_equal_content_may_come_as_often_as_it_is_delivered(desk_of):
    desk = desk_of(dedupe="identity")
    staged = desk.take(message(GOOD[0], 1), message(GOOD[0], 2), message(GOOD[0], 2)) + desk.take(file(GOOD[0]))
    assert [row.duplicate for row in staged] == [False] * 4
    assert [state for _, state, _ in desk.rows()] == ["staged"] * 3


def test_bytes_go_when_the_last_batch_that_needs_them_is_done(desk_of):
    desk = desk_of(dedupe="identity")
    desk.take(message(GOOD[0], 1), message(GOOD[0], 2))
    for left in (1, 0):
        with desk.database.write() as session:
            row = ledger.claim(session)
            ledger.finish(session, row.id, ledger.Outcome("scored"))
        discard(desk.database, desk.spool, [sha256(GOOD[0])])
        assert len(desk.spool.names()) == left


def test_what_was_submitted_twice_is_the_first_batch(desk):
    first, digest = desk.staging.submit("a.npz", "npz", GOOD[0])
    again, same = desk.staging.submit("b.npz", "npz", GOOD[0])
    assert (again.duplicate, again.first, digest) == (True, first.id, same)


def test_an_idempotency_key_is_one_batch_and_never_another(desk):
    first, _ = desk.staging.submit("a.npz", "npz", GOOD[0], "key")
    again, _ = desk.staging.submit("a.npz", "npz", GOOD[0], "key")
    assert (again.id, again.known, len(desk.rows())) == (first.id, True, 1)
    with pytest.raises(KeyReused, match=f"batch {first.id} came with this idempotency key and other bytes"):
        desk.staging.submit("a.npz", "npz", GOOD[1], "key")
    assert len(desk.rows()) == 1


def test_a_key_that_comes_again_is_answered_as_before_also_where_its_bytes_were_known(desk):
    first, _ = desk.staging.submit("a.npz", "npz", GOOD[0])
    answers = [desk.staging.submit("b.npz", "npz", GOOD[0], "key")[0] for _ in range(3)]
    assert [(answer.first, answer.duplicate) for answer in answers] == [(first.id, True)] * 3
    with pytest.raises(KeyReused):
        desk.staging.submit("b.npz", "npz", GOOD[1], "key")


def test_a_submitted_batch_that_is_refused_leaves_nothing(desk):
    with pytest.raises(BatchRejected, match="bad_format"):
        desk.staging.submit("a.npz", "npz", BAD)
    assert (desk.rows(), desk.spool.names()) == ([], set())


def test_without_room_on_the_disk_nothing_comes_in(desk_of):
    desk = desk_of(min_free_bytes=1 << 60)
    assert desk.staging.room().batches == 0
    assert f"goes on from {1 << 60}" in desk.staging.room().disk
    with pytest.raises(QueueFull, match="bytes are free"):
        desk.staging.submit("a.npz", "npz", GOOD[0])


def test_as_many_batches_and_bytes_may_wait_as_are_set(desk_of):
    for desk in (desk_of(max_queue=2), desk_of(max_spool_bytes=len(GOOD[0]) + 1)):
        assert desk.staging.room().batches > 0
        desk.take(message(GOOD[0], 1), message(GOOD[1], 2))
        assert desk.staging.room().batches == 0


# -- rejected batches -------------------------------------------------------------------------------------------------


def reject_in_learning(desk, payload=GOOD[0]):
    """As the learner does with a batch that does not fit."""
    desk.take(message(payload, 1))
    with desk.database.write() as session:
        row = ledger.claim(session)
        ledger.finish(session, row.id, ledger.Outcome("quarantined", reason="schema_mismatch: 64 inputs, 784 expected"))
    return row.id


def test_a_rejected_batch_can_be_sent_in_again(desk):
    old = reject_in_learning(desk)
    new = desk.staging.retry(old)
    assert desk.rows() == [(old, "retried", "schema_mismatch"), (new, "staged", None)]
    assert desk.row(new).retry_of == old
    assert (desk.row(new).samples, desk.row(new).labelled) == (8, True)
    with pytest.raises(LedgerConflict, match=f"batch {old} is retried"):
        desk.staging.retry(old)


def test_what_is_slow_to_look_into_again_keeps_nobody_from_handing_in(desk_of):
    with closing(ProcessDecoder(Reading(), ProcessLimits(processes=2))) as decoder:
        desk = desk_of(decoder=decoder)
        old = reject_in_learning(desk)
        (stopped,) = decoder.pids
        os.kill(stopped, signal.SIGSTOP)  # whoever gets this one decodes for ever
        with ThreadPoolExecutor(2) as pool:
            asked = [pool.submit(desk.staging.retry, old), pool.submit(desk.staging.submit, "new", "npz", GOOD[1])]
            _, held = wait(asked, timeout=20, return_when=FIRST_COMPLETED)
            os.kill(stopped, signal.SIGCONT)
            assert len(held) == 1
            for one in asked:
                one.result()
        assert [state for _, state, _ in desk.rows()] == ["retried", "staged", "staged"]


def test_what_is_still_no_batch_is_refused_again_and_stays_as_it_was(desk):
    desk.take(message(BAD, 1))
    with pytest.raises(BatchRejected, match="bad_format"):
        desk.staging.retry(1)
    assert desk.rows() == [(1, "quarantined", "bad_format")]


def test_what_was_refused_unread_cannot_be_sent_in_again(desk):
    desk.take(Refusal("in", "x", "too_large", "too_large: x", "x", "1"))
    with pytest.raises(LedgerConflict, match="refused unread"):
        desk.staging.retry(1)


def test_a_rejected_batch_whose_bytes_are_damaged_says_so(desk):
    old = reject_in_learning(desk)
    (desk.spool.root / sha256(GOOD[0])).write_bytes(b"other")
    with pytest.raises(SpoolCorrupt, match="spool_corrupt: "):
        desk.staging.retry(old)


def test_dropping_removes_the_bytes_and_keeps_the_row(desk):
    desk.take(message(BAD, 1), message(BAD, 2))
    for batch_id, left in ((1, 1), (2, 0)):
        desk.staging.drop(batch_id)
        assert len(desk.spool.names()) == left
    assert desk.rows() == [(1, "dropped", "bad_format"), (2, "dropped", "bad_format")]


# -- tasks that are told ----------------------------------------------------------------------------------------------


def test_the_same_samples_in_two_task_folders_are_two_batches(desk_of):
    desk = desk_of(rule="labelled")
    items = [replace(file(GOOD[0], name)) for name in ("line1/a.npz", "line2/a.npz", "line2/b.npz")]
    assert [row.duplicate for row in desk.take(*items)] == [False, False, True]
    assert [desk.row(number).given_task for number in (1, 2)] == ["line1", "line2"]


def test_a_file_that_may_yet_grow_is_not_refused_for_being_cut(desk):
    cut = replace(file(GOOD[0][:-30]), may_grow=True)
    assert desk.staging.look_into(cut).is_cut
    assert not desk.staging.look_into(replace(cut, may_grow=False)).is_cut
    assert not desk.staging.look_into(replace(file(BAD), may_grow=True)).is_cut


def test_values_that_are_not_finite_are_kept_for_whoever_looks(desk):
    payload = encode(Batch(np.full((4, 3), np.nan), None))
    desk.take(message(payload, 1))
    assert desk.rows() == [(1, "quarantined", "non_finite")]
    assert desk.spool.load(sha256(payload)) == payload
