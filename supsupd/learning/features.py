"""Tasks told by their inputs: one Gaussian per class of each task, in the features of the whole, unmasked network.

The covariance within classes is shared by all tasks, so that the densities compare (linear discriminant analysis,
Fisher 1936). Features come from weights that never change, hence all it takes is sums: counts and sums for each class,
and one matrix of products, to which rows are added and from which they are taken away again.

It sees what inputs look like, not what labels mean: tasks that differ in their labels alone look the same here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from safetensors.numpy import load, save
from torch import Tensor

from supsupd.learning.network import Network
from supsupd.learning.transforms import Transforms

RIDGE = 1e-2
"""Of the mean variance, added to the diagonal: fewer rows than features leave the covariance singular."""
CHUNK_ROWS = 500


@dataclass(frozen=True)
class ClassSums:
    """The rows of one class of one task: how many, and the sum of their features, float64 (d,)."""

    count: float
    total: np.ndarray


@dataclass(frozen=True)
class FeatureModel:
    """What is known of all tasks' inputs.

    Args:
        network: whose features are taken, weights whole.
        transforms: where rows are flipped in training, features are the mean of a row's and its mirror image's.
        tasks: by task id and class index.
        products: float64 (d, d), sum of f fᵀ over all rows of all tasks; None before the first.
    """

    network: Network
    transforms: Transforms
    tasks: Mapping[int, Mapping[int, ClassSums]] = field(default_factory=dict)
    products: np.ndarray | None = None

    def check(self) -> None:
        """Raises UnsupportedNetwork where a row has no features of its own."""
        self.network.features(torch.zeros(1, self.network.architecture.inputs, device=self.network.device))

    def features(self, x: Tensor) -> np.ndarray:
        """Of normalised rows x (n, inputs), float32 (n, d)."""
        return np.concatenate([self._features(x[i : i + CHUNK_ROWS]) for i in range(0, len(x), CHUNK_ROWS)])

    def _features(self, x: Tensor) -> np.ndarray:
        found = self.network.features(x)
        if self.transforms.horizontal_flip:
            shape = self.network.architecture.input_shape
            mirrored = x.view(len(x), shape[0], shape[1], -1).flip(2).reshape(len(x), -1)
            found = (found + self.network.features(mirrored)) / 2
        return found.cpu().numpy()

    def learned(self, task_id: int, x: Tensor, y: Tensor, sign: int = 1) -> FeatureModel:
        """With rows x (n, inputs) of classes y (n,) added to a task, or taken away with sign -1."""
        features = self.features(x).astype(np.float64)
        labels = y.cpu().numpy()
        classes = dict(self.tasks.get(task_id, {}))
        for label in np.unique(labels).tolist():
            mine = features[labels == label]
            old = classes.get(label, ClassSums(0.0, np.zeros(features.shape[1])))
            classes[label] = ClassSums(old.count + sign * len(mine), old.total + sign * mine.sum(axis=0))
        products = sign * (features.T @ features) + (0.0 if self.products is None else self.products)
        kept = {label: sums for label, sums in sorted(classes.items()) if sums.count > 0}
        return FeatureModel(self.network, self.transforms, {**self.tasks, task_id: kept}, _as_stored(products))

    @cached_property
    def _discriminants(self) -> dict[int, tuple[Tensor, Tensor]]:
        """For each task the weights (c, d) and offsets (c,) of its classes: log densities but for what all share."""
        assert self.products is not None
        rows = [sums for classes in self.tasks.values() for sums in classes.values()]
        means = np.stack([sums.total / sums.count for sums in rows])
        counts = np.array([sums.count for sums in rows])
        within = (self.products - (means * counts[:, None]).T @ means) / counts.sum()
        within[np.diag_indices_from(within)] += RIDGE * max(float(np.trace(within)) / len(within), 1e-12)
        factor = torch.linalg.cholesky(torch.from_numpy(within))
        weights = torch.cholesky_solve(torch.from_numpy(means.T.copy()), factor).T
        offsets = -0.5 * (weights * torch.from_numpy(means)).sum(dim=1)
        sizes = [len(classes) for classes in self.tasks.values()]
        parts = zip(self.tasks, weights.float().split(sizes), offsets.float().split(sizes), strict=True)
        return {task: (weight, offset) for task, weight, offset in parts}

    def surprise(self, x: Tensor, tasks: Sequence[int]) -> np.ndarray:
        """Negative log density of rows x (n, inputs) under each of the tasks (k, n), but for a term that all share.

        The classes of a task count alike, whatever their number.
        """
        features = torch.from_numpy(self.features(x))
        discriminants = self._discriminants if self.products is not None else {}
        found = np.full((len(tasks), len(x)), np.inf, np.float32)
        for place, task in enumerate(tasks):
            weights, offsets = discriminants.get(task, (None, None))
            if weights is not None and offsets is not None and len(offsets):
                densities = features @ weights.T + offsets - float(np.log(len(offsets)))
                found[place] = -torch.logsumexp(densities, dim=1).numpy()
        return found

    def products_to_bytes(self) -> bytes:
        """The triangle of the products in float32: a row's own rounding is far below the ridge."""
        assert self.products is not None
        return self.products[np.triu_indices(len(self.products))].astype("<f4").tobytes()

    @staticmethod
    def products_from_bytes(data: bytes) -> np.ndarray:
        triangle = np.frombuffer(data, "<f4")
        size = int((math.isqrt(8 * len(triangle) + 1) - 1) // 2)
        upper = np.zeros((size, size))
        upper[np.triu_indices(size)] = triangle
        return upper + np.triu(upper, 1).T

    def task_to_bytes(self, task_id: int) -> bytes:
        """One task's sums, as safetensors."""
        return save({f"{label}": np.append(s.total, s.count) for label, s in self.tasks[task_id].items()})

    @staticmethod
    def task_from_bytes(data: bytes) -> dict[int, ClassSums]:
        found = {int(label): ClassSums(float(v[-1]), v[:-1]) for label, v in load(data).items()}
        return dict(sorted(found.items()))


def _as_stored(products: np.ndarray) -> np.ndarray:
    """Symmetric, in float32's precision: what comes back from the store is exactly what was there."""
    return ((products + products.T) / 2).astype(np.float32).astype(np.float64)
