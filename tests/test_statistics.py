"""The statistics keep the error rates that they state (checked by simulation, seeds fixed)."""

import math

import numpy as np
import pytest

from supsupd.learning.index import InputDensity, InputMoments
from supsupd.learning.statistics import (
    BETS,
    InputStatistics,
    far_outside,
    gamma_quantile,
    input_distance,
    input_limit,
    log_wealth,
    mixed,
)


@pytest.mark.parametrize("error", [0.05, 0.01])
def test_betting_on_a_mask_that_knows_nothing_rarely_wins_whenever_one_stops(error):
    rng = np.random.default_rng(0)
    null = np.array([0.5, 0.3, 0.2])
    wins = 0
    for _ in range(2000):
        labels = rng.choice(3, 60, p=null)
        beliefs = rng.dirichlet(np.ones(3), 60)  # a mask that is sure of itself and does not know
        ratios = beliefs[np.arange(60), labels] / null[labels]
        steps = np.stack([log_wealth(ratios[i : i + 1]) for i in range(60)]).cumsum(axis=0)
        wins += max(mixed(wealth) for wealth in steps) >= -math.log(error)
    assert wins / 2000 <= error


def test_betting_on_a_mask_that_knows_wins_without_bound():
    ratios = np.full(50, 3.0)
    assert mixed(log_wealth(ratios)) > 30
    assert mixed(log_wealth(np.tile(ratios, 10))) > 300


def test_a_bettor_never_loses_everything_to_one_wrong_certainty():
    assert np.isfinite(log_wealth(np.array([0.0, 0.0]))).all()


def test_wealth_adds_up_over_batches():
    first, second = np.array([2.0, 0.5]), np.array([1.5])
    np.testing.assert_allclose(log_wealth(first) + log_wealth(second), log_wealth(np.concatenate([first, second])))
    assert log_wealth(first).shape == BETS.shape


@pytest.mark.parametrize(("mean", "variance"), [(1.0, 0.1), (0.2, 0.01), (5.0, 4.0)])
@pytest.mark.parametrize("error", [0.05, 0.001])
def test_the_gamma_quantile_is_exceeded_as_often_as_it_says(mean, variance, error):
    draws = np.random.default_rng(1).gamma(mean**2 / variance, variance / mean, 400_000)
    assert (draws > gamma_quantile(mean, variance, error)).mean() == pytest.approx(error, rel=0.3)


def test_input_statistics_of_two_halves_join_to_those_of_the_whole():
    x = np.random.default_rng(2).standard_normal((90, 12)) * np.arange(12)
    whole, joined = InputStatistics.of(x), InputStatistics.of(x[:40]).joined(InputStatistics.of(x[40:]))
    np.testing.assert_allclose(joined.mean, whole.mean, atol=1e-12)
    np.testing.assert_allclose(joined.variance, whole.variance, atol=1e-9)
    assert joined.count == whole.count


@pytest.mark.parametrize("rank", [3, 40])
def test_batches_of_one_source_are_within_the_input_limit_and_another_source_is_not(rank):
    rng = np.random.default_rng(3)
    mixing = rng.standard_normal((rank, 60))

    def statistics(rows, shift=0.0):
        return InputStatistics.of(rng.standard_normal((rows, rank)) @ mixing + shift)

    alarms = [
        input_distance(a, b) > input_limit(a, b, 0.05)
        for a, b in ((statistics(64), statistics(32)) for _ in range(300))
    ]
    assert np.mean(alarms) < 0.12
    left, right = statistics(64), statistics(64, shift=10.0)
    assert input_distance(left, right) > input_limit(left, right, 1e-6)


def test_constant_inputs_are_one_source():
    left, right = InputStatistics.of(np.zeros((16, 5))), InputStatistics.of(np.zeros((8, 5)))
    assert input_distance(left, right) == 0.0
    assert input_limit(left, right, 0.001) > 0.0


def heavy(rng, shape):
    return rng.standard_t(3, shape)


SOURCES = {
    "normal": lambda rng, shape: rng.standard_normal(shape),
    "heavy tails": heavy,
    "skewed": lambda rng, shape: np.exp(rng.standard_normal(shape)),
    "discrete": lambda rng, shape: rng.integers(0, 2, shape).astype(float),
    "constant": lambda rng, shape: np.full(shape, 3.0),
    "rarely anything": lambda rng, shape: (rng.random(shape) < 0.002).astype(float),
    "far from 0": lambda rng, shape: 9e5 + rng.standard_normal(shape),
    "one wide among narrow": lambda rng, shape: heavy(rng, shape) * np.where(np.arange(shape[1]) == 0, 1e4, 1e-4),
    "all inputs one": lambda rng, shape: np.repeat(heavy(rng, (shape[0], 1)), shape[1], axis=1),
}


@pytest.mark.parametrize("source", SOURCES)
def test_a_source_rarely_lies_far_outside_what_it_has_shown_whatever_its_law(source):
    rng = np.random.default_rng(0)
    error, trials, alarms = 1e-2, 1000, 0
    for _ in range(trials):
        seen, new = (SOURCES[source](rng, (64, 16)).astype(np.float32) for _ in range(2))
        alarms += InputDensity.of(InputMoments.of(seen)).far_outside(new, error).any()
    assert alarms <= error * trials


@pytest.mark.parametrize("source", SOURCES)
def test_rows_a_million_times_as_large_lie_far_outside(source):
    rng = np.random.default_rng(0)
    seen, new = (SOURCES[source](rng, (64, 16)) + 1.0 for _ in range(2))
    new[::8] *= 1e6
    density = InputDensity.of(InputMoments.of(seen.astype(np.float32)))
    assert np.flatnonzero(density.far_outside(new, 1e-3)).tolist() == list(range(0, 64, 8))


def test_statistics_of_many_rows_are_those_of_all_rows():
    x = np.random.default_rng(0).normal(5.0, 2.0, (150_000, 20)).astype(np.float32)  # more than one slice
    found = InputStatistics.of(x)
    assert found.mean == pytest.approx(x.mean(axis=0, dtype=np.float64), rel=1e-9)
    assert found.variance == pytest.approx(x.var(axis=0, dtype=np.float64), rel=1e-9)
    assert found.freedom == pytest.approx(20, rel=0.1)
    moments = InputMoments.of(x)
    assert moments.square == pytest.approx((x.astype(np.float64) ** 2).mean(axis=0), rel=1e-6)
    assert far_outside(x, found.mean, found.variance, 1e-3).sum() == 0
