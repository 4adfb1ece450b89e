"""The index of tasks by their inputs: fast densities equal slow ones, and who is proposed."""

import numpy as np
import pytest
from digits import draw, held_out
from safetensors import SafetensorError

from supsupd.learning.index import InputDensity, InputMoments, TaskIndex, reference_log_likelihood
from supsupd.learning.kernels import Kernels

KERNELS = Kernels(1)


def rows(count, width, seed=0, shift=0.0):
    return (np.random.default_rng(seed).standard_normal((count, width)) + shift).astype(np.float32)


@pytest.mark.parametrize("width", [1, 5, 16, 61, 784])
@pytest.mark.parametrize("count", [1, 7])
def test_densities_in_bfloat16_equal_the_plain_ones_up_to_their_rounding(width, count):
    tasks = [InputMoments.of(rows(50, width, seed, shift=seed / 3)) for seed in range(5)]
    x = rows(count, width, 9)
    found = TaskIndex([InputDensity.of(m) for m in tasks]).log_likelihoods(x, KERNELS)
    plain = np.array([reference_log_likelihood(m, x) for m in tasks])
    np.testing.assert_allclose(found, plain, rtol=0.01, atol=0.02 * count * np.sqrt(width))


@pytest.mark.parametrize("x", [np.zeros((3, 20)), np.full((3, 20), 2.5), np.full((3, 20), 1e-42)])
def test_inputs_that_never_vary_have_a_density(x):
    moments = InputMoments.of(x.astype(np.float32))
    found = TaskIndex([InputDensity.of(moments)]).log_likelihoods(x.astype(np.float32), KERNELS)
    np.testing.assert_allclose(found[0], reference_log_likelihood(moments, x), rtol=0.01, atol=0.1)


def test_moments_of_parts_are_those_of_the_whole():
    x = rows(90, 12)
    whole, parts = InputMoments.of(x), InputMoments.of(x[:30]).joined(InputMoments.of(x[30:]))
    assert whole.count == parts.count == 90
    np.testing.assert_allclose(parts.mean, whole.mean, atol=1e-6)
    np.testing.assert_allclose(parts.square, whole.square, rtol=1e-5)


def test_moments_come_back_from_their_bytes_and_nothing_else_does():
    moments = InputMoments.of(rows(4, 6))
    again = InputMoments.from_bytes(moments.to_bytes())
    assert (again.count, again.mean.tobytes(), again.square.tobytes()) == (
        moments.count,
        moments.mean.tobytes(),
        moments.square.tobytes(),
    )
    with pytest.raises(SafetensorError):
        InputMoments.from_bytes(b"not a tensor")


@pytest.mark.parametrize("tasks", [1, 2, 3])
def test_the_task_whose_rows_they_are_is_proposed_first(tasks):
    learned = [np.concatenate([draw(task, seed)["x"].reshape(-1, 64) for seed in range(6)]) for task in range(4)]
    index = TaskIndex([InputDensity.of(InputMoments.of(x.astype(np.float32))) for x in learned])
    for task in range(4):
        x = held_out(task)[0][:16].reshape(16, -1).astype(np.float32)
        assert task in index.shortlist(x, tasks, KERNELS)


def test_a_shortlist_has_as_many_as_are_asked_for_in_order_and_those_not_known():
    densities = [InputDensity.of(InputMoments.of(rows(9, 8, seed))) for seed in range(30)]
    densities[4] = densities[20] = None
    found = TaskIndex(densities).shortlist(rows(2, 8), 5, KERNELS)
    assert len(found) == 7 and {4, 20} <= set(found.tolist()) and np.all(np.diff(found) > 0)


@pytest.mark.parametrize("count", [30, 31, 1000])
def test_a_shortlist_longer_than_the_tasks_is_all_of_them(count):
    densities = [InputDensity.of(InputMoments.of(rows(9, 8, seed))) for seed in range(30)]
    assert np.array_equal(TaskIndex(densities).shortlist(rows(1, 8), count, KERNELS), np.arange(30))


def test_an_index_of_no_tasks_proposes_none():
    assert len(TaskIndex([]).shortlist(rows(1, 8), 3, KERNELS)) == 0


def test_the_number_of_threads_changes_nothing():
    densities = [InputDensity.of(InputMoments.of(rows(9, 8, seed % 50))) for seed in range(5000)]
    index, x = TaskIndex(densities), rows(3, 8)
    assert np.array_equal(index.log_likelihoods(x, Kernels(1)), index.log_likelihoods(x, Kernels(3)))
