"""Staging over a real store: bytes first, one effect for each content and each delivery, nothing rejected is lost."""

import hashlib
import os
import random
import signal
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from digits import draw
from stores import postgresql_target, tampering
from structlog.testing import capture_logs

from storage import cursors, ledger
from storage.db import CommitUnknown, Database, DiskFull, StoreUnavailable, upgrade
from storage.ledger import LedgerConflict
from storage.spool import Spool, SpoolCorrupt
from streams.batch import Arrival, Batch, BatchRejected, Refusal
from streams.decoder import InlineDecoder, ProcessDecoder, ProcessLimits
from streams.formats import FORMATS, encode
from streams.reading import Reading
from supsupd.sections import IntakeSettings
from supsupd.staging import KeyReused, QueueFull, Staging, discard

GOOD = [encode(Batch(**draw(0, seed, 8))) for seed in range(4)]
BAD = b"no batch at all"


class FailingDatabase(Database):
    """Raises what it is given, once each, instead of the next commits."""

    def __init__(self, *parts):
        super().__init__(*parts)
        self.failing = []

    @contextmanager
    def write(self):
        with super().write() as session:
            yield session
            if self.failing:
                raise self.failing.pop(0)


class Desk:
    """A staging over a new store, and what one may ask of it."""

    def __init__(self, root, target, rule="ignored", decoder=None, **settings):
        upgrade(target)
        self.target, self.database = target, FailingDatabase.open(target)
        self.spool = Spool(root / "spool")
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
def desk_of(store_target, tmp_path):
    """Makes desks over stores of one kind, each over its own."""
    made = []
    with ExitStack() as stack:

        def make(**settings):
            root = tmp_path / str(len(made))
            root.mkdir()
            if isinstance(store_target, Path):
                target = root / "supsup.db"
            else:
                target = stack.enter_context(postgresql_target()) if made else store_target
            made.append(Desk(root, target, **settings))
            stack.callback(made[-1].database.close)
            return made[-1]

        yield make


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


def test_only_so_many_unlabelled_batches_of_a_sender_wait_for_a_first_task(desk_of):
    desk = desk_of(max_queue=4)

    def post(number, sender, **labels):
        return desk.staging.submit("a.npz", "npz", encode(Batch(np.full((1, 2), number), **labels)), sender=sender)

    for number in range(2):
        staged, _ = post(number, "token 1", y=None)
        with desk.database.write() as session:
            ledger.claim(session)
            ledger.finish(session, staged.id, ledger.Outcome("unsure", decision="unsure", reason="no task yet"))
    with pytest.raises(QueueFull, match="wait for a first task"):
        post(2, "token 1", y=None)
    post(3, "token 2", y=None)
    post(4, "token 1", y=np.array([1]))  # which may become that task


def test_who_fills_the_disk_with_what_is_rejected_waits_and_nobody_else_does(desk_of):
    desk = desk_of(max_kept_bytes=100)
    junk = {f"{number}.npz": bytes([number]) * 60 for number in range(2)}
    desk.staging.make_durable([desk.staging.look_into(file(data, name)) for name, data in junk.items()])
    assert [state for _, state, _ in desk.rows()] == ["quarantined"] * 2
    room = desk.staging.room("in")
    assert (room.batches, room.kind) == (0, "kept_full")
    assert room.text.startswith("120 bytes of its batches that were rejected,")
    assert room.text.endswith("are kept, at most 100 may be: retry or drop some")
    assert desk.staging.room("elsewhere").batches > 0
    desk.staging.drop(1)
    assert desk.staging.room("in").batches > 0


def test_without_room_on_the_disk_nothing_comes_in(desk_of):
    desk = desk_of(min_free_bytes=1 << 60)
    assert desk.staging.room("in").batches == 0
    assert f"goes on from {1 << 60}" in desk.staging.room("in").text
    with pytest.raises(QueueFull, match="bytes are free"):
        desk.staging.submit("a.npz", "npz", GOOD[0])


def test_as_many_batches_and_bytes_may_wait_as_are_set(desk_of):
    for desk in (desk_of(max_queue=2), desk_of(max_spool_bytes=len(GOOD[0]) + 1)):
        assert desk.staging.room("in").batches > 0
        desk.take(message(GOOD[0], 1), message(GOOD[1], 2))
        assert desk.staging.room("in").batches == 0


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


