"""The few statistics that recognition rests on, each tied to an error rate."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import torch

BETS = np.array([0.05, 0.2, 0.4, 0.6, 0.8, 0.95])


def beta_binomial_tail(errors: int, trials: int, error_weight: float, hit_weight: float) -> float:
    """P(E >= errors) for E ~ BetaBinomial(trials, error_weight, hit_weight).

    The predictive law of the errors in `trials` new rows for a mask whose past is summed up by the two weights.
    """
    if errors <= 0:
        return 1.0
    a, b, n = (torch.tensor(v, dtype=torch.float64) for v in (error_weight, hit_weight, trials))
    k = torch.arange(errors, trials + 1, dtype=torch.float64)
    log_choose = torch.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)
    log_beta = torch.lgamma(k + a) + torch.lgamma(n - k + b) - torch.lgamma(n + a + b)
    log_norm = torch.lgamma(a) + torch.lgamma(b) - torch.lgamma(a + b)
    return float(torch.exp(torch.logsumexp(log_choose + log_beta - log_norm, 0)).clamp(max=1.0))


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
        x = x.astype(np.float64)
        mean = x.mean(axis=0)
        centred = (x - mean) / np.sqrt(x.var(axis=0) + VARIANCE_FLOOR)
        gram = centred @ centred.T if len(x) <= x.shape[1] else centred.T @ centred
        trace, square = float(np.trace(gram)), float((gram**2).sum())
        return cls(len(x), mean, x.var(axis=0), max(1.0, trace**2 / square) if square else 1.0)

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

    The distance is a mean of correlated squares, taken as χ²_f / f with f effective degrees of freedom (Box 1954;
    quantile by Wilson and Hilferty 1931).
    """
    freedom = min(left.freedom, right.freedom)
    z = NormalDist().inv_cdf(1 - error)
    return (1 - 2 / (9 * freedom) + z * math.sqrt(2 / (9 * freedom))) ** 3
