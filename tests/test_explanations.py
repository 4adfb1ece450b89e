"""Two sources in one batch, one after the other or row by row: found where they are, not where they are not."""

import itertools

import numpy as np
import pytest

from supsupd.learning.explanations import change_point, floored, mixture
from supsupd.learning.statistics import split_rows

ERROR = 1e-3


def under(rng, truth, masks=3, classes=10):
    """Label probabilities (masks, n) where mask i knows the rows of source i, and their null."""
    knows = rng.beta(8, 2, (masks, len(truth)))
    foreign = rng.beta(1, 12, (masks, len(truth)))
    own = np.arange(masks)[:, None] == truth[None, :]
    return np.where(own, knows, foreign), np.full((masks, len(truth)), 1 / classes)


@pytest.mark.parametrize("cut", [10, 32, 50])
def test_a_cut_is_found_where_it_is(cut):
    rng = np.random.default_rng(cut)
    found = change_point(*under(rng, np.repeat([0, 2], [cut, 64 - cut])), ERROR)
    assert found is not None
    expected = (0, cut) if cut >= 32 else (cut, 64)
    assert abs(found.start - expected[0]) + abs(found.stop - expected[1]) <= 2
    assert found.rest_explained


def test_rows_in_any_order_are_told_apart():
    rng = np.random.default_rng(0)
    truth = rng.choice([1, 2], 64, p=[0.7, 0.3])
    probability, null = under(rng, truth)
    found = mixture(probability, null, ERROR)
    assert found is not None
    left_out = np.isin(np.arange(64), found.left_out)
    assert (left_out == (truth == 2)).mean() > 0.95
    cut = change_point(probability, null, ERROR)
    assert cut is None or cut.log_likelihood < found.log_likelihood


def test_one_source_is_rarely_taken_for_two():
    cuts = mixtures = 0
    for seed in range(300):
        probability, null = under(np.random.default_rng(seed), np.zeros(64, int))
        cuts += change_point(probability, null, ERROR) is not None
        mixtures += mixture(probability, null, ERROR) is not None
    assert (cuts, mixtures) == (0, 0)


def test_a_single_mask_has_no_partner():
    probability, null = under(np.random.default_rng(0), np.zeros(16, int), masks=1)
    assert mixture(probability, null, ERROR) is None


def test_the_change_point_is_the_best_of_all_pairs_and_cuts():
    rng = np.random.default_rng(3)
    probability, null = under(rng, np.repeat([1, 0], [20, 12]))
    logs = np.vstack([np.log(floored(probability, null)), np.log(null.max(axis=0))])
    totals = {
        (left, right, cut): logs[left, :cut].sum() + logs[right, cut:].sum()
        for left, right, cut in itertools.product(range(4), range(4), range(33))
    }
    price = np.log(4 * 32 / ERROR)
    found = change_point(probability, null, ERROR)
    assert found.log_likelihood == pytest.approx(max(totals.values()) - price)


def test_the_share_of_a_mixture_is_the_most_likely_one():
    rng = np.random.default_rng(0)
    first, second = rng.uniform(0.01, 1, 200), rng.uniform(0.01, 1, 200)
    first[:60] += 0.5
    shares = np.linspace(0.001, 0.999, 999)[:, None]
    slow = np.log(shares * first + (1 - shares) * second).sum(axis=1).max()
    posterior, likelihood = split_rows(first, second)
    assert likelihood == pytest.approx(slow, abs=0.05)
    assert ((posterior > 0.5) == (first * posterior.mean() > second * (1 - posterior.mean()))).mean() > 0.95
