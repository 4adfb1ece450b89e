"""Small references to stand beside SupSup: plain fine-tuning, one network per task, BatchE and PSP.

Multilayer perceptrons with ReLU and no bias, from the papers' equations; the task is given. Each trains what is its
own of a task with RMSProp and cross-entropy.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

FLOAT_BYTES = 4
SEED_BYTES = 8


@dataclass(frozen=True)
class Shape:
    """Widths of the layers, inputs first, and the seed of everything random."""

    widths: tuple[int, ...]
    seed: int

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """(inputs, outputs) of each layer."""
        return list(itertools.pairwise(self.widths))

    @property
    def weights(self) -> int:
        return sum(before * after for before, after in self.pairs)

    def drawn(self, key: int) -> list[Tensor]:
        """Kaiming-uniform weights (outputs, inputs) of each layer."""
        generator = torch.Generator().manual_seed(1000 * self.seed + key)
        sizes = [(after, before, math.sqrt(6.0 / before)) for before, after in self.pairs]
        return [torch.empty(rows, columns).uniform_(-b, b, generator=generator) for rows, columns, b in sizes]


class Reference(Protocol):
    """A way to learn one task after the other.

    Args:
        shared_bytes, task_bytes: what it keeps for all tasks together, and for each one.
    """

    shared_bytes: int
    task_bytes: int

    def begin(self, task: int) -> list[Tensor]:
        """The tensors that training on a task changes, from now on those that `run` uses."""

    def run(self, x: Tensor, task: int) -> Tensor:
        """Logits (n, outputs) of x (n, inputs) for a task that was begun."""


class FineTuned:
    """One network, trained on task after task: what forgetting looks like."""

    def __init__(self, shape: Shape) -> None:
        self.weights = shape.drawn(0)
        self.shared_bytes, self.task_bytes = FLOAT_BYTES * shape.weights, 0

    def begin(self, task: int) -> list[Tensor]:
        return self.weights

    def run(self, x: Tensor, task: int) -> Tensor:
        return _forward(x, self.weights)


class Separate:
    """A network for each task: the upper bound, at the full price."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self.weights: dict[int, list[Tensor]] = {}
        self.shared_bytes, self.task_bytes = 0, FLOAT_BYTES * shape.weights

    def begin(self, task: int) -> list[Tensor]:
        self.weights[task] = self.shape.drawn(task)
        return self.weights[task]

    def run(self, x: Tensor, task: int) -> Tensor:
        return _forward(x, self.weights[task])


class BatchE:
    """Weights W of the first task, for each task W ∘ s rᵀ with vectors of its own (Wen, Tran and Ba 2020, equation 1;
    as in their lifelong learning the slow weights W stay as the first task left them)."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self.weights = shape.drawn(0)
        self.vectors: dict[int, list[tuple[Tensor, Tensor]]] = {}
        self.shared_bytes = FLOAT_BYTES * shape.weights
        self.task_bytes = FLOAT_BYTES * sum(before + after for before, after in shape.pairs)

    def begin(self, task: int) -> list[Tensor]:
        pairs = [(torch.ones(before), torch.ones(after)) for before, after in self.shape.pairs]
        first = not self.vectors
        self.vectors[task] = pairs
        return [*(self.weights if first else []), *itertools.chain.from_iterable(pairs)]

    def run(self, x: Tensor, task: int) -> Tensor:
        for layer, (weight, (r, s)) in enumerate(zip(self.weights, self.vectors[task], strict=True)):
            x = ((x if layer == 0 else torch.relu(x)) * r) @ weight.T * s
        return x


class Superposed:
    """PSP: one set of weights for all tasks; each sees a layer's inputs times random signs of its own, so that other
    tasks' weights look like noise (Cheung et al. 2019, binary superposition)."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self.weights = shape.drawn(0)
        self.contexts: dict[int, list[Tensor]] = {}
        self.shared_bytes, self.task_bytes = FLOAT_BYTES * shape.weights, SEED_BYTES

    def begin(self, task: int) -> list[Tensor]:
        rng = np.random.Generator(np.random.Philox([self.shape.seed, task]))
        signs = [2.0 * rng.integers(0, 2, before) - 1.0 for before, _ in self.shape.pairs]
        self.contexts[task] = [torch.from_numpy(s.astype(np.float32)) for s in signs]
        return self.weights

    def run(self, x: Tensor, task: int) -> Tensor:
        for layer, (weight, context) in enumerate(zip(self.weights, self.contexts[task], strict=True)):
            x = ((x if layer == 0 else torch.relu(x)) * context) @ weight.T
        return x


REFERENCES: dict[str, type[FineTuned] | type[Separate] | type[BatchE] | type[Superposed]] = {
    "fine-tuning": FineTuned,
    "one network per task": Separate,
    "BatchE": BatchE,
    "PSP": Superposed,
}


def _forward(x: Tensor, weights: Sequence[Tensor]) -> Tensor:
    for weight in weights[:-1]:
        x = torch.relu(x @ weight.T)
    return x @ weights[-1].T


@dataclass(frozen=True)
class Training:
    """Steps of `minibatch` rows with RMSProp for each task."""

    steps: int
    minibatch: int
    lr: float
    seed: int


def train(reference: Reference, task: int, rows: tuple[np.ndarray, np.ndarray], training: Training) -> None:
    """Learns a new task from rows x float32 (n, inputs) and y int64 (n,), drawn without replacement in each pass."""
    x, y = rows
    tensors = [tensor.requires_grad_() for tensor in reference.begin(task)]
    optimiser = torch.optim.RMSprop(tensors, lr=training.lr)
    order = np.random.Generator(np.random.Philox([training.seed, task]))
    drawn = np.empty(0, dtype=np.int64)
    for _ in range(training.steps):
        if len(drawn) < training.minibatch:
            drawn = order.permutation(len(y))
        now, drawn = drawn[: training.minibatch], drawn[training.minibatch :]
        loss = functional.cross_entropy(reference.run(torch.from_numpy(x[now]), task), torch.from_numpy(y[now]))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    for tensor in tensors:
        tensor.requires_grad_(False)


@torch.no_grad()
def accuracy(reference: Reference, task: int, x: np.ndarray, y: np.ndarray) -> float:
    """Share of labels right, the task given."""
    predicted = reference.run(torch.from_numpy(x), task).argmax(dim=1).numpy()
    return float((predicted == y).mean())
