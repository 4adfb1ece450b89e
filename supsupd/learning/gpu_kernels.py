"""Masks on a GPU: logits under every mask of a bank, bank times vector, one mask's weights, and a training step.

Plain functions on tensors. On a GPU with Triton they launch `gpu_programs`; elsewhere torch does the same, operation
by operation, and that is also what the programs are held against (`*_by_torch`). Triton compiles a program at its
first use and keeps it on disk; `warm_up` does so for a network. With TRITON_INTERPRET=1 in the environment the programs
run on the CPU, value by value, in Triton's interpreter.

Precision. Activations are the sum of two bfloat16, which leaves a relative error of 2^-17 at most; the kept weights are
±2 exactly, with the layer's constant multiplied in at the end, or two bfloat16 as well where a network is not signed;
sums are float32. Bank times vector sums integers, exactly: each float32 value in units of 2^-29 of the power of two at
or below the greatest of its 16,384 columns.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from supsupd.learning.gpu_layers import FixedLayer, find_programs, in_planes
from supsupd.learning.optimiser import Layer, Step, step_by_torch

CHUNK_BYTES = 1 << 28
"""Activations of hidden units in memory at a time."""
BYTES = 8
"""Of a mask's row per step: each is an operand of 16 columns, the narrowest, in each of four planes."""
CHUNK, CHUNK_STEP = 2048, 128
"""Bytes of a mask that one program sums, and at a time: a cache line."""
BLOCK = 1024
WARM_UP_ROWS = (1, 16, 32, 64)
"""One number of samples for each width of a tile."""
OPTIONS: dict[str, Any] = {"enable_fp_fusion": False}


# (a) and (c): masked layers


def all_masks_logits(x: Tensor, bank: Tensor, layers: Sequence[FixedLayer], slots: Tensor | None = None) -> Tensor:
    """Logits, float32 (k, n, outputs), of x, float32 (n, inputs), under k masks, with ReLU between the layers.

    Args:
        bank: uint8 (capacity, mask_bytes or more), packed masks.
        slots: int64 (k,), rows of the bank in the order wanted; None: all of them.
    """
    slots = torch.arange(len(bank), device=bank.device) if slots is None else slots
    programs = find_programs(x)
    if programs is None or not (len(x) and len(slots)):
        return all_masks_logits_by_torch(x, bank, layers, slots)
    out = x.new_empty((len(slots), len(x), layers[-1].shape.rows))
    for part in _chunks(len(x), layers, len(slots)):
        _run_layers(programs, x, bank, layers, (slots[part], out[part]))
    return out


def all_masks_logits_by_torch(x: Tensor, bank: Tensor, layers: Sequence[FixedLayer], slots: Tensor) -> Tensor:
    """`all_masks_logits`, one mask at a time."""
    out = x.new_empty((len(slots), len(x), layers[-1].shape.rows))
    for logits, slot in zip(out, slots.tolist(), strict=True):
        values = x
        for layer, weight in zip(layers, effective_weights_by_torch(bank[slot], layers), strict=True):
            values = functional.linear(values if layer is layers[0] else values.relu(), weight)
        logits.copy_(values)
    return out


def masked_linear(x: Tensor, packed_rows: Tensor, layer: FixedLayer) -> Tensor:
    """x · (W ⊙ M)ᵀ, float32 (n, rows), of x, float32 (n, columns); packed_rows, uint8 (nbytes,): this layer's bits."""
    alone = replace(layer, shape=replace(layer.shape, offset=0))
    return all_masks_logits(x, packed_rows.view(1, -1), [alone])[0]


def _samples(n: int) -> int:
    """The samples of a tile, a power of two; beyond 64 there are more tiles."""
    return min(max(8, 1 << (n - 1).bit_length()), 64)


