"""What is stored comes back as it was: masks and decisions once and for ever, tasks, the network, states."""

from dataclasses import replace
from datetime import timedelta

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import delete, text, update
from stores import tampering

from storage import cursors, db, decisions, ledger, masks, networks, packing, reservoir, tasks, training_states
from storage.db import Database, StoreError, verify
from storage.decisions import Decision
from storage.masks import MaskCorrupt, MaskRow, MaskUnknown
from storage.models import AppendOnlyViolation, DecisionRow, MaskVersionRow, utc_now
from storage.networks import NetworkFields
from storage.tasks import TaskFields

FIELDS = TaskFields(version=1, batches=1, samples=128, density=0.5, bytes=13, reference={"entropy": [0.1, 0.2]})
NETWORK = NetworkFields(
    architecture={"kind": "mlp", "widths": [784, 300, 100, 50]},
    seed=2**63 - 1,
    signs_sha256="a" * 64,
    normalisation={"rule": "feature"},
    classes=["cat", "dög"],
    label_kind="str",
    config={"density": 0.5},
    normalisation_data=b"\0\1",
)


@pytest.fixture
def path(store_target):
    db.upgrade(store_target)
    return store_target


@pytest.fixture
def store(path):
    store = Database.open(path)
    yield store
    store.close()


def mask(task_id, version, seed=0, n=100):
    bits = np.random.default_rng(seed).random(n) < 0.5
    return MaskRow(task_id, version, None, packing.pack(bits), n)


def new_task(store, *versions):
    with store.write() as session:
        task_id = tasks.create(session, FIELDS)
        for version in versions:
            masks.append_mask(session, mask(task_id, version, seed=version))
    return task_id


def damage(path, statement, **values):
    with tampering(path) as run:
        assert run(statement, **values).rowcount == 1


# Masks


def test_the_newest_version_is_the_head_and_every_version_stays(store):
    first, second = new_task(store, 1, 2, 3), new_task(store, 1)
    with store.read() as session:
        assert masks.list_versions(session, first) == [1, 2, 3]
        assert masks.load_heads(session) == {
            first: mask(first, 3, seed=3),
            second: mask(second, 1, seed=1),
        }
        assert masks.load_mask(session, first) == mask(first, 3, seed=3)
        assert masks.load_mask(session, first, 2) == mask(first, 2, seed=2)


def test_a_version_that_is_not_there_says_so(store):
    task_id = new_task(store, 1)
    with store.read() as session:
        assert masks.list_versions(session, 99) == []
        for missing in [(task_id, 2), (99, None)]:
            with pytest.raises(MaskUnknown, match="has no mask"):
                masks.load_mask(session, *missing)


def test_a_version_is_written_once(store):
    task_id = new_task(store, 1)
    with pytest.raises(StoreError, match=r"(?i)unique"), store.write() as session:
        masks.append_mask(session, mask(task_id, 1, seed=9))
    with store.read() as session:
        assert masks.load_mask(session, task_id) == mask(task_id, 1, seed=1)


def test_a_mask_needs_its_task_and_its_length(store):
    with pytest.raises(StoreError, match=r"(?i)foreign key"), store.write() as session:
        masks.append_mask(session, mask(99, 1))
    with pytest.raises(ValueError, match="bytes"), store.write() as session:
        masks.append_mask(session, MaskRow(1, 1, None, b"\0", 9))


