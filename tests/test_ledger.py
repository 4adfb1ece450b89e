"""The batch ledger: which state follows which, one effect per content, nothing forgotten."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage import db, ledger, packing, tasks
from storage.db import Database, StoreError
from storage.ledger import BatchUnknown, Entry, LedgerConflict, Outcome, Rejected
from storage.models import STATES, BatchRow
from storage.tasks import TaskFields

FIELDS = TaskFields(version=1, batches=1, samples=1, density=0.5, bytes=1, reference={})
FINAL = ("scored", "committed", "duplicate", "quarantined", "retried", "dropped")
NO_BYTES = ("scored", "committed", "duplicate", "retried", "dropped")


@pytest.fixture
def store(store_target):
    db.upgrade(store_target)
    store = Database.open(store_target)
    with store.write() as session:
        assert tasks.create(session, FIELDS) == 1
    yield store
    store.close()


def entry(content, name="a.npz"):
    return Entry("folder", name, packing.sha256(content.encode()), len(content), 16, True)


def outcome(state):
    return Outcome(state, task_id=1, decision="known", reason="because")


def stage(store, content, name="a.npz"):
    with store.write() as session:
        return ledger.stage(session, entry(content, name))


def claim(store):
    with store.write() as session:
        row = ledger.claim(session)
        return row and row.id


def finish(store, batch_id, state):
    with store.write() as session:
        ledger.finish(session, batch_id, outcome(state))


def load(store, batch_id):
    with store.read() as session:
        return ledger.load_batch(session, batch_id)


def bring_to(store, state):
    """A batch in `state`, by the ways that lead there."""
    batch_id = stage(store, "the content").id
    if state == "duplicate":
        return stage(store, "the content").id
    if state == "suspended":
        crash(store, ledger.MAX_CRASHES)
    elif state != "staged":
        claim(store)
    if state in ("retried", "dropped"):
        finish(store, batch_id, "quarantined")
        with store.write() as session:
            (session.get(BatchRow, batch_id)).state = state
    elif state not in ("staged", "training", "suspended"):
        finish(store, batch_id, state)
    return batch_id


def crash(store, times):
    """The process dies so often with the oldest batch in training."""
    for _ in range(times):
        claim(store)
        with store.write() as session:
            ledger.release_claims(session, crashed=True)


def test_a_staged_batch_comes_back_as_it_came_in(store):
    row = load(store, stage(store, "abc", "sub/ä.npz").id)
    assert (row.source, row.name, row.sha256, row.size) == ("folder", "sub/ä.npz", packing.sha256(b"abc"), 3)
    assert (row.samples, row.labelled, row.state, row.attempts) == (16, True, "staged", 0)
    assert (row.task_id, row.provisional, row.decision, row.reason) == (None, None, None, None)


def test_batches_are_claimed_in_order_of_arrival(store):
    ids = [stage(store, content).id for content in "cab"]
    assert [claim(store) for _ in range(4)] == [*ids, None]
    assert ids == sorted(ids)


def test_a_released_batch_is_claimed_again_before_later_ones(store):
    first, second = stage(store, "a").id, stage(store, "b").id
    assert claim(store) == first
    with store.write() as session:
        assert ledger.release_claims(session) == 1
        assert ledger.release_claims(session) == 0
    assert [claim(store), claim(store)] == [first, second]
    assert (load(store, first).attempts, load(store, second).attempts) == (2, 1)


@pytest.mark.parametrize("state", STATES)
def test_the_same_content_has_one_effect_whatever_became_of_it(store, state):
    first = bring_to(store, state)
    again = stage(store, "the content", "b.npz")
    row = load(store, again.id)
    assert again.duplicate
    assert row.state == "duplicate"
    assert row.reason.startswith("duplicate of batch 1")
    assert again.id != first
    with store.read() as session:
        assert ledger.find_content(session, packing.sha256(b"the content")).id == 1


def test_a_duplicate_of_a_bad_batch_tells_its_reason(store):
    batch_id = bring_to(store, "quarantined")
    again = load(store, stage(store, "the content").id)
    assert again.reason == f"duplicate of batch {batch_id} (quarantined: because)"


def test_a_file_that_never_got_in_does_not_keep_its_content_out(store):
    sha256 = packing.sha256(b"abc")
    with store.write() as session:
        ids = [
            ledger.take(session, [Rejected("folder", "a.npz", "too_large", "too_large: 3", sha)])[0].id
            for sha in (sha256, sha256, None)
        ]
    assert [load(store, batch_id).state for batch_id in ids] == ["quarantined"] * 3
    assert load(store, ids[0]).sha256 == sha256
    assert not stage(store, "abc").duplicate


@pytest.mark.parametrize("target", ["unsure", "scored", "committed", "quarantined"])
@pytest.mark.parametrize("state", STATES)
def test_only_claimed_and_unsure_batches_can_be_finished(store, state, target):
    batch_id = bring_to(store, state)
    if state in ("training", "unsure"):
        finish(store, batch_id, target)
        row = load(store, batch_id)
        assert (row.state, row.task_id, row.decision, row.reason) == (target, 1, "known", "because")
    else:
        with pytest.raises(LedgerConflict, match=f"batch {batch_id} is {state}"):
            finish(store, batch_id, target)
        assert load(store, batch_id).state == state


@pytest.mark.parametrize("state", STATES)
def test_only_staged_batches_can_be_claimed_and_only_claimed_ones_released(store, state):
    bring_to(store, state)
    waiting = 1 if state in ("staged", "duplicate") else None
    with store.write() as session:
        assert ledger.release_claims(session) == (state == "training")
    if state != "training":
        assert claim(store) == waiting


def test_a_missing_batch_says_so(store):
    with pytest.raises(LedgerConflict, match="batch 99 is missing"):
        finish(store, 99, "committed")
    with pytest.raises(BatchUnknown):
        load(store, 99)


@pytest.mark.parametrize(
    ("wrong", "constraint"),
    [
        (Outcome("committed"), "committed_has_a_task"),
        (Outcome("quarantined"), "quarantined_has_a_reason"),
        (Outcome("gone"), "state_is_known"),
        (Outcome("unsure", decision="maybe"), "decision_is_known"),
        (Outcome("committed", task_id=99), "(?i)foreign key"),
    ],
)
def test_the_database_itself_refuses_a_wrong_outcome(store, wrong, constraint):
    batch_id = bring_to(store, "training")
    with pytest.raises(StoreError, match=constraint), store.write() as session:
        ledger.finish(session, batch_id, wrong)
    assert load(store, batch_id).state == "training"


def test_the_database_itself_refuses_a_second_effect_of_a_content(store):
    stage(store, "abc")
    second = stage(store, "other").id
    with pytest.raises(StoreError, match=r"(?i)unique"), store.write() as session:
        ledger.load_batch(session, second).dedupe_key = packing.sha256(b"abc")


def test_lists_are_in_order_of_arrival_and_can_be_read_in_parts(store):
    ids = [stage(store, content).id for content in ("a", "b", "a", "c")]
    with store.read() as session:
        assert [row.id for row in ledger.list_batches(session)] == ids
        assert [row.id for row in ledger.list_batches(session, limit=2)] == ids[:2]
        assert [row.id for row in ledger.list_batches(session, limit=2, after=ids[1])] == ids[2:]
        assert [row.id for row in ledger.list_batches(session, "duplicate")] == [ids[2]]


def test_unsure_batches_wait_with_their_provisional_task(store):
    batch_id = bring_to(store, "training")
    with store.write() as session:
        ledger.finish(session, batch_id, Outcome("unsure", provisional=3, decision="unsure"))
    with store.read() as session:
        assert [(row.id, row.provisional) for row in ledger.list_unsure(session)] == [(batch_id, 3)]


@pytest.mark.parametrize("state", STATES)
def test_bytes_are_needed_until_the_state_is_final(store, state):
    bring_to(store, "committed" if state == "duplicate" else state)
    with store.read() as session:
        assert bool(ledger.list_spooled(session)) == (state not in NO_BYTES)


@pytest.mark.parametrize("state", STATES)
def test_only_committed_batches_can_be_taken_back_or_given_to_another_task(store, state):
    batch_id = bring_to(store, state)
    with store.write() as session:
        other = tasks.create(session, FIELDS)
    steps = {
        "be recalled": lambda session: ledger.recall(session, batch_id, 4, "late alarm"),
        "be reassigned": lambda session: ledger.reassign(session, batch_id, other, "split from task 1"),
    }
    if state != "committed":
        before = load(store, batch_id).updated_at
        for name, step in steps.items():
            refused = pytest.raises(LedgerConflict, match=f"batch {batch_id} is {state}: it cannot {name}")
            with refused, store.write() as session:
                step(session)
        assert load(store, batch_id).updated_at == before
        return
    with store.write() as session:
        steps["be reassigned"](session)
        assert [row.id for row in ledger.list_committed(session, other)] == [batch_id]
        assert ledger.list_committed(session, other, start=batch_id + 1) == ledger.list_committed(session, 1) == []
    row = load(store, batch_id)
    assert (row.state, row.task_id, row.decision, row.reason) == ("committed", other, "known", "split from task 1")
    with store.write() as session:
        steps["be recalled"](session)
        assert ledger.list_spooled(session) == {row.sha256}
    row = load(store, batch_id)
    assert (row.state, row.task_id, row.provisional, row.decision) == ("unsure", None, 4, "unsure")
    finish(store, batch_id, "committed")


# Any order of steps, restarts among them.

STEPS = ["stage", "claim", "restart", "committed", "unsure", "quarantined", "scored"]


def check_the_sums(store, seen):
    with store.read() as session:
        counts = ledger.count_by_state(session)
        rows = ledger.list_batches(session)
        spooled = ledger.list_spooled(session)
    assert list(counts) == list(STATES)
    assert counts == {state: sum(row.state == state for row in rows) for state in STATES}
    assert len(rows) == seen
    contents = [row.sha256 for row in rows if row.state != "duplicate"]
    assert len(contents) == len(set(contents))
    assert spooled == {row.sha256 for row in rows if row.state not in NO_BYTES}


def take(store, step, seen):
    """One step, where it is possible; returns how many batches came in."""
    with store.write() as session:
        if step == "stage":
            ledger.stage(session, entry(f"content {seen % 5}"))
        elif step == "claim":
            ledger.claim(session)
        elif step == "restart":
            ledger.release_claims(session)
        else:
            for row in [*ledger.list_batches(session, "training"), *ledger.list_unsure(session)][:1]:
                ledger.finish(session, row.id, outcome(step))
    return int(step == "stage")


def finals(store):
    """Batch id -> state, of the batches whose state is final."""
    with store.read() as session:
        return {row.id: row.state for row in ledger.list_batches(session) if row.state in FINAL}


@settings(max_examples=20)
@given(steps=st.lists(st.sampled_from(STEPS), max_size=30))
def test_in_any_order_of_steps_no_batch_is_lost_and_no_content_counts_twice(tmp_path_factory, steps):
    path = tmp_path_factory.mktemp("ledger") / "supsup.db"
    db.upgrade(path)
    store = Database.open(path)
    with store.write() as session:
        tasks.create(session, FIELDS)
    seen = 0
    for step in steps:
        before = finals(store)
        seen += take(store, step, seen)
        check_the_sums(store, seen)
        assert before.items() <= finals(store).items()
    store.close()


def test_a_batch_with_which_the_process_died_again_and_again_is_suspended_and_no_other(store):
    first, second = stage(store, "a").id, stage(store, "b").id
    crash(store, ledger.MAX_CRASHES)
    row = load(store, first)
    assert (row.state, row.code, row.crashes) == ("suspended", "crashed", ledger.MAX_CRASHES)
    assert row.reason.startswith("crashed: ")
    assert load(store, second).state == "staged"
    assert claim(store) == second


def test_a_shutdown_is_no_crash_and_a_decision_ends_the_count(store):
    batch_id = stage(store, "a").id
    crash(store, ledger.MAX_CRASHES - 1)
    claim(store)
    with store.write() as session:
        ledger.release_claims(session)
    assert load(store, batch_id).crashes == ledger.MAX_CRASHES - 1
    claim(store)
    finish(store, batch_id, "unsure")
    assert load(store, batch_id).crashes == 0


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("step", ["retried", "dropped"])
def test_only_a_rejected_batch_can_be_sent_in_again_and_only_one_with_bytes_dropped(store, state, step):
    batch_id = bring_to(store, state)
    steps = {
        "retried": lambda session: ledger.retry(session, batch_id, entry("the content")),
        "dropped": lambda session: ledger.drop(session, batch_id),
    }
    if state in {"retried": ledger.REJECTED, "dropped": ledger.SPOOLED}[step]:
        with store.write() as session:
            steps[step](session)
        assert load(store, batch_id).state == step
        return
    with pytest.raises(LedgerConflict, match=f"batch {batch_id} is {state}: only "), store.write() as session:
        steps[step](session)
    assert load(store, batch_id).state == state


def test_a_batch_sent_in_again_is_a_new_one_at_the_end_that_counts_as_the_first_of_its_content(store):
    old, other = bring_to(store, "quarantined"), stage(store, "other").id
    with store.write() as session:
        new = ledger.retry(session, old, entry("the content"))
    assert (load(store, old).state, load(store, old).dedupe_key) == ("retried", None)
    assert (load(store, new).state, load(store, new).retry_of) == ("staged", old)
    assert [claim(store), claim(store)] == [other, new]
    assert load(store, stage(store, "the content").id).reason == f"duplicate of batch {new}"


def test_what_is_no_longer_the_first_of_its_content_cannot_be_sent_in_again(store):
    with store.write() as session:
        sha256 = packing.sha256(b"the content")
        rejected = ledger.take(session, [Rejected("folder", "a.npz", "too_large", "too_large: 3", sha256)])[0].id
    first = stage(store, "the content").id
    with pytest.raises(LedgerConflict, match=f"same content as batch {first}"), store.write() as session:
        ledger.retry(session, rejected, entry("the content"))
    assert load(store, rejected).state == "quarantined"


def test_bytes_are_needed_while_any_batch_needs_them(store):
    sha256 = packing.sha256(b"the content")
    with store.write() as session:
        two = [ledger.take(session, [Rejected("f", name, "x", "x: y", sha256)])[0].id for name in "ab"]
    for batch_id, needed in zip(two, (True, False), strict=True):
        with store.write() as session:
            ledger.drop(session, batch_id)
            assert ledger.is_needed(session, sha256) is needed


def test_a_delivery_has_one_batch_and_the_database_refuses_a_second(store):
    first, second = stage(store, "a").id, stage(store, "b").id
    with store.write() as session:
        ledger.sight(session, "nats", {"s:7": first})
        ledger.sight(session, "other", {"s:7": second})
    with pytest.raises(StoreError), store.write() as session:
        ledger.sight(session, "nats", {"s:7": second})
    with store.read() as session:
        assert ledger.find_sightings(session, "nats", ["s:7", "s:8"]) == {"s:7": first}
