"""Scores to masks: where scores start, and which weights they keep. `optimiser` trains them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from supsupd.learning.training_kernels import keep_largest, keep_positive

Rule = Literal["threshold", "edge-popup"]
ERDOS_RENYI_MOST = 0.5
BISECTIONS = 60


def initial_scores(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Kaiming-uniform scores with a = sqrt(5): uniform in ±1 / sqrt(fan_in), shape (rows, columns)."""
    bound = 1.0 / math.sqrt(shape[1])
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def scores_from_mask(mask: Tensor, constant: float, rule: Rule) -> Tensor:
    """Scores (rows, columns) that select exactly this mask: where training goes on when only the bits were kept.

    threshold: ±constant; edge-popup, which looks at |s|: constant for the kept, half of it for the others.
    """
    return torch.where(mask, constant, -constant if rule == "threshold" else constant / 2)


def select(scores: Tensor, rule: Rule, density: float) -> Tensor:
    """The mask of one layer, bool (rows, columns).

    threshold keeps scores >= 0 (its density is what training makes it); edge-popup keeps the `density` share with
    the largest scores in absolute value, ties broken by position.
    """
    if rule == "threshold" or not _has_kernels(scores):
        return select_by_torch(scores, rule, density)
    everything = torch.ones(scores.shape, dtype=torch.bool)
    return _keep(scores, rule, density, everything, torch.empty(scores.shape, dtype=torch.bool))


def select_by_torch(scores: Tensor, rule: Rule, density: float) -> Tensor:
    """`select` on any device and for any type."""
    if rule == "threshold":
        return scores >= 0
    keep, magnitudes = _count(scores, density), scores.abs().flatten()
    least = torch.topk(magnitudes, keep, sorted=False).values.min()
    above, ties = magnitudes > least, magnitudes == least
    return (above | (ties & (ties.cumsum(0) <= keep - above.sum()))).view_as(scores)


def effective_weights(
    scores: Sequence[Tensor], weights: Sequence[Tensor], rule: Rule, densities: Sequence[float], out: Sequence[Tensor]
) -> None:
    """Writes W ⊙ M of each layer to `out`."""
    for layer, weight, density, target in zip(scores, weights, densities, out, strict=True):
        if _has_kernels(layer):
            _keep(layer, rule, density, weight, target)
        else:
            torch.mul(weight, select_by_torch(layer, rule, density), out=target)


def _has_kernels(scores: Tensor) -> bool:
    return scores.device.type == "cpu" and scores.dtype == torch.float32


def _count(scores: Tensor, density: float) -> int:
    """How many edge-popup keeps."""
    return max(1, round(density * scores.numel()))


def _keep(scores: Tensor, rule: Rule, density: float, values: Tensor, out: Tensor) -> Tensor:
    """out = values where a layer's scores keep a weight, else 0."""
    flat, source = scores.reshape(-1).numpy(), values.reshape(-1).numpy()
    target = out.view(-1).numpy()  # reshape might copy, and the copy be written instead
    if rule == "threshold":
        keep_positive(flat, source, target)
    else:
        keep_largest(flat.view(np.int32), _count(scores, density), source, target)
    return out


def erdos_renyi_densities(shapes: Sequence[tuple[int, ...]], density: float) -> list[float]:
    """Density of each layer (c_out, c_in, kh, kw) or (out, in) such that all together keep `density`.

    A layer's density is min(1/2, s (c_in + c_out) / (c_in c_out kh kw)): the Erdős–Rényi budget of the paper's GG
    experiments (section 4.1), with s solved for. More than half cannot be kept of any layer, so that `density` above
    1/2 gives 1/2 everywhere.
    """
    sizes = [math.prod(shape) for shape in shapes]
    ratios = [(shape[0] + shape[1]) / size for shape, size in zip(shapes, sizes, strict=True)]

    def kept(scale: float) -> float:
        return sum(n * min(ERDOS_RENYI_MOST, scale * r) for n, r in zip(sizes, ratios, strict=True)) / sum(sizes)

    low, high = 0.0, ERDOS_RENYI_MOST / min(ratios)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if kept(middle) < density else (low, middle)
    return [min(ERDOS_RENYI_MOST, high * r) for r in ratios]
