"""Scores to masks, and the straight-through gradient that trains them.

A mask bit has no gradient, so the backward pass treats the choice of bits as the identity: dL/ds = dL/dW' · W with
W' = W ⊙ M the effective weights (Zhou et al. 2019; Mallya et al. 2018, Piggyback; Ramanujan et al. 2020, edge-popup).
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

Rule = Literal["threshold", "edge-popup"]


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


class MaskedLinear(torch.autograd.Function):
    """x (n, columns), scores (rows, columns), weight (rows, columns) -> x W'ᵀ (n, rows)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scores: Tensor, weight: Tensor, rule: Rule, density: float) -> Tensor:
        effective = torch.where(select(scores, rule, density), weight, 0.0)
        ctx.save_for_backward(x, weight, effective, scores)
        ctx.rule = rule
        return x @ effective.T

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor, None, None, None]:
        x, weight, effective, scores = ctx.saved_tensors
        input_gradient = gradient @ effective if ctx.needs_input_grad[0] else None
        score_gradient = (gradient.T @ x).mul_(weight)
        if ctx.rule == "edge-popup":  # the bits come from |s|
            score_gradient.mul_(scores.sign())
        return input_gradient, score_gradient, None, None, None


def masked_forward(x: Tensor, scores: list[Tensor], weights: tuple[Tensor, ...], rule: Rule, density: float) -> Tensor:
    """Logits (n, outputs), differentiable in the scores."""
    for index, (layer_scores, weight) in enumerate(zip(scores, weights, strict=True)):
        x = MaskedLinear.apply(x, layer_scores, weight, rule, density)
        if index < len(weights) - 1:
            x = torch.relu(x)
    return x
