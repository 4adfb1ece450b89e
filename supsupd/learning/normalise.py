"""The input normalisation: chosen once, stored with the network, never changed.

A rule that moved with the data would change the predictions of old tasks, whose masks were trained under the old one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import numpy as np
from safetensors.numpy import load, save

from supsupd.learning.kernels import compiled
from supsupd.learning.transforms import ShapeMismatch, Transforms

NormalisationRule = Literal["sample", "feature", "none"]
SMALLEST_SD = 1e-8
LARGEST = 1e6
"""Standard deviations at which a value is cut off: float32 sums stay finite whatever comes in."""

_COMPILED_FOR = (np.float32, np.float64)

__all__ = ["NormalisationRule", "Normaliser", "ShapeMismatch"]


class TooFewRows(ShapeMismatch):
    """A single row, where answers come from several rows together."""


class TooManyRows(ShapeMismatch):
    """More rows than are answered together, where they can't be answered in parts."""


@dataclass(frozen=True)
class Normaliser:
    """Rows of any numeric type and shape to float32 (n, inputs).

    Args:
        rule: "sample" standardises each row by itself; "feature" each input by `mean` and `sd`; "none" only flattens.
        input_shape: shape of one row as it comes.
        mean, sd: float64 (inputs,), for "feature" only.
        transforms: of images, before the rule.
    """

    rule: NormalisationRule
    input_shape: tuple[int, ...]
    mean: np.ndarray | None = None
    sd: np.ndarray | None = None
    transforms: Transforms = field(default_factory=Transforms)

    @classmethod
    def fitted(cls, rule: NormalisationRule, x: np.ndarray, transforms: Transforms | None = None) -> Normaliser:
        """The rule for rows like x (n, ...); "feature" takes its statistics from them, finite ones, and is frozen.

        Raises ShapeMismatch when the transforms cannot take such rows.
        """
        start = cls(rule, x.shape[1:], transforms=transforms or Transforms())
        start.transforms.output_shape(start.input_shape)
        if rule != "feature":
            return start
        # In units of a power of two for each input: its sums cannot overflow, and have the same bits as without.
        flat = np.nan_to_num(start._flat(x).astype(np.float64))
        _, exponents = np.frexp(np.abs(flat).max(axis=0))
        flat = np.ldexp(flat, -exponents)
        mean, sd = (np.ldexp(found, exponents) for found in (flat.mean(axis=0), flat.std(axis=0)))
        return cls(rule, x.shape[1:], mean, sd, start.transforms)

    @property
    def output_shape(self) -> tuple[int, ...]:
        """Of one row as the network takes it."""
        return self.transforms.output_shape(self.input_shape)

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """x (n, ...) to float32 (n, inputs). Raises ShapeMismatch unless every row has the network's width."""
        flat = self._flat(x)
        if self.rule == "sample":
            return standardise_rows(flat)
        flat = flat.astype(np.float64)
        with np.errstate(over="ignore", invalid="ignore"):
            if self.rule == "feature":
                assert self.mean is not None
                assert self.sd is not None
                flat = _standardised(flat, self.mean, self.sd)
        return np.nan_to_num(np.clip(flat, -LARGEST, LARGEST)).astype(np.float32)

    def _flat(self, x: np.ndarray) -> np.ndarray:
        """Transformed rows (n, inputs)."""
        shape = x.shape[1:]
        same_but_size = len(shape) == len(self.input_shape) > 1 and shape[2:] == self.input_shape[2:]
        if self.transforms.resize is not None and same_but_size:
            return self.transforms.prepared(x).reshape(len(x), -1)
        if x.ndim < 2 or math.prod(shape) != math.prod(self.input_shape):
            raise ShapeMismatch(f"rows of shape {shape} came, the network takes {self.input_shape}")
        if self.transforms.prepares:
            x = self.transforms.prepared(x.reshape(len(x), *self.input_shape))
        return x.reshape(len(x), -1)

    def to_stored(self) -> tuple[dict[str, Any], bytes | None]:
        """What the network's row keeps: JSON and the frozen arrays."""
        data = None
        if self.mean is not None and self.sd is not None:
            data = save({"mean": self.mean, "sd": self.sd})
        stored = {"rule": self.rule, "input_shape": list(self.input_shape), "transforms": self.transforms.to_json()}
        return stored, data

    @classmethod
    def from_stored(cls, data: dict[str, Any], arrays: bytes | None) -> Normaliser:
        frozen = load(arrays) if arrays is not None else {}
        transforms = Transforms.from_json(data.get("transforms", {}))
        return cls(data["rule"], tuple(data["input_shape"]), frozen.get("mean"), frozen.get("sd"), transforms)


def standardise_rows(x: np.ndarray) -> np.ndarray:
    """Each row of x (n, inputs) by itself to mean 0 and standard deviation 1, float32 (n, inputs)."""
    out = np.empty(x.shape, np.float32)
    _standardise(np.ascontiguousarray(x, x.dtype if x.dtype in _COMPILED_FOR else np.float64), out)
    return out


def warm_up() -> None:
    """Compiles what a query needs, so that none pays for it: for arrays of its own, and for what came over the wire."""
    for dtype in _COMPILED_FOR:
        x = np.zeros((1, 1), dtype)
        standardise_rows(x)
        x.flags.writeable = False
        standardise_rows(x)


def standardise_rows_by_numpy(x: np.ndarray) -> np.ndarray:
    """The slow, obvious equal of `standardise_rows`."""
    rows = x.astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        rows = _standardised(rows, rows.mean(axis=1, keepdims=True), rows.std(axis=1, keepdims=True))
    return np.nan_to_num(np.clip(rows, -LARGEST, LARGEST)).astype(np.float32)


def _standardised(values: np.ndarray, mean: np.ndarray, sd: np.ndarray) -> np.ndarray:
    # An input that never moved carries nothing: it becomes 0, as does a constant row.
    scale = np.where(sd > SMALLEST_SD * np.maximum(1.0, np.abs(mean)), sd, np.inf)
    return (values - mean) / scale


@partial(compiled, any_order=True)
def _standardise(x: np.ndarray, out: np.ndarray) -> None:
    """As `_standardised`, each row by its own mean and deviation: x, float32 or float64, to out, both (n, inputs)."""
    count = x.shape[1]
    for row in range(x.shape[0]):
        total = 0.0
        for index in range(count):
            total += np.float64(x[row, index])
        mean, squares = total / count, 0.0
        for index in range(count):
            away = np.float64(x[row, index]) - mean
            squares += away * away
        sd = np.sqrt(squares / count)
        if not sd > SMALLEST_SD * max(1.0, abs(mean)):
            sd = np.inf
        for index in range(count):
            value = (np.float64(x[row, index]) - mean) / sd
            out[row, index] = min(max(value, -LARGEST), LARGEST) if not np.isnan(value) else 0.0
