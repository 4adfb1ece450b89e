"""The reservoir in plain NumPy, float64: slow and obvious, for tests to hold `reservoir` to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from supsupd.learning.bodies import BATCH_EPSILON
from supsupd.sections import ReservoirSettings

NUDGE = 1e-6


@dataclass(frozen=True)
class UnitNetwork:
    """The fixed weights (rows, columns) of each layer, and over what its hidden layers are normalised."""

    weights: Sequence[np.ndarray]
    norm: str

    def logits(self, x: np.ndarray, units: Sequence[np.ndarray]) -> np.ndarray:
        """Logits (n, outputs) of x (n, inputs) with so much (d,) of each hidden unit."""
        axis = 1 if self.norm == "group" else 0
        for weight, kept in zip(self.weights, units, strict=False):
            z = x @ weight.T
            z = (z - z.mean(axis=axis, keepdims=True)) / np.sqrt(z.var(axis=axis, keepdims=True) + BATCH_EPSILON)
            x = z * kept / (1.0 + np.exp(-z * kept))
        return x @ self.weights[-1].T


def reference_storkey(matrix: np.ndarray, x: np.ndarray) -> np.ndarray:
    """The first-order Storkey rule, entry by entry, for float64 matrix (d, d) and x (d,) of ±1."""
    d = len(x)
    h = [sum(matrix[i, k] * x[k] for k in range(d)) for i in range(d)]
    new = np.empty_like(matrix)
    for i in range(d):
        for j in range(d):
            new[i, j] = matrix[i, j] + (x[i] * x[j] - (i == j) - x[i] * h[j] - h[i] * x[j]) / d
    return new


def reference_evidence(logits: np.ndarray, settings: ReservoirSettings) -> float:
    """What is descended beside the energy, of logits (n, outputs)."""
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    rows = float(np.mean([-sum(q * np.log(q) for q in row) for row in p]))
    if settings.descent == "paper" or len(p) == 1:
        return rows
    return rows + sum(q * np.log(q) for q in p.mean(axis=0))


def reference_step(
    state: tuple[list[np.ndarray], list[np.ndarray]],
    matrices: Sequence[np.ndarray],
    network: UnitNetwork,
    rows: tuple[np.ndarray, int],
    settings: ReservoirSettings,
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """(scores, velocity) of each layer after one step; `rows` are x (n, inputs) and the number of the step."""
    scores, velocity = state
    x, number = rows
    bits = [(s >= 0).astype(np.float64) for s in scores]
    slopes = [np.array([_slope(network, x, bits, (i, j), settings) for j in range(len(b))]) for i, b in enumerate(bits)]
    if settings.descent == "projected":
        slopes = [w @ g for w, g in zip(matrices, slopes, strict=True)]
        strength = np.sqrt(np.mean(np.concatenate(slopes) ** 2))
        slopes = [g * settings.gamma / strength if strength > 0 else g for g in slopes]
    share = number / settings.steps
    after: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    for w, bit, score, speed, slope in zip(matrices, bits, scores, velocity, slopes, strict=True):
        pull = -2.0 * (w @ (2.0 * bit - 1.0))
        new = settings.momentum * speed + (1.0 - share) * slope + settings.gamma * share * pull
        after[0].append(score - settings.lr * new)
        after[1].append(new)
    return after


def _slope(
    network: UnitNetwork, x: np.ndarray, bits: list[np.ndarray], unit: tuple[int, int], settings: ReservoirSettings
) -> float:
    """The slope of the evidence in one bit, by differences."""
    layer, place = unit
    values = []
    for nudge in (NUDGE, -NUDGE):
        units = [b.copy() for b in bits]
        units[layer][place] += nudge
        values.append(reference_evidence(network.logits(x, units), settings))
    return (values[0] - values[1]) / (2.0 * NUDGE)