@pytest.mark.parametrize(
    "change",
    [
        lambda session: setattr(session.get(MaskVersionRow, (1, 1)), "bits", b""),
        lambda session: session.delete(session.get(MaskVersionRow, (1, 1))),
        lambda session: session.execute(update(MaskVersionRow).values(density=0)),
        lambda session: session.execute(delete(MaskVersionRow)),
        lambda session: setattr(session.get(DecisionRow, 1), "kind", "known"),
        lambda session: session.execute(delete(DecisionRow)),
    ],
)
def test_masks_and_decisions_are_append_only(store, change):
    task_id = new_task(store, 1)
    with store.write() as session:
        batch_id = ledger.take(session, [ledger.Rejected("folder", "a.npz", "empty", "empty")])[0].id
        decisions.record(session, batch_id, Decision("new", task_id, {}))
    with pytest.raises(AppendOnlyViolation, match="written once"), store.write() as session:
        change(session)
    with store.read() as session:
        assert masks.load_heads(session) == {task_id: mask(task_id, 1, seed=1)}
        assert decisions.list_for_batch(session, batch_id)[0].kind == "new"


@pytest.mark.parametrize(
    ("statement", "value", "reason"),
    [
        ("UPDATE mask_version SET bits = :value", mask(1, 1, seed=7).bits, "another SHA-256"),
        ("UPDATE mask_version SET bits = :value", b"\0" * 12, "bytes"),
        ("UPDATE mask_version SET bits = :value", b"\xff" * 13, "more than the 100 weights"),
        ("UPDATE mask_version SET sha256 = :value", "0" * 64, "another SHA-256"),
        ("UPDATE mask_version SET nbits = :value", 99, "density"),
        ("UPDATE mask_version SET statistics = :value", b"\0" * 8, "another SHA-256"),
        ("UPDATE mask_version SET statistics = :value", b"\0", "float32"),
        ("UPDATE mask_version SET density = :value", 0.25, "density"),
    ],
)
def test_a_corrupt_mask_is_found_and_never_given_out(path, store, statement, value, reason):
    task_id = new_task(store, 1)
    damage(path, statement, value=value)
    with store.read() as session:
        for load in (lambda: masks.load_mask(session, task_id), lambda: masks.load_heads(session)):
            with pytest.raises(MaskCorrupt, match=rf"task {task_id}, version 1: .*{reason}"):
                load()
    assert len(verify(path)) == 1
    assert f"mask of task {task_id}, version 1" in verify(path)[0]


@settings(max_examples=25)
@given(st.integers(0, 12), st.integers(0, 7))
def test_every_flipped_bit_is_found(byte, bit):
    good = mask(1, 1)
    bits = bytearray(good.bits)
    bits[byte] ^= 1 << bit
    row = MaskVersionRow(
        task_id=1,
        version=1,
        batch_id=None,
        bits=bytes(bits),
        nbits=100,
        sha256=good.sha256,
        density=good.density,
    )
    with pytest.raises(MaskCorrupt):
        masks._verified(row)


def test_a_mask_comes_back_with_all_that_was_stored_with_it(store):
    statistics = np.arange(6, dtype=np.float32).tobytes()
    plain = mask(new_task(store), 1)
    full = replace(plain, statistics=statistics, reason="split from task 3", reference={"errors": 0.1})
    with store.write() as session:
        masks.append_mask(session, full)
    with store.read() as session:
        loaded = masks.load_mask(session, full.task_id)
    assert loaded == full
    assert loaded.packed == plain.bits + statistics
    assert (loaded.density, loaded.sha256 != plain.sha256) == (plain.density, True)


def test_density_counts_weights_not_the_bits_that_fill_up_a_byte():
    rows = packing.pack(np.array([True, True, False])) + packing.pack(np.array([True, False, False]))
    assert MaskRow(1, 1, None, rows, nbits=6).density == 0.5


def test_the_version_before_a_batch_is_the_last_that_no_later_batch_touched(store):
    task_id = new_task(store)
    with store.write() as session:
        for content in range(9):
            ledger.stage(session, ledger.Entry("folder", "a", packing.sha256(bytes([content])), 1, 1, True))
        for version, batch in enumerate([2, 3, 7, None, 5, 8], start=1):
            masks.append_mask(session, replace(mask(task_id, version), batch_id=batch))
    with store.read() as session:
        before = [masks.find_before(session, task_id, batch) for batch in range(1, 11)]
    assert before == [None, None, 1, 2, 2, 2, 2, 5, 6, 6]


