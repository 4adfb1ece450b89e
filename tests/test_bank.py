"""The mask bank: each mask in memory once, beyond the limit only in the store, and never half a mask."""

import gc
import threading
import weakref

import numpy as np
import pytest

from supsupd.learning.bank import READ_MASKS, Mask, MaskBank, Masks

NBYTES = 64


def mask_of(task_id, version=1):
    """The bits of a stored mask, known by its key."""
    return np.random.default_rng([task_id, version]).integers(0, 256, NBYTES, dtype=np.uint8)


class Store:
    """Stands for the store: gives the masks that were kept, and counts how often it was asked."""

    def __init__(self):
        self.reads = []

    def __call__(self, keys):
        self.reads.append(list(keys))
        return [mask_of(*key) for key in keys]


def banked(count, limit):
    store = Store()
    bank = MaskBank(limit * NBYTES, store)
    return store, bank, Masks([bank.keep(Mask(mask_of(i)), (i, 1)) for i in range(count)])


def test_masks_within_the_limit_are_never_read():
    store, bank, masks = banked(10, limit=10)
    assert [packed.tobytes() for packed in masks.load().arrays] == [mask_of(i).tobytes() for i in range(10)]
    assert (store.reads, bank.full, bank.nbytes) == ([], False, 10 * NBYTES)


def test_beyond_the_limit_memory_stays_within_it_and_the_bits_are_right():
    store, bank, masks = banked(100, limit=7)
    for _ in range(3):
        assert sum(len(part.arrays) for _, part in masks.chunks(READ_MASKS)) == 100
        for place in (0, 50, 99):
            assert np.array_equal(masks[place].packed, mask_of(place))
        assert bank.nbytes <= 7 * NBYTES
        assert sum(mask.hot is not None for mask in masks) <= 7
    assert store.reads


def test_what_is_used_stays_and_what_is_not_goes():
    store, _, masks = banked(20, limit=5)
    wanted = masks.take(np.array([3, 4, 5]))
    wanted.load()
    for place in range(10, 20):
        assert np.array_equal(masks[place].packed, mask_of(place))
        wanted.load()
    store.reads.clear()
    wanted.load()
    assert store.reads == []


def test_many_cold_masks_are_read_at_once():
    store, _, masks = banked(50, limit=1)
    found = masks.take(np.arange(10, 40)).load()
    assert len(store.reads) == 1
    assert [packed.tobytes() for packed in found.arrays] == [mask_of(i).tobytes() for i in range(10, 40)]


def test_looking_at_all_masks_takes_none_of_the_others_out_of_memory():
    _, _, masks = banked(READ_MASKS * 2, limit=4)
    hot = [mask for mask in masks if mask.hot is not None]
    seen = [packed for _, part in masks.chunks(10_000) for packed in part.arrays]
    assert [mask for mask in masks if mask.hot is not None] == hot
    assert [packed.tobytes() for packed in seen] == [mask_of(i).tobytes() for i in range(len(masks))]


def test_a_new_version_takes_the_place_of_the_old_one_whose_readers_keep_it():
    _, bank, masks = banked(3, limit=10)
    located = masks.load()
    bank.keep(Mask(mask_of(1, 2)), (1, 2))
    assert bank.nbytes == 3 * NBYTES
    assert np.array_equal(located.arrays[1], mask_of(1))
    assert np.array_equal(masks[1].packed, mask_of(1))


def test_a_versions_memory_goes_with_its_last_reader():
    _, bank, masks = banked(3, limit=10)
    old, reader = weakref.ref(masks[1]), masks
    bank.keep(Mask(mask_of(1, 2)), (1, 2))
    del masks
    assert old() is not None
    del reader
    gc.collect()
    assert old() is None


def test_a_task_out_of_use_takes_no_memory():
    _, bank, _masks = banked(3, limit=10)
    bank.drop(1)
    assert bank.nbytes == 2 * NBYTES


def test_masks_that_no_store_has_never_leave_memory():
    masks = Masks.of([mask_of(i) for i in range(5)])
    banked(5, limit=1)
    assert all(mask.hot is not None for mask in masks)
    assert len(masks.load().arrays) == 5


def test_a_stored_mask_is_read_when_it_is_first_wanted():
    store, bank, _ = banked(0, limit=2)
    mask = bank.cold((7, 3), NBYTES)
    assert store.reads == []
    assert np.array_equal(mask.packed, mask_of(7, 3))
    assert np.array_equal(mask.packed, mask_of(7, 3))
    assert store.reads == [[(7, 3)]]


@pytest.mark.parametrize("limit", [0, 1, 300, 1000])
def test_a_start_reads_the_last_masks_as_far_as_there_is_room(limit):
    store = Store()
    bank = MaskBank(limit * NBYTES, store)
    masks = [bank.cold((i, 1), NBYTES) for i in range(600)]
    bank.warm(masks)
    room = min(limit, 600)
    assert [mask.hot is not None for mask in masks] == [False] * (600 - room) + [True] * room
    assert (len(bank), bank.full) == (room, room < 600)
    assert all(np.array_equal(mask.hot, mask_of(i)) for i, mask in enumerate(masks) if mask.hot is not None)
    assert np.array_equal(masks[0].packed, mask_of(0))


def test_a_mask_larger_than_the_limit_still_answers():
    store = Store()
    bank = MaskBank(NBYTES - 1, store)
    mask = bank.keep(Mask(mask_of(1)), (1, 1))
    assert np.array_equal(mask.packed, mask_of(1))
    assert bank.nbytes == 0


@pytest.mark.parametrize("limit", [3, 1000])
def test_readers_never_see_half_a_mask_while_others_are_added_and_replaced(limit):
    """Each version is one byte repeated: a torn or mixed mask would show two."""
    store = Store()
    bank = MaskBank(limit * NBYTES, lambda keys: [np.full(NBYTES, version % 251, np.uint8) for _, version in keys])
    served = [Masks([bank.keep(Mask(np.full(NBYTES, 1, np.uint8)), (task, 1)) for task in range(8)])]
    stop, wrong = threading.Event(), []

    def read():
        while not stop.is_set():
            masks = served[0]
            wrong.extend(p.tobytes() for p in masks.load().arrays if len(set(p.tobytes())) != 1)

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    for version in range(2, 400):
        task = version % 8
        current = list(served[0])
        current[task] = bank.keep(Mask(np.full(NBYTES, version % 251, np.uint8)), (task, version))
        served[0] = Masks(current)
    stop.set()
    for reader in readers:
        reader.join()
    assert wrong == []
    assert store.reads == []
