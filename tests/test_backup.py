"""Backup, restore and prune: the same rows and bytes come back in either kind of store, or nothing changes."""

import json
import os
import stat
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest
from digits import draw
from stores import postgresql_target, tampering

from storage import (
    backup,
    copying,
    cursors,
    db,
    decisions,
    gaps,
    ledger,
    masks,
    packing,
    pruning,
    reservoir,
    tasks,
    training_states,
)
from storage.backends import backend_of
from storage.db import Database, SchemaMismatch, StoreError, verify
from storage.decisions import Decision
from storage.ledger import Entry, Outcome
from storage.masks import MaskRow
from storage.spool import Spool
from storage.tasks import TaskFields
from streams.batch import Arrival, Batch
from streams.decoder import InlineDecoder
from streams.formats import encode
from streams.reading import Reading
from supsupd.sections import IntakeSettings
from supsupd.staging import Staging

FIELDS = TaskFields(version=1, batches=1, samples=1, density=0.5, bytes=1, reference={"entropy": [0.1, None]})


@pytest.fixture
def state(tmp_path):
    (tmp_path / "state").mkdir(exist_ok=True)
    return tmp_path / "state"


@pytest.fixture
def target(store_target):
    db.upgrade(store_target)
    return store_target


@pytest.fixture
def other(request, target, tmp_path):
    """A place for a second store, of the other kind."""
    if isinstance(target, Path):
        with postgresql_target() as url:
            yield url
    else:
        yield tmp_path / "restored" / "supsup.db"


def stage(store, spool, content):
    sha256 = packing.sha256(content)
    spool.store({sha256: content})
    with store.write() as session:
        return ledger.stage(session, Entry("folder", f"{content[:4]!r}", sha256, len(content), 1, True)).id


def fill(target, spool):
    """A bit of everything: merged tasks, lost ids, versions, batches that are done and that wait."""
    store = Database.open(target)
    rng = np.random.default_rng(0)
    with store.write() as session:
        first, second, lost = (tasks.create(session, FIELDS) for _ in range(3))
        for task_id in (first, second):
            for version in range(1, 6):
                bits = packing.pack(rng.random(4000) < 0.1)
                masks.append_mask(
                    session, MaskRow(task_id, version, None, bits, 4000, reason="why", reference={"a": 1})
                )
        tasks.merge(session, second, first)  # to a later row
        training_states.save(session, first, 2, b"state")
        reservoir.save_matrix(session, reservoir.Matrix(0, 2, 1, bytes(32)))
        reservoir.add_pattern(session, second, 1)
        cursors.advance(session, "folder", "köder", "1")
        session.delete(session.get(tasks.TaskRow, lost))
    done, waits = stage(store, spool, b"done"), stage(store, spool, b"waits")
    with store.write() as session:
        assert ledger.claim(session).id == done
        ledger.finish(session, done, Outcome("committed", second, decision="known", reason="because"))
        decisions.record(session, done, Decision("known", second, {"p": 0.1, "é": None}, "because"))
    store.close()
    return waits


def contents(target):
    """Every row of every table, whichever kind of store it is in."""
    readers = backend_of(target).readers()
    try:
        with readers.connect() as connection:
            found = copying.reflect(connection).sorted_tables
            return {table.name: list(copying.iter_rows(connection, table)) for table in found}
    finally:
        readers.dispose()


def make(target, state, file, **options):
    return backup.make_backup(backend_of(target), state / "spool", file, **options)


def restore(file, target, state, **options):
    return backup.restore_backup(file, backend_of(target), state / "spool", **options)


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_a_restored_store_has_every_row_and_byte_in_either_kind(target, other, state, tmp_path):
    spool = Spool(state / "spool")
    fill(target, spool)
    manifest = make(target, state, tmp_path / "b.tar")
    assert manifest.rows["mask_version"] == 10
    assert stat.S_IMODE((tmp_path / "b.tar").stat().st_mode) == 0o600
    for there, place in ((tmp_path / "own", tmp_path / "own" / "supsup.db"), (tmp_path / "restored", other)):
        there.mkdir()
        restore(tmp_path / "b.tar", place, there)
        assert contents(place) == contents(target)
        assert verify(place, there / "spool") == []
        assert Spool(there / "spool").names() == {packing.sha256(b"waits")}
        store = Database.open(place)
        with store.write() as session:
            assert tasks.create(session, FIELDS) == 4  # 3 is lost, and not given again
        store.close()