# Tasks


def test_a_task_comes_back_as_it_was_made(store):
    task_id = new_task(store)
    with store.read() as session:
        row = tasks.get_task(session, task_id)
    assert row.name == f"task-{task_id}"
    assert (row.version, row.batches, row.samples, row.density, row.bytes) == (1, 1, 128, 0.5, 13)
    assert row.reference == {"entropy": [0.1, 0.2]}
    assert (row.accuracy, row.entropy, row.statistics) == (None, None, None)
    assert abs(utc_now() - row.created_at) < timedelta(minutes=1)


def test_an_update_replaces_what_is_known_and_nothing_else(store):
    task_id, other = new_task(store), new_task(store)
    changed = TaskFields(2, 2, 256, 0.4, 13, {"entropy": []}, accuracy=0.9, entropy=0.1)
    with store.write() as session:
        tasks.rename(session, task_id, "digits")
        tasks.update(session, task_id, changed)
    with store.read() as session:
        row, untouched = tasks.list_tasks(session)
    assert (row.id, row.name, row.version, row.accuracy) == (task_id, "digits", 2, 0.9)
    assert row.last_seen_at >= row.created_at
    assert (untouched.id, untouched.version) == (other, 1)


@pytest.mark.parametrize("name", ["", "a b", "ä", "x" * 65, "a/b", "a\n"])
def test_a_name_has_letters_digits_and_little_else(store, name):
    task_id = new_task(store)
    with pytest.raises(tasks.NameInvalid), store.write() as session:
        tasks.rename(session, task_id, name)


def test_a_name_belongs_to_one_task(store):
    first, second = new_task(store), new_task(store)
    with store.write() as session:
        tasks.rename(session, first, "digits")
        tasks.rename(session, first, "digits")
    with pytest.raises(tasks.NameTaken), store.write() as session:
        tasks.rename(session, second, "digits")


def test_a_default_name_is_always_free_for_its_task(store):
    task_id = new_task(store)
    with pytest.raises(tasks.NameTaken), store.write() as session:
        tasks.rename(session, task_id, f"task-{task_id + 1}")
    with store.write() as session:
        tasks.rename(session, task_id, "mine")
        tasks.rename(session, task_id, f"task-{task_id}")
    new_task(store)


def test_an_unknown_task_says_so(store):
    with store.write() as session:
        assert tasks.get_task(session, 99) is None
        with pytest.raises(tasks.TaskUnknown):
            tasks.rename(session, 99, "name")
        with pytest.raises(tasks.TaskUnknown):
            tasks.update(session, 99, FIELDS)


def test_the_id_of_a_lost_task_is_not_given_again(path, store):
    task_id = new_task(store)
    damage(path, "DELETE FROM task WHERE id = :id", id=task_id)
    assert new_task(store) == task_id + 1


def test_a_retired_task_is_listed_only_if_asked_and_comes_back_as_it_was(store):
    first, second = new_task(store, 1), new_task(store, 1)
    with store.write() as session:
        tasks.retire(session, first)
        assert [row.id for row in tasks.list_tasks(session)] == [second]
        assert [row.id for row in tasks.list_tasks(session, retired=True)] == [first, second]
        with pytest.raises(tasks.TaskConflict, match=f"task {first} is retired"):
            tasks.retire(session, first)
        tasks.reopen(session, first)
        assert [row.id for row in tasks.list_tasks(session)] == [first, second]
        with pytest.raises(tasks.TaskConflict, match="is not retired"):
            tasks.reopen(session, first)
        with pytest.raises(tasks.TaskUnknown):
            tasks.retire(session, 99)


