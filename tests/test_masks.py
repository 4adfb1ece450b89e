"""Coded masks in the store: read in bulk as one by one, and never given out damaged."""

from dataclasses import replace

import numpy as np
import pytest
from stores import tampering

from storage import codec, db, masks, packing, tasks
from storage.db import Database, verify
from storage.masks import MaskCorrupt, MaskRow
from storage.tasks import TaskFields

DENSITIES = {"gaps": 0.03, "zstd": 0.2, None: 0.5}
FIELDS = TaskFields(version=1, batches=1, samples=128, density=0.5, bytes=13, reference={})


@pytest.fixture
def path(store_target):
    db.upgrade(store_target)
    return store_target


@pytest.fixture
def store(path):
    store = Database.open(path)
    yield store
    store.close()


def mask(task_id, version, coding):
    """Of 10,000 weights, with statistics and a record, that is coded so."""
    rng = np.random.default_rng([task_id, version])
    bits = packing.pack(rng.random(10_000) < DENSITIES[coding])
    statistics = rng.random(6, np.float32).tobytes()
    return MaskRow(task_id, version, None, bits, 10_000, statistics, "why", {"version": version})


def fill(store):
    """Three versions of three tasks: each has one raw mask, and one of each coding."""
    codings = list(DENSITIES)
    made = []
    with store.write() as session:
        for turn in range(3):
            task_id = tasks.create(session, FIELDS)
            made += [mask(task_id, version, codings[(turn + version) % 3]) for version in (1, 2, 3)]
        for row in made:
            masks.append_mask(session, row)
    return {(row.task_id, row.version): row for row in made}


def column(path, name):
    with tampering(path) as run:
        found = run(f"SELECT task_id, version, {name} FROM mask_version").all()
    return {(task_id, version): value for task_id, version, value in found}


def set_bits(path, bits):
    with tampering(path) as run:
        assert run("UPDATE mask_version SET bits = :bits", bits=bits).rowcount == 1


def without_record(row):
    return replace(row, reference=None)


def test_every_coding_comes_back_as_it_was_stored(path, store):
    made = fill(store)
    assert sorted(map(str, column(path, "coding").values())) == 3 * ["None"] + 3 * ["gaps"] + 3 * ["zstd"]
    with store.read() as session:
        for place, row in made.items():
            assert masks.load_mask(session, *place) == row
    assert verify(path) == []


def test_the_hash_and_the_density_are_those_of_the_mask_whatever_its_coding(path, store):
    made = fill(store)
    assert column(path, "sha256") == {place: packing.sha256(row.bits + row.statistics) for place, row in made.items()}
    assert column(path, "density") == {place: packing.popcount(row.bits) / 10_000 for place, row in made.items()}


def test_masks_stored_as_they_were_before_the_codec_are_read_beside_coded_ones(path, store):
    made = fill(store)
    change = "UPDATE mask_version SET bits = :bits, coding = NULL WHERE task_id = :task AND version = :version"
    with tampering(path) as run:
        for (task_id, version), row in made.items():
            if task_id != 2:
                run(change, bits=row.bits, task=task_id, version=version)
    with store.read() as session:
        assert masks.load_masks(session, list(made)) == [without_record(row) for row in made.values()]


def test_many_masks_are_those_that_one_reads_alone_but_for_their_record(store):
    made = fill(store)
    wanted = [(3, 1), (1, 3), (2, 2), (1, 1), (3, 1)]
    with store.read() as session:
        loaded = masks.load_masks(session, wanted)
        assert masks.load_masks(session, []) == []
        heads = list(masks.iter_heads(session))
    assert loaded == [without_record(made[place]) for place in wanted]
    assert heads == [without_record(made[task_id, 3]) for task_id in (1, 2, 3)]


@pytest.mark.parametrize("missing", [(1, 4), (4, 1)])
def test_one_missing_version_among_many_says_so(store, missing):
    fill(store)
    with (
        store.read() as session,
        pytest.raises(MaskCorrupt, match=r"^mask of task {}, version {}: it is missing$".format(*missing)),
    ):
        masks.load_masks(session, [(1, 1), missing])


@pytest.mark.parametrize("nbits", [-1, 0, 9, 81])
def test_a_byte_without_a_weight_or_a_weight_without_a_bit_is_refused(store, nbits):
    with store.write() as session:
        task_id = tasks.create(session, FIELDS)
        with pytest.raises(ValueError, match="10 bytes cannot be the bits"):
            masks.append_mask(session, MaskRow(task_id, 1, None, bytes(10), nbits))


READERS = {
    "load_mask": lambda session: masks.load_mask(session, 1),
    "load_masks": lambda session: masks.load_masks(session, [(1, 1)]),
    "load_heads": masks.load_heads,
}


@pytest.mark.parametrize("coding", ["gaps", "zstd"])
@pytest.mark.parametrize("damage", ["cut", "emptied", "grown", "another mask", "a bomb"])
def test_a_damaged_coded_mask_is_found_in_one_line_and_never_given_out(path, store, coding, damage):
    row = mask(1, 1, coding)
    with store.write() as session:
        tasks.create(session, FIELDS)
        masks.append_mask(session, row)
    coded, _ = codec.encode(row.bits)
    damaged = {
        "cut": coded[:-1],
        "emptied": b"",
        "grown": coded + b"\0",
        "another mask": codec.encode(mask(2, 1, coding).bits)[0],
        "a bomb": codec.zstd.compress(bytes(1 << 24)),
    }
    set_bits(path, damaged[damage])
    with store.read() as session:
        for read in READERS.values():
            with pytest.raises(MaskCorrupt, match=r"^mask of task 1, version 1: .+$"):
                read(session)
    assert [line.partition(":")[0] for line in verify(path)] == ["mask of task 1, version 1"]


@pytest.mark.parametrize("coding", ["gaps", "zstd"])
def test_no_flipped_bit_of_a_coded_mask_gives_another_mask(path, store, coding):
    row = mask(1, 1, coding)
    with store.write() as session:
        tasks.create(session, FIELDS)
        masks.append_mask(session, row)
    coded, _ = codec.encode(row.bits)
    found = 0
    for place in range(0, 8 * len(coded), 37):
        damaged = bytearray(coded)
        damaged[place // 8] ^= 1 << place % 8
        set_bits(path, bytes(damaged))
        try:
            with store.read() as session:
                assert masks.load_mask(session, 1) == row
        except MaskCorrupt:
            found += 1
    assert found
