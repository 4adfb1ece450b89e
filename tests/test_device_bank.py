"""The masks of a GPU's bank; on the CPU, where torch does what the programs do there."""

import gc

import numpy as np
import pytest
import torch
from learning_stream import small_network
from test_inference import bank_of, rows_of

from supsupd.learning.bank import Masks
from supsupd.learning.device_bank import FIRST_CAPACITY, DeviceBank, DeviceScorer
from supsupd.learning.inference import reference_logits
from supsupd.learning.kernels import Kernels

CPU = torch.device("cpu")


def masks_of(count, nbytes=21, seed=0):
    rng = np.random.default_rng(seed)
    return Masks.of([rng.integers(0, 256, nbytes, dtype=np.uint8) for _ in range(count)])


def held(bank, masks):
    buffer, rows = bank.hold(masks)
    return [buffer[row, : masks[0].nbytes].numpy().tobytes() for row in rows.tolist()]


@pytest.mark.parametrize("count", [1, FIRST_CAPACITY, 5 * FIRST_CAPACITY + 3])
def test_every_mask_lies_where_it_is_said_to_lie(count):
    masks, bank = masks_of(count), DeviceBank(21, CPU)
    for _ in range(2):
        assert held(bank, masks) == [mask.packed.tobytes() for mask in masks]


def test_masks_that_are_added_move_none():
    bank, first = DeviceBank(21, CPU), masks_of(10)
    _, before = bank.hold(first)
    others = masks_of(300, seed=1)
    bank.hold(others)
    assert torch.equal(bank.hold(first)[1], before)
    assert held(bank, others) == [mask.packed.tobytes() for mask in others]


def test_the_place_of_a_mask_that_nobody_holds_is_used_again():
    bank, kept = DeviceBank(21, CPU), masks_of(3)
    bank.hold(kept)
    for seed in range(20):
        bank.hold(masks_of(FIRST_CAPACITY - 3, seed=seed))
        gc.collect()
    assert len(bank.hold(kept)[0]) == FIRST_CAPACITY
    assert held(bank, kept) == [mask.packed.tobytes() for mask in kept]


def test_it_scores_and_sums_like_the_cpu():
    network = small_network(13, (7, 9), 5)
    bank, x = bank_of(network, 9), rows_of(network, 6)
    scorer = DeviceScorer(network)
    for logits, mask in zip(scorer.logits(torch.from_numpy(x), bank), bank, strict=True):
        np.testing.assert_allclose(logits, reference_logits(network, mask.packed, x), rtol=1e-4, atol=1e-5)
    vector = rows_of(network, 200).reshape(-1)[: 8 * network.architecture.bit_bytes]
    found = scorer.products(bank, torch.from_numpy(vector))
    np.testing.assert_allclose(found, Kernels(1).products(bank.load(), vector), rtol=1e-4, atol=1e-4)