def test_a_merged_task_is_answered_for_by_id_name_and_key_at_any_remove(store):
    first, second, third, other = (new_task(store, 1) for _ in range(4))
    with store.write() as session:
        tasks.rename(session, third, "digits")
        tasks.set_key(session, third, "c")
        tasks.merge(session, second, third)
        merged = tasks.merge(session, first, second)
        assert (merged.batches, merged.samples) == (3, 3 * 128)
        for reference in (first, second, third, "digits", "c", f"task-{second}", f"{third}", f"id:{second}", "key:c"):
            assert tasks.resolve(session, reference).id == first
        assert [row.id for row in tasks.list_merged(session, first)] == [second, third]
        assert [row.id for row in tasks.list_tasks(session)] == [first, other]
        assert tasks.find_key(session, "c").id == first


def test_a_merge_that_makes_no_sense_is_refused(store):
    first, second, third = (new_task(store, 1) for _ in range(3))
    with store.write() as session:
        tasks.merge(session, first, second)
        for pair, why in [((first, first), "itself"), ((third, second), "was merged"), ((second, first), "was merged")]:
            with pytest.raises(tasks.TaskConflict, match=why):
                tasks.merge(session, *pair)
        with pytest.raises(tasks.TaskConflict, match=f"was merged into task {first}"):
            tasks.reopen(session, second)


@pytest.mark.parametrize(
    "change",
    ["merged_into = id, retired_at = created_at", "merged_into = 2", "merged_into = 99, retired_at = created_at"],
)
def test_the_database_itself_refuses_a_wrong_merge(store, change):
    task_id = new_task(store)
    new_task(store)
    with pytest.raises(StoreError, match=r"CHECK|check|FOREIGN|foreign"), store.write() as session:
        session.execute(text(f"UPDATE task SET {change} WHERE id = {task_id}"))


def test_a_text_that_means_several_tasks_is_refused_unless_it_says_which(store):
    first, second = new_task(store), new_task(store)
    with store.write() as session:
        tasks.set_key(session, first, f"{second}")
        with pytest.raises(tasks.TaskAmbiguous, match=f"means tasks {first} and {second}"):
            tasks.resolve(session, f"{second}")
        assert tasks.resolve(session, f"key:{second}").id == first
        assert tasks.resolve(session, f"id:{second}").id == second
        assert tasks.resolve(session, second).id == second
        with pytest.raises(tasks.NameTaken, match="the key"):
            tasks.set_key(session, second, f"{second}")
        for unknown in (99, "99", "nobody", "id:x", "", "key:"):
            with pytest.raises(tasks.TaskUnknown, match="there is no task"):
                tasks.resolve(session, unknown)


# The network


def test_the_network_is_written_once_and_comes_back_as_it_was(store):
    with store.write() as session:
        assert networks.get_network(session) is None
        networks.save_network(session, NETWORK)
    with pytest.raises(networks.NetworkExists), store.write() as session:
        networks.save_network(session, NETWORK)
    with store.read() as session:
        row = networks.get_network(session)
    assert {name: getattr(row, name) for name in NETWORK.__slots__} == {
        name: getattr(NETWORK, name) for name in NETWORK.__slots__
    }


def test_the_class_list_only_grows(store):
    with pytest.raises(networks.NetworkUnknown), store.write() as session:
        networks.extend_classes(session, ["cat"])
    with store.write() as session:
        networks.save_network(session, NETWORK)
        networks.extend_classes(session, ["cat", "dög", "ant"])
    for shrunk in (["cat"], ["dög", "cat", "ant"]):
        with pytest.raises(ValueError, match="grow"), store.write() as session:
            networks.extend_classes(session, shrunk)
    with store.read() as session:
        assert networks.get_network(session).classes == ["cat", "dög", "ant"]


# Decisions, cursors, training states


