"""Masks on a GPU: one buffer, appended in place, that follows the masks which are in use.

A mask is copied there when it is first looked at, and its place is free again when nobody holds it any more. Whatever
is queued on the GPU runs in order, so that a place is written anew only after those who still read it.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from supsupd.learning import gpu_kernels
from supsupd.learning.bank import READ_MASKS, Mask, Masks
from supsupd.learning.gpu_layers import fixed_layers
from supsupd.learning.network import Network

FIRST_CAPACITY = 64
ALIGNMENT = 16
"""Bytes: rows that begin at a multiple of it are read fastest."""


class DeviceBank:
    """The buffer.

    Args:
        mask_bytes: of a packed mask.
        device: where it lies.
    """

    def __init__(self, mask_bytes: int, device: torch.device) -> None:
        self._mask_bytes = mask_bytes
        stride = -(-mask_bytes // ALIGNMENT) * ALIGNMENT
        self._buffer = torch.zeros((FIRST_CAPACITY, stride), dtype=torch.uint8, device=device)
        self._places: weakref.WeakKeyDictionary[Mask, int] = weakref.WeakKeyDictionary()
        self._free = list(range(FIRST_CAPACITY))
        self._lock = threading.Lock()

    def hold(self, masks: Masks) -> tuple[Tensor, Tensor]:
        """The buffer, uint8 (capacity, at least mask_bytes), and the masks' rows in it, int64 (k,)."""
        with self._lock:
            missing = [mask for mask in masks if mask not in self._places]
            for start in range(0, len(missing), READ_MASKS):
                self._add(missing[start : start + READ_MASKS])
            rows = [self._places[mask] for mask in masks]
            return self._buffer, torch.tensor(rows, dtype=torch.int64, device=self._buffer.device)

    def _add(self, masks: Sequence[Mask]) -> None:
        while len(self._free) < len(masks):
            count = len(self._buffer)
            self._free.extend(range(count, 2 * count))
            self._buffer = torch.cat([self._buffer, torch.zeros_like(self._buffer)])
        places = [self._free.pop() for _ in masks]
        packed = torch.from_numpy(np.stack(Masks(masks).load(retain=False).arrays))
        rows = torch.tensor(places, device=self._buffer.device)
        self._buffer[rows, : self._mask_bytes] = packed.to(self._buffer.device)
        for mask, place in zip(masks, places, strict=True):
            self._places[mask] = place
            weakref.finalize(mask, self._free.append, place)


class DeviceScorer:
    """What the CPU's kernels do, on the device of a network of linear layers."""

    def __init__(self, network: Network) -> None:
        architecture = network.architecture
        self._layers = fixed_layers(network.weights, architecture.layers)
        self._bit_bytes = architecture.bit_bytes
        self._bank = DeviceBank(architecture.mask_bytes, network.device)

    def warm_up(self) -> None:
        """Compiles the programs."""
        gpu_kernels.warm_up(self._layers, self._bit_bytes)

    def logits(self, x: Tensor, masks: Masks) -> Tensor:
        """Logits, float32 (k, n, outputs), of x (n, inputs) under every mask."""
        buffer, rows = self._bank.hold(masks)
        return gpu_kernels.all_masks_logits(x, buffer, self._layers, rows)

    def products(self, masks: Masks, vector: Tensor) -> Tensor:
        """For each mask the sum of `vector`, float32 (8 bit_bytes,), over its set bits, float32 (k,)."""
        buffer, rows = self._bank.hold(masks)
        return gpu_kernels.bank_times_vector(buffer, vector, rows)