def test_a_store_of_hostile_texts_comes_back_in_either_kind(target, other, state, tmp_path):
    """What no store can hold is a rejected row by then; the rest is as long as one likes."""
    spool, long = Spool(state / "spool"), "".join(chr(0x4E00 + n * n % 20_000) for n in range(40_000))
    store = Database.open(target)
    staging = Staging(store, spool, IntakeSettings(min_free_bytes=0), InlineDecoder(Reading()))
    payloads = [encode(Batch(**draw(0, seed, 2))) for seed in range(10)]
    texts = [long, "half \ud800", "nul \0", "x" * 20, "\U0001f642" * 300]
    for n, text in enumerate(texts):
        a, b = payloads[2 * n], payloads[2 * n + 1]
        items = [
            Arrival("long", text, "npz", packing.sha256(a), a, text, text, text),
            Arrival("form", f"{n}", text, packing.sha256(b), b, text, str(n)),
        ]
        for item in items:
            staging.make_durable([staging.look_into(item)])
    with store.write() as session:
        gaps.report(session, long, long, long, long)
    store.close()
    make(target, state, tmp_path / "b.tar")
    for there, place in ((tmp_path / "own", tmp_path / "own" / "supsup.db"), (tmp_path / "restored", other)):
        there.mkdir()
        restore(tmp_path / "b.tar", place, there)
        assert contents(place) == contents(target)
        assert verify(place, there / "spool") == []
    make(other, tmp_path / "restored", tmp_path / "back.tar")
    restore(tmp_path / "back.tar", target, state, force=True)
    assert contents(target) == contents(other)


def test_a_backup_of_an_older_sqlite_store_with_what_postgresql_did_not_take_can_be_restored_there(state, tmp_path):
    path = state / "supsup.db"
    db.upgrade(path)
    db.downgrade(path, "0005")
    with tampering(path) as run:
        run(
            "INSERT INTO batch (source, name, size, state, attempts, created_at, updated_at, form, reason, sha256)"
            " VALUES ('s', 'n', 1, 'quarantined', 0, '2026-01-01', '2026-01-01', 'a format of 20 chars', 'r', 'x')"
        )
        run(
            "INSERT INTO cursor VALUES ('s', :key, '1')", key="".join(chr(0x4E00 + n * n % 20_000) for n in range(4000))
        )
    manifest = make(path, state, tmp_path / "b.tar", everything=True)
    with postgresql_target() as url:
        assert restore(tmp_path / "b.tar", url, tmp_path / "there").revision > manifest.revision
        assert verify(url) == []
        assert contents(url)["batch"][0]["form"] == "a format of 20 chars"


def test_nothing_but_the_backup_is_left_and_nothing_of_the_store_changes(target, state, tmp_path):
    fill(target, Spool(state / "spool"))
    before, rows = files(state), contents(target)
    make(target, state, tmp_path / "out.tar")
    assert contents(target) == rows
    assert [name for name in files(state) if not name.endswith(("-wal", "-shm"))] == before
    assert [path.name for path in tmp_path.iterdir() if path != state] == ["out.tar"]
    with pytest.raises(FileExistsError, match="without --force"):
        make(target, state, tmp_path / "out.tar")
    make(target, state, tmp_path / "out.tar", force=True)


def test_a_backup_beside_a_writer_is_always_whole(target, state, tmp_path):
    spool = Spool(state / "spool")
    store = Database.open(target)
    stop = threading.Event()

    def work():
        turn = 0
        while not stop.is_set():
            turn += 1
            batch_id = stage(store, spool, b"batch %d" % turn)
            with store.write() as session:
                ledger.claim(session)
            with store.write() as session:
                ledger.finish(session, batch_id, Outcome("scored"))
            spool.remove(packing.sha256(b"batch %d" % turn))

    thread = threading.Thread(target=work)
    thread.start()
    try:
        for turn in range(5):
            make(target, state, tmp_path / f"{turn}.tar")
            place = tmp_path / f"restored-{turn}"
            place.mkdir()
            restore(tmp_path / f"{turn}.tar", place / "supsup.db", place)
            assert verify(place / "supsup.db", place / "spool") == []
    finally:
        stop.set()
        thread.join(timeout=30)
        store.close()


def test_a_store_that_is_not_empty_is_replaced_only_by_force(target, state, tmp_path):
    fill(target, Spool(state / "spool"))
    make(target, state, tmp_path / "b.tar")
    store = Database.open(target)
    with store.write() as session:
        tasks.create(session, FIELDS)
    store.close()
    before = contents(target)
    with pytest.raises(FileExistsError, match="is not empty; --force replaces it"):
        restore(tmp_path / "b.tar", target, state)
    assert contents(target) == before
    restore(tmp_path / "b.tar", target, state, force=True)
    assert len(contents(target)["task"]) == len(before["task"]) - 1
    assert verify(target, state / "spool") == []


def test_a_damaged_database_is_replaced_by_force(state, tmp_path):
    path = state / "supsup.db"
    db.upgrade(path)
    fill(path, Spool(state / "spool"))
    before = contents(path)
    make(path, state, tmp_path / "b.tar")
    path.write_bytes(b"x" * path.stat().st_size)
    path.with_name("supsup.db-wal").write_bytes(b"x" * 5000)
    restore(tmp_path / "b.tar", path, state, force=True)
    assert contents(path) == before


