"""What is computed from packed bits equals what NumPy computes from unpacked ones."""

import numpy as np
import pytest
import torch

from supsupd.learning.kernels import Kernels, Located, outcomes, unpack


def bank(masks, nbytes, density=0.5):
    rng = np.random.default_rng(masks + nbytes)
    bits = rng.random((masks, 8 * nbytes)) < density
    packed = [np.packbits(row, bitorder="little") for row in bits]
    return Located.of(packed), bits.astype(np.float64)


@pytest.mark.parametrize("masks", [0, 1, 63, 65, 2501])
@pytest.mark.parametrize("nbytes", [1, 2, 7, 13, 64])
def test_products_sum_what_the_bits_keep(masks, nbytes):
    located, bits = bank(masks, nbytes)
    vector = np.random.default_rng(0).standard_normal(8 * nbytes).astype(np.float32)
    found = Kernels(2).products(located, vector)
    np.testing.assert_allclose(found, bits @ vector.astype(np.float64), rtol=1e-4, atol=1e-5)


def test_products_go_over_long_masks_in_chunks():
    located, bits = bank(5, 1501)
    vector = np.random.default_rng(0).standard_normal(8 * 1501).astype(np.float32)
    np.testing.assert_allclose(Kernels(1).products(located, vector), bits @ vector.astype(np.float64), atol=1e-3)


@pytest.mark.parametrize("value", [0.0, 7.0, 1e-42])
def test_constant_and_denormal_vectors_are_summed_like_any_other(value):
    located, bits = bank(4, 9)
    vector = np.full(72, value, np.float32)
    np.testing.assert_allclose(Kernels(1).products(located, vector), bits @ vector.astype(np.float64), rtol=1e-5)


@pytest.mark.parametrize("masks", [0, 1, 3, 300])
@pytest.mark.parametrize("nbytes", [1, 9, 512, 1100])
@pytest.mark.parametrize("density", [0.0, 0.5, 1.0])
def test_counts_say_how_many_masks_have_each_bit(masks, nbytes, density):
    located, bits = bank(masks, nbytes, density)
    assert np.array_equal(Kernels(2).counts(located, nbytes), bits.sum(axis=0))


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 8), (5, 13), (4, 16), (7, 27), (2, 784)])
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_unpacked_weights_are_those_that_the_bits_keep_and_nothing_else(rows, columns, density):
    rng = np.random.default_rng(columns)
    kept, weights = rng.random((rows, columns)) < density, rng.standard_normal((rows, columns)).astype(np.float32)
    assert np.array_equal(unpack(np.packbits(kept, axis=1, bitorder="little"), weights), np.where(kept, weights, 0))


def test_repeated_runs_and_any_number_of_threads_give_the_same_bits():
    located, _ = bank(700, 1300)
    vector = np.random.default_rng(1).standard_normal(8 * 1300).astype(np.float32)
    first = Kernels(1).products(located, vector)
    for threads in (1, 2, 5):
        kernels = Kernels(threads)
        assert all(np.array_equal(kernels.products(located, vector), first) for _ in range(3))


@pytest.mark.parametrize(("outputs", "classes"), [(1, 1), (10, 10), (16, 3), (17, 16), (500, 10)])
@pytest.mark.parametrize("scale", [0.0, 1.0, 30.0, 1e6])
@pytest.mark.parametrize("left_out", [0, 1])
def test_outcomes_are_softmax_over_what_is_allowed_and_entropy_over_all(outputs, classes, scale, left_out):
    logits = (scale * np.random.default_rng(outputs).standard_normal((5, outputs))).astype(np.float32)
    allowed = np.arange(classes) >= min(left_out, classes - 1)
    probabilities, entropies = outcomes(logits, allowed)
    exact = torch.from_numpy(logits).double()
    wanted = torch.softmax(exact[:, :classes].masked_fill(torch.from_numpy(~allowed), -torch.inf), dim=1)
    logs = torch.log_softmax(exact, dim=1)
    np.testing.assert_allclose(probabilities, wanted, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(entropies, -(logs.exp() * logs).sum(dim=1), rtol=1e-5, atol=2e-6)
