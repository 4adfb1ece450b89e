"""The fixed random network: weights that never train and are never stored, only their seed and their hash.

Each weight is ±c with c the Kaiming standard deviation of its layer, sqrt(2 / fan_in), and the bias is 0
("signed Kaiming constant", Supermasks in Superposition, section 3.1). A weight is therefore one sign bit, and the
sign bits are the raw words of NumPy's Philox generator, whose stream is frozen: the same seed gives the same
network on every device, library version and year.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor


class NetworkMismatch(Exception):
    """The network that the seed gives is not the one that the stored masks were trained on."""


@dataclass(frozen=True, slots=True)
class LayerShape:
    """One masked layer: weights (rows, columns), its mask's place in the packed bytes.

    Every row of a mask starts at a byte of its own; the bits that fill a row's last byte are zero.
    """

    rows: int
    columns: int
    offset: int

    @property
    def row_bytes(self) -> int:
        return (self.columns + 7) // 8

    @property
    def nbytes(self) -> int:
        return self.rows * self.row_bytes

    @property
    def constant(self) -> float:
        return math.sqrt(2.0 / self.columns)


@dataclass(frozen=True)
class Architecture:
    """What rebuilds the network beside its seed.

    Args:
        input_shape: shape of one sample, (d,) or (H, W[, C]); it is flattened for an mlp.
        hidden: widths of the hidden layers, e.g. (300, 100).
        outputs: width of the last layer; those beyond the classes are the superfluous neurons.
    """

    input_shape: tuple[int, ...]
    hidden: tuple[int, ...]
    outputs: int
    kind: str = "mlp"

    def __post_init__(self) -> None:
        if self.kind != "mlp":
            raise ValueError(f"unknown network kind {self.kind!r}, expected 'mlp'")
        if min((*self.input_shape, *self.hidden, self.outputs), default=0) < 1:
            raise ValueError(f"every width must be at least 1, got {self.widths}")

    @property
    def inputs(self) -> int:
        return math.prod(self.input_shape)

    @property
    def widths(self) -> tuple[int, ...]:
        return (self.inputs, *self.hidden, self.outputs)

    @cached_property
    def layers(self) -> tuple[LayerShape, ...]:
        shapes: list[LayerShape] = []
        offset = 0
        for columns, rows in zip(self.widths, self.widths[1:], strict=False):
            shapes.append(LayerShape(rows, columns, offset))
            offset += shapes[-1].nbytes
        return tuple(shapes)

    @property
    def mask_bytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers)

    @property
    def weights(self) -> int:
        return sum(layer.rows * layer.columns for layer in self.layers)

    def to_json(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "input_shape": list(self.input_shape),
            "hidden": list(self.hidden),
            "outputs": self.outputs,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Architecture:
        return cls(tuple(data["input_shape"]), tuple(data["hidden"]), int(data["outputs"]), str(data["kind"]))


def layer_signs(seed: int, index: int, shape: LayerShape) -> np.ndarray:
    """The sign bits of layer `index`, bool (rows, columns); True is +c.

    The layer's own Philox stream (counter word 3 = layer index) fills the rows in order, one bit a weight, lowest
    bit of each little-endian 64-bit word first.
    """
    count = shape.rows * shape.columns
    stream = np.random.Philox(key=seed, counter=[0, 0, 0, index])
    words = np.asarray(stream.random_raw((count + 63) // 64), dtype="<u8")
    bits = np.unpackbits(words.view(np.uint8), bitorder="little", count=count)
    return bits.astype(bool).reshape(shape.rows, shape.columns)


def pack_rows(bits: np.ndarray) -> np.ndarray:
    """Bool (rows, columns) to uint8 (rows, row_bytes), lowest bit first, zero-filled at each row's end."""
    return np.packbits(bits, axis=1, bitorder="little")


class Network:
    """The fixed network on one device, and the ways to run it under a mask.

    Args:
        architecture: the shapes.
        seed: 0 <= seed < 2**64.
        device: where `forward` runs.
    """

    def __init__(self, architecture: Architecture, seed: int, device: torch.device | str = "cpu") -> None:
        self.architecture = architecture
        self.seed = seed
        self.device = torch.device(device)
        packed: list[np.ndarray] = []
        self.weights: tuple[Tensor, ...] = ()
        for index, shape in enumerate(architecture.layers):
            signs = layer_signs(seed, index, shape)
            packed.append(pack_rows(signs).reshape(-1))
            dense = np.where(signs, np.float32(shape.constant), np.float32(-shape.constant))
            self.weights += (torch.from_numpy(dense).to(self.device),)
        self.packed_signs = np.concatenate(packed)
        self._shifts = torch.arange(8, dtype=torch.uint8, device=self.device)

    @cached_property
    def sha256(self) -> str:
        """Hash of the shapes and all sign bits: every stored mask depends on exactly this."""
        digest = hashlib.sha256(repr(self.architecture.widths).encode())
        digest.update(self.packed_signs.tobytes())
        return digest.hexdigest()

    def verify(self, expected: str) -> None:
        """Raises NetworkMismatch unless the sign bits are those that the store was made with."""
        if self.sha256 != expected:
            raise NetworkMismatch(
                f"network: seed {self.seed} gives signs with SHA-256 {self.sha256[:16]}…, the store expects "
                f"{expected[:16]}…; its masks would be meaningless here"
            )

    def pack(self, masks: list[Tensor]) -> np.ndarray:
        """One bool tensor (rows, columns) per layer to the packed mask, uint8 (mask_bytes,)."""
        return np.concatenate([pack_rows(mask.cpu().numpy()).reshape(-1) for mask in masks])

    def unpack(self, packed: np.ndarray) -> list[Tensor]:
        """The packed mask, uint8 (mask_bytes,), to one bool tensor (rows, columns) per layer."""
        data = torch.from_numpy(np.ascontiguousarray(packed)).to(self.device)
        masks = []
        for shape in self.architecture.layers:
            rows = data[shape.offset : shape.offset + shape.nbytes].view(shape.rows, shape.row_bytes, 1)
            bits = (rows >> self._shifts) & 1
            masks.append(bits.view(shape.rows, -1)[:, : shape.columns].bool())
        return masks

    def masked_weights(self, packed: np.ndarray) -> list[Tensor]:
        """Effective weights W ⊙ M of one mask, a float32 tensor (rows, columns) per layer."""
        if self.device.type == "cpu":
            return [
                torch.from_numpy(self._bits(packed, shape) * weight.numpy())
                for shape, weight in zip(self.architecture.layers, self.weights, strict=True)
            ]
        masks = self.unpack(packed)
        return [torch.where(mask, weight, 0.0) for mask, weight in zip(masks, self.weights, strict=True)]

    def _bits(self, packed: np.ndarray, shape: LayerShape) -> np.ndarray:
        rows = packed[shape.offset : shape.offset + shape.nbytes].reshape(shape.rows, shape.row_bytes)
        return np.unpackbits(rows, axis=1, bitorder="little", count=shape.columns)

    def run(self, x: Tensor, weights: list[Tensor]) -> Tensor:
        """Logits (n, outputs) of x (n, inputs) under the given effective weights; ReLU between layers."""
        for weight in weights[:-1]:
            x = torch.relu(x @ weight.T)
        return x @ weights[-1].T

    def forward(self, x: Tensor, packed: np.ndarray) -> Tensor:
        """Logits (n, outputs) of x (n, inputs) under one packed mask."""
        return self.run(x, self.masked_weights(packed))