# -- what no store can hold -------------------------------------------------------------------------------------------

LONG = "".join(random.Random(7).choices([chr(n) for n in range(0x4E00, 0x9FFF)], k=40_000))
"""Nothing compresses it: PostgreSQL's index rows take 2,704 bytes."""
HOSTILE = ["half \ud800", "nul \0", "\0" * 300, LONG, "\U0001f642" * 300, "../" * 2000, "a\nb"]


@pytest.mark.parametrize("field", ["name", "form", "key", "position", "identity"])
def test_no_word_of_a_delivery_keeps_the_others_of_its_group_out_and_each_is_seen_once(desk, field):
    hostile = [replace(message(GOOD[0], n), **{field: text}) for n, text in enumerate(HOSTILE)]
    for _ in range(2):
        staged = desk.take(message(GOOD[1], 100), *hostile, message(GOOD[2], 101))
        assert [row[1:] for row in desk.rows() if row[0] == staged[0].id] == [("staged", None)]
        assert [row[1:] for row in desk.rows() if row[0] == staged[-1].id] == [("staged", None)]
        assert len(desk.rows()) == len(HOSTILE) + 2
    for batch_id, _, code in desk.rows():
        row = desk.row(batch_id)
        assert code in (None, "unstorable", "unsupported_format")
        assert row.form in (None, *FORMATS)
        assert code is None or (len(row.reason) < 600 and "\n" not in row.reason and row.sha256 in desk.spool.names())


@pytest.mark.parametrize("field", ["name", "key", "position"])
def test_a_file_that_cannot_be_told_as_it_is_is_seen_once(desk, field):
    hostile = [replace(file(GOOD[0], f"{n}.npz"), **{field: text}) for n, text in enumerate(HOSTILE)]
    refusals = [Refusal("in", f"r{n}", "not_regular", f"not_regular: {n}", text, "1") for n, text in enumerate(HOSTILE)]
    before = [row.id for row in desk.take(*hostile, *refusals)]
    assert len(set(before)) == 2 * len(HOSTILE)
    again = desk.take(*hostile)
    assert len(desk.rows()) == 2 * len(HOSTILE) if field == "name" else all(row.id for row in again)


def test_a_refusal_of_any_words_is_recorded(desk):
    for text in HOSTILE:
        desk.take(Refusal("in", text, "not_regular", f"not_regular: {text}", text, "1"))
        desk.take(Refusal("in", "x", "c" * 40, text, "x", "1", identity=text))
    assert len(desk.rows()) == 2 * len(HOSTILE)


def test_what_was_refused_as_a_whole_can_be_sent_in_again(desk):
    desk.take(replace(message(GOOD[0], 1), name="half \ud800"))
    assert desk.rows() == [(1, "quarantined", "unstorable")]
    assert desk.staging.retry(1) == 2
    assert desk.rows()[1] == (2, "staged", None)


@pytest.mark.parametrize("error", [StoreUnavailable("away"), DiskFull("full"), CommitUnknown("who knows")])
def test_what_passes_is_no_reason_to_reject_anything(desk, error):
    looked = [desk.staging.look_into(message(payload, n)) for n, payload in enumerate(GOOD)]
    desk.database.failing.append(error)
    with pytest.raises(type(error)):
        desk.staging.make_durable(looked)
    assert desk.rows() == []
    desk.staging.make_durable(looked)
    assert [state for _, state, _ in desk.rows()] == ["staged"] * len(GOOD)


# -- senders ----------------------------------------------------------------------------------------------------------

A, B = "token 00000000000a", "token 00000000000b"


def test_two_senders_with_one_key_do_not_meet(desk):
    first, _ = desk.staging.submit("a.npz", "npz", GOOD[0], "key", A)
    other, _ = desk.staging.submit("a.npz", "npz", GOOD[1], "key", B)
    again, _ = desk.staging.submit("a.npz", "npz", GOOD[0], "key", A)
    assert (first.id != other.id, again.id, again.known) == (True, first.id, True)
    with pytest.raises(KeyReused):
        desk.staging.submit("a.npz", "npz", GOOD[1], "key", A)
    assert [desk.row(staged.id).sender for staged in (first, other)] == [A, B]