def flip(file, place):
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("damage", ["a bit", "cut", "no tar", "no manifest", "more"])
def test_a_damaged_backup_is_refused_in_one_line_and_changes_nothing(state, tmp_path, damage):
    path, file = state / "supsup.db", tmp_path / "b.tar"
    db.upgrade(path)
    fill(path, Spool(state / "spool"))
    make(path, state, file)
    if damage == "a bit":
        flip(file, file.stat().st_size // 2)
    elif damage == "cut":
        os.truncate(file, file.stat().st_size // 2)
    elif damage == "no tar":
        file.write_bytes(b"hello" * 1000)
    else:
        with tarfile.open(file, "w" if damage == "no manifest" else "a") as tar:
            tar.add(path, "../../escaped")
    place = tmp_path / "new"
    place.mkdir()
    with pytest.raises(backup.BackupInvalid, match=r"^[^\n]*b\.tar[^\n]+$"):
        restore(file, place / "supsup.db", place)
    assert files(place) == []
    assert not (tmp_path.parent / "escaped").exists()


def test_a_backup_of_a_newer_program_is_refused(state, tmp_path):
    path = state / "supsup.db"
    db.upgrade(path)
    fill(path, Spool(state / "spool"))
    make(path, state, tmp_path / "b.tar")
    with tarfile.open(tmp_path / "b.tar") as tar:
        parts = [(info, tar.extractfile(info).read()) for info in tar]
    manifest = json.loads(parts[0][1])
    text = json.dumps(manifest | {"revision": "9999"}).encode()
    parts[0][0].size = len(text)
    with tarfile.open(tmp_path / "b.tar", "w") as tar:
        for info, content in [(parts[0][0], text), *parts[1:]]:
            (tmp_path / "member").write_bytes(content)
            with (tmp_path / "member").open("rb") as member:
                tar.addfile(info, member)
    (tmp_path / "new").mkdir()
    with pytest.raises(SchemaMismatch, match="9999 is newer"):
        restore(tmp_path / "b.tar", tmp_path / "new" / "supsup.db", tmp_path / "new")


def test_a_damaged_store_is_not_backed_up(target, state, tmp_path):
    fill(target, Spool(state / "spool"))
    with tampering(target) as run:
        run("UPDATE mask_version SET sha256 = 'x' WHERE task_id = 1 AND version = 1")
    with pytest.raises(StoreError, match="damaged, and was not backed up: mask of task 1, version 1"):
        make(target, state, tmp_path / "b.tar")
    assert not (tmp_path / "b.tar").exists()


def test_verify_finds_bytes_that_are_missing_or_damaged(target, state):
    spool = Spool(state / "spool")
    fill(target, spool)
    waits = state / "spool" / packing.sha256(b"waits")
    assert verify(target, state / "spool") == []
    waits.write_bytes(b"other")
    assert "another hash" in verify(target, state / "spool")[0]
    waits.unlink()
    assert "missing" in verify(target, state / "spool")[0]


def test_prune_removes_old_versions_and_strays_and_never_what_is_held(target, state):
    spool = Spool(state / "spool")
    waits = fill(target, spool)
    expected = [(1, 1), (1, 3), (2, 2), (2, 3)]  # 1.2 has a training state, 2.1 is in the reservoir
    told = pruning.prune(target, state / "spool", keep=2, dry=True)
    assert list(told.versions) == expected
    assert told.payloads == [packing.sha256(b"done")]
    assert len(contents(target)["mask_version"]) == 10
    assert pruning.prune(target, state / "spool", keep=2) == told
    assert [(row["task_id"], row["version"]) for row in contents(target)["mask_version"]] == [
        (1, 2), (1, 4), (1, 5), (2, 1), (2, 4), (2, 5)
    ]  # fmt: skip
    assert spool.names() == {packing.sha256(b"waits")}
    assert waits == 2
    assert verify(target, state / "spool") == []
    assert pruning.prune(target, state / "spool", keep=2) == pruning.Pruned({}, [])


def test_a_task_keeps_one_version_at_least(target, state):
    with pytest.raises(ValueError, match="one version at least"):
        pruning.prune(target, state / "spool", keep=0)


def test_prune_keeps_every_version_of_a_task_whose_newest_mask_is_damaged(target, state):
    fill(target, Spool(state / "spool"))
    with tampering(target) as run:
        run("UPDATE mask_version SET sha256 = 'bad' WHERE task_id = 1 AND version = 5")
    told = pruning.prune(target, state / "spool", keep=2)
    assert list(told.versions) == [(2, 2), (2, 3)]
    assert [row["version"] for row in contents(target)["mask_version"] if row["task_id"] == 1] == [1, 2, 3, 4, 5]
