"""The few statistics that recognition rests on, each tied to an error rate."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

BETS = np.array([0.05, 0.2, 0.4, 0.6, 0.8, 0.95])
RISES = (0.05, 0.1, 0.2, 0.4)
"""Rises of the denied probability that a guard looks for."""


def gamma_quantile(mean: float, variance: float, error: float) -> float:
    """What a gamma variable with this mean and variance exceeds with probability `error`.

    By Wilson and Hilferty (1931) for χ² with f = 2 mean² / variance degrees of freedom.
    """
    freedom = 2.0 * mean**2 / variance
    z = NormalDist().inv_cdf(1.0 - error)
    return mean * max(0.0, 1.0 - 2.0 / (9.0 * freedom) + z * math.sqrt(2.0 / (9.0 * freedom))) ** 3


def gamma_score(value: float, mean: float, variance: float) -> float:
    """The normal score of a value under a gamma law: `gamma_quantile` the other way round."""
    spread = variance / (9.0 * mean**2)  # 2 / (9 f)
    return ((max(value, 0.0) / mean) ** (1.0 / 3.0) - 1.0 + spread) / math.sqrt(spread)


def log_shift_wealth(score: float, variance: float) -> float:
    """Log e-value of "the mean has risen" against "it has not", for a normal score of a mean with this variance.

    The Bayes factor of a rise of unknown size, half normal with spread τ, averaged over the RISES τ: a mixture of
    likelihood ratios, hence of expectation 1 at every moment while nothing has risen.
    """
    logs = []
    for rise in RISES:
        ratio = rise**2 / (variance + rise**2)
        z = score * math.sqrt(ratio)
        logs.append(math.log(2.0) + 0.5 * math.log(1.0 - ratio) + 0.5 * z**2 + log_normal_cdf(z))
    return mixed(np.array(logs))


def log_normal_cdf(z: float) -> float:
    """log Φ(z), by its asymptotic series far below 0."""
    if z > -8.0:
        return math.log(0.5 * math.erfc(-z / math.sqrt(2.0)))
    return -0.5 * z**2 - math.log(-z * math.sqrt(2.0 * math.pi)) + math.log1p(-1.0 / z**2)


def log_wealth(ratios: np.ndarray) -> np.ndarray:
    """Log wealth of each of the BETS after betting on likelihood ratios (n,), shape (len(BETS),).

    A bettor who stakes the share λ on "the mask knows the label" multiplies its wealth by 1 - λ + λ p/q per row, with
    p the mask's probability of the label and q the null's. If the labels do not depend on the inputs, wealth has
    expectation at most 1 at every moment, so P(it ever reaches 1/ε) <= ε (Ville 1939): a test that may be looked at
    after every batch.
    """
    stakes = BETS[:, None]
    return np.log(1.0 - stakes + stakes * ratios[None, :]).sum(axis=1)


def mixed(wealth: np.ndarray) -> float:
    """Log of the mean wealth over the BETS: the bettor that need not know the best stake."""
    top = float(wealth.max())
    return top + math.log(float(np.exp(wealth - top).mean()))


EM_STEPS = 50


def split_rows(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, float]:
    """Rows of two sources in any order: the posterior (n,) of the first, and the log likelihood of the mixture.

    Likelihoods (n,) of each row under either source, all above 0. The share of the first is the one of largest
    likelihood, found by expectation and maximisation from one half.
    """
    share = 0.5
    posterior = np.full(len(first), share)
    for _ in range(EM_STEPS):
        posterior = share * first / (share * first + (1.0 - share) * second)
        share = float(posterior.mean())
    return posterior, float(np.log(share * first + (1.0 - share) * second).sum())


SLICE_VALUES = 1 << 21
"""Values that are held as float64 at once: 16 MiB."""
FREEDOM_ROWS = 1024
"""Rows that tell how many of the inputs are independent."""
ROUNDING = 2.0**-6
"""Of a mean, by which an input may be off unnoticed: twice what is kept of it in bfloat16 is uncertain by."""


def iter_slices(x: np.ndarray) -> Iterator[np.ndarray]:
    """The rows of x (n, d) in order, a few at a time, as float64."""
    rows = max(1, SLICE_VALUES // x.shape[1])
    return (x[start : start + rows].astype(np.float64) for start in range(0, len(x), rows))


def mean_and_variance(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of every input of rows x (n, d), float64 (d,) each."""
    mean = sum(part.sum(axis=0) for part in iter_slices(x)) / len(x)
    return mean, sum(((part - mean) ** 2).sum(axis=0) for part in iter_slices(x)) / len(x)


def far_outside(x: np.ndarray, mean: np.ndarray, variance: np.ndarray, error: float) -> np.ndarray:
    """Which rows of x (n, d) lie far outside what has these means and variances (d,), bool (n,).

    Those whose squared distance, in variances and on average over the inputs, exceeds n / `error`. Its expectation is
    1 for a row of the source, however its inputs are distributed and hang together, so that any of its rows exceeds
    this with probability `error` or less (Markov).
    """
    scale = variance + (ROUNDING * mean) ** 2 + np.finfo(np.float32).tiny
    distance = np.concatenate([((part - mean) ** 2 / scale).mean(axis=1) for part in iter_slices(x)])
    return distance > len(x) / error


@dataclass(frozen=True)
class InputStatistics:
    """Mean and variance of every input over n rows; float64 (d,) each."""

    count: int
    mean: np.ndarray
    variance: np.ndarray
    freedom: float

    @classmethod
    def of(cls, x: np.ndarray) -> InputStatistics:
        """From rows x (n, d); `freedom` is the effective number of independent inputs, (tr Σ)² / tr Σ²."""
        mean, variance = mean_and_variance(x)
        seen = x[:: math.ceil(len(x) / FREEDOM_ROWS)].astype(np.float64)
        centred = (seen - mean) / np.sqrt(variance + VARIANCE_FLOOR)
        gram = centred @ centred.T if len(seen) <= x.shape[1] else centred.T @ centred
        trace, square = float(np.trace(gram)), float((gram**2).sum())
        return cls(len(x), mean, variance, max(1.0, trace**2 / square) if square else 1.0)

    def joined(self, other: InputStatistics) -> InputStatistics:
        """Of the union of both row sets."""
        count = self.count + other.count
        share = other.count / count
        shift = other.mean - self.mean
        variance = (1 - share) * self.variance + share * other.variance + share * (1 - share) * shift**2
        freedom = (self.count * self.freedom + other.count * other.freedom) / count
        return InputStatistics(count, self.mean + share * shift, variance, freedom)


VARIANCE_FLOOR = 1e-3
"""Added to every variance: samples are standardised to 1, and inputs that hardly move tell nothing."""


def input_distance(left: InputStatistics, right: InputStatistics) -> float:
    """Mean squared difference of the input means in units of its expectation: about 1 for one source."""
    variance = (left.count * left.variance + right.count * right.variance) / (left.count + right.count)
    scale = (variance + VARIANCE_FLOOR) * (1 / left.count + 1 / right.count)
    return float(((left.mean - right.mean) ** 2 / scale).mean())


def input_limit(left: InputStatistics, right: InputStatistics, error: float) -> float:
    """The distance that one source exceeds with probability `error`.

    The distance is a mean of correlated squares: χ²_f / f with f effective degrees of freedom (Box 1954).
    """
    return gamma_quantile(1.0, 2.0 / min(left.freedom, right.freedom), error)