def expire_keys(desk):
    with tampering(desk.target) as run:
        run("UPDATE sighting SET expires_at = '2020-01-01 00:00:00.000000'")


@pytest.mark.parametrize("dedupe", ["content", "identity"])
def test_a_key_that_has_expired_is_a_new_delivery(desk_of, dedupe):
    desk = desk_of(dedupe=dedupe)
    first, _ = desk.staging.submit("a.npz", "npz", GOOD[0], "key", A)
    expire_keys(desk)
    other, _ = desk.staging.submit("a.npz", "npz", GOOD[1], "key", A)
    assert (other.id != first.id, other.known) == (True, False)
    expire_keys(desk)
    same, _ = desk.staging.submit("a.npz", "npz", GOOD[0], "key", A)
    assert (same.known, same.duplicate) == (False, dedupe == "content")


def test_keys_that_have_expired_go_a_few_at_a_time_and_those_of_sources_never(desk):
    desk.take(message(GOOD[3], 1))
    for number in range(ledger.FORGOTTEN + 6):
        desk.staging.submit("a.npz", "npz", GOOD[0], f"key {number}", A)
    with tampering(desk.target) as run:
        run("UPDATE sighting SET expires_at = '2020-01-01 00:00:00.000000' WHERE expires_at IS NOT NULL")
    for left in (8, 3):
        desk.staging.submit("a.npz", "npz", GOOD[0], f"new {left}", A)
        with tampering(desk.target) as run:
            assert run("SELECT count(*) FROM sighting").scalar() == left
    assert desk.take(message(GOOD[3], 1))[0].known


def test_a_batch_that_is_sent_in_again_is_still_its_senders(desk):
    staged, _ = desk.staging.submit("a.npz", "npz", GOOD[0], "key", A)
    with desk.database.write() as session:
        ledger.finish(session, ledger.claim(session).id, ledger.Outcome("quarantined", reason="bad_labels: x"))
    assert desk.row(desk.staging.retry(staged.id)).sender == A
    assert desk.staging.submit("a.npz", "npz", GOOD[0], "key", A)[0].id == staged.id


def test_what_was_given_up_undecided_may_be_sent_again_and_its_old_row_says_so(desk):
    old = reject_in_learning(desk)
    with desk.database.write() as session:
        ledger.forget_content(session, old)
    assert desk.take(message(GOOD[0], 1))[0].known  # the broker's own redelivery is still the batch that it was
    new, _ = desk.staging.submit("a.npz", "npz", GOOD[0])
    assert (new.duplicate, desk.row(new.id).state) == (False, "staged")
    with pytest.raises(LedgerConflict, match=f"batch {old} has the same content as batch {new.id}, which is staged"):
        desk.staging.retry(old)
    assert desk.row(old).state == "quarantined"


def test_who_posts_as_fast_as_may_be_leaves_room_for_every_other_one(desk_of):
    """Without end: each takes all that it gets, one after the other, and the next one still gets something."""
    desk = desk_of(max_queue=64)
    held = []
    for number in range(5):
        desk_room = desk.staging.room("socket", f"uid {number}").batches
        for turn in range(desk_room):
            payload = encode(Batch(**draw(number % 3, 1000 * number + turn, 2)))
            desk.staging.submit(f"{number}-{turn}.npz", "npz", payload, None, f"uid {number}")
        with pytest.raises(QueueFull, match="of this sender are waiting"):
            desk.staging.submit("x.npz", "npz", GOOD[0], None, f"uid {number}")
        held.append(desk_room)
    assert held[0] == 32
    assert min(held) >= 1
    assert sum(held) < 64
    assert desk.staging.room("in").batches >= 1


def test_who_holds_many_bytes_leaves_room_for_every_other_one(desk_of):
    desk = desk_of(max_spool_bytes=3 * len(GOOD[0]))
    desk.take(message(GOOD[0], 1), message(GOOD[1], 2))
    assert desk.staging.room("line-3").batches == 0
    assert desk.staging.room("in").batches > 0
