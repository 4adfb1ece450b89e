"""The input normalisation: chosen once, stored with the network, never changed.

A rule that moved with the data would change the predictions of old tasks, whose masks were trained under the old one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from safetensors.numpy import load, save

NormalisationRule = Literal["sample", "feature", "none"]
SMALLEST_SD = 1e-8
LARGEST = 1e6
"""Standard deviations at which a value is cut off: float32 sums stay finite whatever comes in."""


class ShapeMismatch(ValueError):
    """Rows that do not fit the network; the text says what came and what is expected."""


@dataclass(frozen=True)
class Normaliser:
    """Rows of any numeric type and shape to float32 (n, inputs).

    Args:
        rule: "sample" standardises each row by itself; "feature" each input by `mean` and `sd`; "none" only flattens.
        input_shape: shape of one row as it comes.
        mean, sd: float64 (inputs,), for "feature" only.
    """

    rule: NormalisationRule
    input_shape: tuple[int, ...]
    mean: np.ndarray | None = None
    sd: np.ndarray | None = None

    @classmethod
    def fitted(cls, rule: NormalisationRule, x: np.ndarray) -> Normaliser:
        """The rule for rows like x (n, ...); "feature" takes its statistics from them and is frozen."""
        if rule != "feature":
            return cls(rule, x.shape[1:])
        flat = x.reshape(len(x), -1).astype(np.float64)
        return cls(rule, x.shape[1:], flat.mean(axis=0), flat.std(axis=0))

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """x (n, ...) to float32 (n, inputs). Raises ShapeMismatch unless every row has the network's width."""
        width = math.prod(self.input_shape)
        if x.ndim < 2 or math.prod(x.shape[1:]) != width:
            raise ShapeMismatch(f"rows of shape {x.shape[1:]} came, the network takes {self.input_shape}")
        flat = x.reshape(len(x), width).astype(np.float64)
        with np.errstate(over="ignore", invalid="ignore"):
            if self.rule == "sample":
                flat = _standardised(flat, flat.mean(axis=1, keepdims=True), flat.std(axis=1, keepdims=True))
            elif self.rule == "feature":
                assert self.mean is not None
                assert self.sd is not None
                flat = _standardised(flat, self.mean, self.sd)
        return np.nan_to_num(np.clip(flat, -LARGEST, LARGEST)).astype(np.float32)

    def to_stored(self) -> tuple[dict[str, Any], bytes | None]:
        """What the network's row keeps: JSON and the frozen arrays."""
        data = None
        if self.mean is not None and self.sd is not None:
            data = save({"mean": self.mean, "sd": self.sd})
        return {"rule": self.rule, "input_shape": list(self.input_shape)}, data

    @classmethod
    def from_stored(cls, data: dict[str, Any], arrays: bytes | None) -> Normaliser:
        frozen = load(arrays) if arrays is not None else {}
        return cls(data["rule"], tuple(data["input_shape"]), frozen.get("mean"), frozen.get("sd"))


def _standardised(values: np.ndarray, mean: np.ndarray, sd: np.ndarray) -> np.ndarray:
    # An input that never moved carries nothing: it becomes 0, as does a constant row.
    scale = np.where(sd > SMALLEST_SD * np.maximum(1.0, np.abs(mean)), sd, np.inf)
    return (values - mean) / scale
