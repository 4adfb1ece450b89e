"""Task inference: the fast ways equal the slow ones, and evidence means what it says."""

import numpy as np
import pytest
import torch
from learning_stream import small_network
from test_network import random_mask

from supsupd.learning.inference import (
    EVIDENCE,
    TABLE_ROWS,
    Scorer,
    entropy,
    one_shot,
    reference_logits,
    reference_one_shot,
)


def bank_of(network, count):
    masks = [network.pack(random_mask(network, 0.5, seed)) for seed in range(count)]
    return np.stack(masks) if masks else np.empty((0, network.architecture.mask_bytes), np.uint8)


def rows_of(network, count, scale=1.0):
    rng = np.random.default_rng(count)
    return (scale * rng.standard_normal((count, network.architecture.inputs))).astype(np.float32)


@pytest.mark.parametrize("rows", [1, TABLE_ROWS, TABLE_ROWS + 1, 50])
@pytest.mark.parametrize("widths", [(64, (100,), 10), (13, (7, 9), 3), (5, (), 4)])
def test_exact_scoring_from_bits_equals_the_dense_reference(widths, rows):
    network = small_network(widths[0], widths[1], widths[2])
    bank, x = bank_of(network, 5), rows_of(network, rows)
    found = list(Scorer(network, threads=2).iter_logits(x, bank))
    assert len(found) == 5
    for logits, packed in zip(found, bank, strict=True):
        np.testing.assert_allclose(logits, reference_logits(network, packed, x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("x", [np.zeros((1, 13)), np.full((1, 13), 7.0), np.full((1, 13), 1e-42)])
def test_constant_and_denormal_inputs_score_like_any_other(x):
    network = small_network(13, (7,), 3)
    bank, x = bank_of(network, 3), x.astype(np.float32)
    for logits, packed in zip(Scorer(network, 1).iter_logits(x, bank), bank, strict=True):
        np.testing.assert_allclose(logits, reference_logits(network, packed, x), rtol=1e-4, atol=1e-6)


def test_scores_do_not_depend_on_threads_or_on_the_other_masks():
    network = small_network(64, (30,), 20)
    bank, x = bank_of(network, 200), rows_of(network, 3)
    alone = np.stack([next(iter(Scorer(network, 1).iter_logits(x, packed[None]))) for packed in bank])
    for threads in (1, 3):
        together = np.stack(list(Scorer(network, threads).iter_logits(x, bank)))
        assert np.array_equal(together, alone)


def test_no_masks_give_no_scores():
    network = small_network(13, (7,), 3)
    scores = Scorer(network, 1).score(rows_of(network, 2), bank_of(network, 0), 3)
    assert scores.evidence["entropy"].shape == (0, 2)


@pytest.mark.parametrize("count", [1, 2, 7])
def test_one_shot_from_bits_equals_the_gradient_in_alpha(count):
    network = small_network(13, (7, 9), 5)
    bank, x = bank_of(network, count), rows_of(network, 6)
    np.testing.assert_allclose(one_shot(network, bank, x), reference_one_shot(network, bank, x), rtol=1e-4, atol=1e-6)


def test_entropy_is_log_n_for_even_logits_and_zero_for_certain_ones():
    assert float(entropy(torch.zeros(1, 8))[0]) == pytest.approx(np.log(8), rel=1e-5)
    assert float(entropy(torch.tensor([[100.0, 0.0]]))[0]) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("name", EVIDENCE)
def test_all_evidence_is_lower_where_one_output_stands_out(name):
    sure, unsure = torch.tensor([[9.0, 0.0, 0.0]]), torch.tensor([[1.0, 1.0, 1.0]])
    assert float(EVIDENCE[name](sure)[0]) < float(EVIDENCE[name](unsure)[0])
