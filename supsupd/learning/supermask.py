"""Scores to masks, and the straight-through gradient that trains them.

A mask bit has no gradient, so the backward pass treats the choice of bits as the identity: dL/ds = dL/dW' · W with
W' = W ⊙ M the effective weights (Zhou et al. 2019; Mallya et al. 2018, Piggyback; Ramanujan et al. 2020, edge-popup).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

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
    if rule == "threshold":
        return scores >= 0
    keep = max(1, round(density * scores.numel()))
    order = torch.sort(scores.abs().flatten(), descending=True, stable=True).indices
    mask = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    mask[order[:keep]] = True
    return mask.view_as(scores)


class StraightThrough(torch.autograd.Function):
    """scores, weight (rows, columns) -> W ⊙ M (rows, columns), as if the choice of bits were the identity."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, weight: Tensor, rule: Rule, density: float) -> Tensor:
        ctx.save_for_backward(weight, *([scores] if rule == "edge-popup" else []))
        return torch.where(select(scores, rule, density), weight, 0.0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        weight, *scores = ctx.saved_tensors
        score_gradient = gradient * weight
        if scores:  # edge-popup: the bits come from |s|
            score_gradient.mul_(scores[0].sign())
        return score_gradient, None, None, None


def effective_weights(
    scores: Sequence[Tensor], weights: Sequence[Tensor], rule: Rule, densities: Sequence[float]
) -> list[Tensor]:
    """W ⊙ M of each layer, differentiable in the scores."""
    layers = zip(scores, weights, densities, strict=True)
    return [StraightThrough.apply(s, weight, rule, density) for s, weight, density in layers]


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
