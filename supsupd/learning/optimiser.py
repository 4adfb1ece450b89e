"""One step of a layer's scores, from the gradient of its effective weights W' = W ⊙ M.

A mask bit has no gradient, so the choice of bits counts as the identity: dL/ds = dL/dW' · W, for edge-popup times the
sign of s, whose absolute value it looks at (Zhou et al. 2019; Mallya et al. 2018, Piggyback; Ramanujan et al. 2020).
"""

from __future__ import annotations

from typing import Generic, Literal, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from supsupd.learning import training_kernels
from supsupd.learning.supermask import Rule

Optimiser = Literal["rmsprop", "adam"]
RMSPROP_DECAY = 0.99
ADAM_DECAYS = (0.9, 0.999)
EPSILON = 1e-8
Values = TypeVar("Values", Tensor, np.ndarray)


def loss_slope(logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    """Gradient in the logits (n, outputs) of the mean cross-entropy with smoothed labels: softmax minus the target.

    torch.nn.functional.cross_entropy and its backward pass take more than twice as long.
    """
    rows, outputs = logits.shape
    slope = torch.softmax(logits, dim=1).sub_(smoothing / outputs)
    slope.scatter_add_(1, labels[:, None], slope.new_full((rows, 1), smoothing - 1.0))
    return slope.div_(rows)


class Layer(NamedTuple, Generic[Values]):
    """What a step reads and changes of one layer, all of one shape and type; `weight` stays as it is.

    Args:
        average: the running average of the scores.
        first, second: moments of the gradient; Adam alone looks at the first.
    """

    weight: Values
    scores: Values
    average: Values
    first: Values
    second: Values


class Step(NamedTuple):
    """How far the scores go.

    Args:
        adam: whether by Adam (Kingma and Ba 2015) or by RMSProp (Hinton 2012).
        signed: whether the rule looks at the scores' absolute values.
        lr: step size.
        share: of the new scores in their average.
        first_decay, decay: of the first and of the second moments.
        first_share, second_share: what the moments weigh so far in all, which Adam divides by.
    """

    adam: bool
    signed: bool
    lr: float
    share: float
    first_decay: float
    decay: float
    first_share: float
    second_share: float
    epsilon: float = EPSILON

    @classmethod
    def of(cls, optimiser: Optimiser, rule: Rule, count: int, lr: float = 0.0, share: float = 0.0) -> Step:
        """Step number `count`, from 1 on."""
        adam = optimiser == "adam"
        first, second = ADAM_DECAYS if adam else (0.0, RMSPROP_DECAY)
        return cls(adam, rule == "edge-popup", lr, share, first, second, 1 - first**count, 1 - second**count)


def take_step(layer: Layer[Tensor], gradient: Tensor, step: Step) -> None:
    """Changes the layer in place; `gradient` is that of its effective weights."""
    if gradient.device.type != "cpu":
        step_by_torch(layer, gradient, step)
        return
    arrays = Layer(*(tensor.view(-1).numpy() for tensor in layer))  # reshape might copy, and the copy be changed
    kernel = training_kernels.adam if step.adam else training_kernels.rmsprop
    kernel(gradient.reshape(-1).numpy(), arrays, step)


def step_by_torch(layer: Layer[Tensor], gradient: Tensor, step: Step) -> None:
    """`take_step`, operation by operation, on any device."""
    slope = gradient * layer.weight
    if step.signed:
        slope.mul_(layer.scores.sign())
    layer.second.mul_(step.decay).addcmul_(slope, slope, value=1 - step.decay)
    if step.adam:
        layer.first.lerp_(slope, 1 - step.first_decay)
        direction = (layer.first / step.first_share) / ((layer.second / step.second_share).sqrt() + step.epsilon)
    else:
        direction = slope / (layer.second.sqrt() + step.epsilon)
    layer.scores.add_(direction, alpha=-step.lr)
    layer.average.lerp_(layer.scores, step.share)