class _Tile(NamedTuple):
    """What one program computes."""

    rows: int
    samples: int
    options: Mapping[str, Any]

    @classmethod
    def of(cls, layer: FixedLayer, n: int) -> _Tile:
        rows, samples = layer.shape.rows, _samples(n)
        wide = layer.signed and samples < 64 and -rows % 256 < 128  # narrower tiles would be as full
        height = 256 if wide else 128
        # Two programs share the registers of a multiprocessor; dense weights fill its shared memory first.
        limits = {"num_stages": 4, "maxnreg": 128} if layer.signed else {"num_stages": 2}
        return cls(height, samples, {"num_warps": height * max(samples, 32) // 1024, **limits, **OPTIONS})


def _hidden_shape(layer: FixedLayer, masks: int, n: int) -> tuple[int, ...]:
    """Of a hidden layer's activations: masks, blocks of samples, planes, parts, samples, positions."""
    samples = _samples(n)
    return masks, math.ceil(n / samples), 4, 2, samples, math.ceil(layer.shape.rows / 64) * 16


def _chunks(n: int, layers: Sequence[FixedLayer], masks: int) -> Iterator[slice]:
    """Parts of the masks whose activations fit; multiples of 16 keep the logits' addresses aligned."""
    nbytes = max((2 * math.prod(_hidden_shape(layer, 1, n)) for layer in layers[:-1]), default=1)
    count = max(1, CHUNK_BYTES // (2 * nbytes))
    count = count // 16 * 16 or count
    return (slice(start, start + count) for start in range(0, masks, count))


def _run_layers(
    programs: Any, x: Tensor, bank: Tensor, layers: Sequence[FixedLayer], target: tuple[Tensor, Tensor]
) -> None:
    """Writes the logits (k, n, outputs) under the masks in some slots (k,); `target` is both."""
    slots, logits = target
    samples, n = _samples(len(x)), len(x)
    filled = in_planes(functional.pad(x, (0, 0, 0, -n % samples)), layers[0].parts)
    values = filled.unflatten(2, (-1, samples)).permute(2, 1, 0, 3, 4).contiguous()
    for layer in layers:
        last, shape = layer is layers[-1], layer.shape
        tile = _Tile.of(layer, n)
        out = logits if last else x.new_empty(_hidden_shape(layer, len(slots), n), dtype=layer.parts)
        grid = (math.ceil(shape.rows / tile.rows) * math.ceil(n / tile.samples) * len(slots),)
        programs.masked_layer[grid](
            *(values, bank[:, shape.offset :], slots, layer.operand, out, layer.scale),
            *(bank.stride(0), shape.rows, shape.row_bytes, n),
            SHARED=layer is layers[0],
            SIGNED=layer.signed,
            LAST=last,
            ROWS=tile.rows,
            SAMPLES=tile.samples,
            BYTES=BYTES,
            **tile.options,
        )
        values = out


# (b): bank times vector


def bank_times_vector(bank: Tensor, vector: Tensor, slots: Tensor | None = None) -> Tensor:
    """For each mask the sum of `vector` over its set bits, float32 (k,), the same bits in every run.

    Args:
        bank: uint8 (capacity, b or more), packed masks.
        vector: float32 (8 b,), finite; bits beyond it do not count.
        slots: int64 (k,), rows of the bank; None: all of them.
    """
    slots = torch.arange(len(bank), device=bank.device) if slots is None else slots
    programs = find_programs(bank)
    if programs is None or not (len(slots) and len(vector)):
        return bank_times_vector_by_torch(bank, vector, slots)
    vector, chunks = vector.contiguous(), math.ceil(len(vector) / (8 * CHUNK))
    digits = bank.new_empty((chunks, 8, 4, CHUNK), dtype=torch.int8)
    units = bank.new_empty(chunks, dtype=torch.float64)
    programs.split_vector[(chunks,)](vector, digits, units, len(vector), CHUNK=CHUNK, num_warps=16, **OPTIONS)
    unit = math.gcd(bank.stride(0), bank.data_ptr(), 16)
    masks = 64 if unit == 16 else 32  # narrower reads need more registers
    sums = bank.new_empty((chunks, len(slots)), dtype=torch.float64)
    programs.bank_times_digits[(math.ceil(len(slots) / masks) * chunks,)](
        *(bank, slots, digits, units, sums, len(slots)),
        *(bank.stride(0) // unit, math.ceil(len(vector) / (8 * unit))),
        UNIT=unit,
        CHUNK=CHUNK,
        MASKS=masks,
        BYTES=CHUNK_STEP,
        num_warps=2,
        num_stages=3,
        **OPTIONS,
    )
    return sums.sum(dim=0).float()


def bank_times_vector_by_torch(bank: Tensor, vector: Tensor, slots: Tensor) -> Tensor:
    """`bank_times_vector`, one mask at a time, in float64."""
    shifts = torch.arange(8, dtype=torch.uint8, device=bank.device)
    out = vector.new_empty(len(slots))
    for place, slot in enumerate(slots.tolist()):
        bits = (bank[slot, : len(vector) // 8, None] >> shifts) & 1
        out[place] = bits.view(-1).double() @ vector.double()
    return out


# one mask's weights, and a training step


def effective_weights(packed: Tensor, layers: Sequence[FixedLayer]) -> list[Tensor]:
    """W ⊙ M of one mask, uint8 (mask_bytes,): float32 (rows, columns) for each layer."""
    programs = find_programs(packed)
    if programs is None:
        return effective_weights_by_torch(packed, layers)
    found = []
    for layer in layers:
        shape, out = layer.shape, torch.empty_like(layer.weight)
        grid = (math.ceil(shape.rows / 16) * math.ceil(shape.row_bytes / 32),)
        bits = packed[shape.offset :]
        programs.keep_weights[grid](
            bits, layer.weight, out, shape.rows, shape.columns, ROWS=16, BYTES=32, num_warps=4, **OPTIONS
        )
        found.append(out)
    return found


def effective_weights_by_torch(packed: Tensor, layers: Sequence[FixedLayer]) -> list[Tensor]:
    """`effective_weights`, operation by operation."""
    return [torch.where(layer.bits(packed), layer.weight, 0.0) for layer in layers]


def fused_rmsprop(layer: Layer[Tensor], gradient: Tensor, step: Step, out: Tensor) -> None:
    """`optimiser.take_step` by RMSProp under the threshold rule, and the effective weights that follow in `out`.

    All float32 and of one shape, all but the gradient contiguous; it is that of the effective weights. Raises
    ValueError for another optimiser or rule.
    """
    if step.adam or step.signed:
        raise ValueError("the fused step is RMSProp under the threshold rule")
    programs = find_programs(gradient)
    if programs is None:
        fused_rmsprop_by_torch(layer, gradient, step, out)
        return
    programs.rmsprop[(math.ceil(out.numel() / BLOCK),)](
        *(gradient.contiguous(), layer.weight, layer.scores, layer.average, layer.second, out),
        *(out.numel(), step.lr, step.share),
        DECAY=step.decay,
        EPSILON=step.epsilon,
        BLOCK=BLOCK,
        num_warps=4,
        **OPTIONS,
    )


def fused_rmsprop_by_torch(layer: Layer[Tensor], gradient: Tensor, step: Step, out: Tensor) -> None:
    """`fused_rmsprop`, operation by operation."""
    step_by_torch(layer, gradient, step)
    torch.mul(layer.weight, layer.scores >= 0, out=out)


def warm_up(layers: Sequence[FixedLayer], mask_bytes: int, rows: Sequence[int] = WARM_UP_ROWS) -> None:
    """Compiles everything for these layers and masks of so many bytes, so that no query pays for it.

    Args:
        rows: numbers of samples to expect; those up to 8, 16, 32, and all beyond, have a program each.
    """
    device = layers[0].weight.device
    bank = torch.zeros((1, mask_bytes), dtype=torch.uint8, device=device)
    for n in rows:
        all_masks_logits(torch.zeros((n, layers[0].shape.columns), device=device), bank, layers)
    bits = sum(layer.shape.nbytes for layer in layers)
    bank_times_vector(bank, torch.zeros(8 * bits, device=device))
    effective_weights(bank[0], layers)
    for layer in layers:
        tensors = [torch.zeros_like(layer.weight) for _ in range(6)]
        fused_rmsprop(
            Layer(*tensors[:5]), tensors[5], Step.of("rmsprop", "threshold", 1), torch.zeros_like(layer.weight)
        )
