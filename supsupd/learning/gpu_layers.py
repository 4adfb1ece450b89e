"""The fixed weights of a network as the programs on a GPU read them, and whether there are such programs."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from supsupd.learning.network import LayerShape

LEAST_CAPABILITY = (8, 0)
"""Of a GPU that multiplies bfloat16."""


def find_programs(tensor: Tensor) -> Any:
    """The module with the programs if they can run on the tensor's device, else None."""
    if tensor.is_cuda:
        able = torch.version.cuda is not None and torch.cuda.get_device_capability(tensor.device) >= LEAST_CAPABILITY
    else:
        able = os.environ.get("TRITON_INTERPRET") == "1"
    if not able or importlib.util.find_spec("triton") is None:
        return None
    from supsupd.learning import gpu_programs

    return gpu_programs


@dataclass(frozen=True)
class FixedLayer:
    """The fixed weights of one layer, and how the programs read them.

    Args:
        shape: the layer's place in a packed mask.
        weight: float32 (rows, columns).
        operand: of a signed layer the packed bits of its negative weights, uint8 (rows, row_bytes); else the weights in
            planes of two parts, (2, 4, rows, width).
        scale: what a signed layer's sums over ±2 are multiplied by.
        parts: the type of each of the two parts.
    """

    shape: LayerShape
    weight: Tensor
    operand: Tensor
    scale: float
    parts: torch.dtype

    @classmethod
    def of(cls, weight: Tensor, shape: LayerShape, parts: torch.dtype = torch.bfloat16) -> FixedLayer:
        """On the weight's device. Triton's interpreter multiplies no bfloat16, only float16."""
        constant = weight.abs().amax()
        if bool((weight.abs() == constant).all()):
            return cls(shape, weight, pack_bits(weight < 0), float(constant) / 2.0, parts)
        return cls(shape, weight, in_planes(weight, parts).contiguous(), 1.0, parts)

    @property
    def signed(self) -> bool:
        return self.operand.dtype == torch.uint8

    def bits(self, packed: Tensor) -> Tensor:
        """The layer's mask, bool (rows, columns), in a packed mask, uint8 (mask_bytes,)."""
        shape = self.shape
        rows = packed[shape.offset : shape.offset + shape.nbytes].view(shape.rows, shape.row_bytes, 1)
        bits = (rows >> torch.arange(8, dtype=torch.uint8, device=packed.device)) & 1
        return bits.view(shape.rows, -1)[:, : shape.columns].bool()


def fixed_layers(
    weights: Sequence[Tensor], shapes: Sequence[LayerShape], parts: torch.dtype = torch.bfloat16
) -> tuple[FixedLayer, ...]:
    """A network's masked weights, float32 (rows, columns) each: made once, used in every call."""
    return tuple(FixedLayer.of(w.contiguous(), s, parts) for w, s in zip(weights, shapes, strict=True))


def pack_bits(bits: Tensor) -> Tensor:
    """Bool (rows, columns) to uint8 (rows, row_bytes), lowest bit first, zero-filled at each row's end."""
    padded = functional.pad(bits, (0, -bits.shape[1] % 8)).view(len(bits), -1, 8)
    return (padded << torch.arange(8, device=bits.device)).sum(dim=-1).to(torch.uint8)


def in_planes(matrix: Tensor, parts: torch.dtype) -> Tensor:
    """Float32 (rows, columns) as two parts that add up to it, (2, 4, rows, width).

    Column c is in plane c % 4 at c // 4; what fills up the planes is 0.
    """
    padded = functional.pad(matrix, (0, -matrix.shape[1] % 64))
    high = padded.to(parts)
    both = torch.stack([high, (padded - high.float()).to(parts)])
    return both.view(2, len(matrix), -1, 4).permute(0, 3, 1, 2)