def test_decisions_keep_their_evidence_and_their_order(store):
    task_id = new_task(store)
    with store.write() as session:
        batch_id = ledger.take(session, [ledger.Rejected("folder", "a.npz", "empty", "empty")])[0].id
        decisions.record(session, batch_id, Decision("unsure", None, {"z": [1.5, None], "why": "köder"}, "because"))
        for kind in ("new", "known", "known"):
            decisions.record(session, batch_id, Decision(kind, task_id, {}))
    with store.read() as session:
        assert [row.kind for row in decisions.list_for_batch(session, batch_id)] == [
            "unsure",
            "new",
            "known",
            "known",
        ]
        assert decisions.list_for_batch(session, batch_id)[0].evidence == {"z": [1.5, None], "why": "köder"}
        assert decisions.list_for_batch(session, batch_id)[0].reason == "because"
        newest = decisions.list_for_task(session, task_id, limit=2)
        assert [row.kind for row in newest] == ["known", "known"]
        assert newest[0].id > newest[1].id
        assert len(decisions.list_for_task(session, task_id)) == 3


def test_a_cursor_moves_and_belongs_to_its_source(store):
    with store.write() as session:
        for source, key, position in [("a", "x", "1"), ("a", "y", "1"), ("b", "x", "7"), ("a", "x", "2")]:
            cursors.advance(session, source, key, position)
    with store.read() as session:
        assert cursors.load_cursors(session, "a") == {"x": "2", "y": "1"}
        assert cursors.load_cursors(session, "b") == {"x": "7"}
        assert cursors.load_cursors(session, "c") == {}


def test_the_most_recently_saved_states_are_kept(store):
    first, second, third = (new_task(store) for _ in range(3))
    with store.write() as session:
        for version, task_id in enumerate([first, second, third, first]):
            training_states.save(session, task_id, version, bytes([version]))
    with store.write() as session:
        training_states.keep_recent(session, 2)
    with store.read() as session:
        states = training_states.load_states(session)
    assert [(row.task_id, row.version, row.payload) for row in states] == [
        (first, 3, b"\3"),
        (third, 2, b"\2"),
    ]
    with store.write() as session:
        training_states.keep_recent(session, 0)
        assert training_states.load_states(session) == []


def test_the_state_of_a_retired_task_waits_and_takes_no_place(store):
    ids = [new_task(store) for _ in range(4)]
    with store.write() as session:
        for task_id in ids:
            training_states.save(session, task_id, 1, b"s")
        tasks.retire(session, ids[1])
        training_states.keep_recent(session, 2)
        assert [row.task_id for row in training_states.load_states(session)] == [ids[3], ids[2]]
        assert training_states.get_payload(session, ids[1]) == b"s"
        tasks.reopen(session, ids[1])
        training_states.touch(session, ids[1])
        training_states.forget(session, ids[3])
        training_states.forget(session, ids[0])
        assert [row.task_id for row in training_states.load_states(session)] == [ids[1], ids[2]]


# The reservoir


def test_a_reservoir_comes_back_bit_for_bit_and_damage_is_found(path, store):
    first, second = new_task(store), new_task(store)
    matrices = [reservoir.Matrix(layer, 2, 2, bytes([layer]) * 32) for layer in (0, 1)]
    with store.write() as session:
        for matrix in reversed(matrices):
            reservoir.save_matrix(session, replace(matrix, patterns=1))
            reservoir.save_matrix(session, matrix)
        for task_id in (first, second, first):
            reservoir.add_pattern(session, task_id, 3)
    with store.read() as session:
        assert reservoir.load_matrices(session) == matrices
        assert [pattern.task_id for pattern in reservoir.list_patterns(session)] == [second, first]
    with store.write() as session:
        reservoir.remove_pattern(session, second)
        assert reservoir.list_patterns(session) == [reservoir.Pattern(first, 3)]
    assert verify(path) == []
    damage(path, "UPDATE reservoir SET matrix = :matrix WHERE layer = 1", matrix=b"\0" * 32)
    assert "layer 1" in verify(path)[0]
    with store.read() as session, pytest.raises(reservoir.ReservoirCorrupt, match="layer 1"):
        reservoir.load_matrices(session)
