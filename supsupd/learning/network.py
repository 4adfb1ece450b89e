"""The fixed random network: weights that never train and are never stored, only their seed and their hash.

Each weight is ±c with c the Kaiming standard deviation of its layer, sqrt(2 / fan_in), and the bias is 0
("signed Kaiming constant", Supermasks in Superposition, section 3.1). A weight is therefore one sign bit, and the
sign bits are the raw words of NumPy's Philox generator, whose stream is frozen: the same seed gives the same
network on every device, library version and year. Weights may also come from a pretrained file (Piggyback).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from supsupd.learning.bodies import Body, BodyShape, Tensors, TensorSpec, make_body
from supsupd.learning.kernels import unpack
from supsupd.learning.modules import Norm
from supsupd.learning.pretrained import Pretrained
from supsupd.sections import FLOAT_BYTES

DEFAULT_HIDDEN: dict[str, tuple[int, ...]] = {"mlp": (300, 100), "units": (2048, 2048)}
CONV_HIDDEN = (256, 256)
PART_VALUES = 1 << 23
"""Values that a layer makes at once of rows that are not trained on: 32 MiB, and two or three layers are held."""
FEATURES = 1024
"""Their covariance has so many rows and columns: 4 MiB in float32."""


class NetworkMismatch(Exception):
    """The network that the seed gives is not the one that the stored masks were trained on."""


@dataclass(frozen=True, slots=True)
class LayerShape:
    """One masked tensor: its bits as (rows, columns), and their place in the packed bytes.

    A row is what one output unit or channel reads: columns is the fan-in. Every row of a mask starts at a byte of its
    own; the bits that fill a row's last byte are zero.
    """

    rows: int
    columns: int
    offset: int
    shape: tuple[int, ...] = ()

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
    """What rebuilds the network beside its seed. Raises UnsupportedNetwork when there is none like it.

    Args:
        input_shape: shape of one sample, (d,), (H, W) or (H, W, C); rows come flattened.
        hidden: widths of the hidden linear layers, e.g. (300, 100).
        outputs: width of the last layer; those beyond the classes are the superfluous neurons.
        kind: mlp, units, conv, conv2, conv4, conv6, resnet18-gem, or a torchvision classification model.
        width: factor on the channels of the conv networks and of resnet18-gem.
        norm: the normalisation between convolutions (`modules`).
        channels: of the convolutions of a conv network, 0 for a pooling; (): its kind's own.
    """

    input_shape: tuple[int, ...]
    hidden: tuple[int, ...]
    outputs: int
    kind: str = "mlp"
    width: float = 1.0
    norm: Norm = "none"
    channels: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if min((*self.input_shape, *self.hidden, self.outputs), default=0) < 1:
            raise ValueError(f"every width must be at least 1, got {self.widths}")
        _ = self.body

    @classmethod
    def of_kind(cls, kind: str, input_shape: tuple[int, ...], outputs: int, **changes: Any) -> Architecture:
        """With the kind's own defaults where `changes` (hidden, width, norm) are absent or None."""
        hidden = DEFAULT_HIDDEN.get(kind, CONV_HIDDEN if kind.startswith("conv") else ())
        norm = "none" if kind == "mlp" else "group"
        fields: dict[str, Any] = {"hidden": hidden, "norm": norm}
        fields |= {name: value for name, value in changes.items() if value is not None}
        return cls(input_shape=input_shape, outputs=outputs, kind=kind, **fields)

    @property
    def inputs(self) -> int:
        return math.prod(self.input_shape)

    @property
    def widths(self) -> tuple[int, ...]:
        """Of the linear layers of an mlp; of other kinds only the ends mean anything."""
        return (self.inputs, *self.hidden, self.outputs)

    @cached_property
    def body(self) -> Body:
        """How it computes. Shared by all threads."""
        fields = (self.kind, self.input_shape, self.hidden, self.outputs, self.channels, self.width, self.norm)
        return make_body(BodyShape(*fields))

    @cached_property
    def layers(self) -> tuple[LayerShape, ...]:
        """The masked tensors in the order of use."""
        shapes: list[LayerShape] = []
        offset = 0
        for spec in self.body.masked:
            rows, columns = _matrix(spec.shape)
            shapes.append(LayerShape(rows, columns, offset, spec.shape))
            offset += shapes[-1].nbytes
        return tuple(shapes)

    @property
    def row_alone(self) -> bool:
        """Whether a single row has an answer: units normalised over the rows at hand are all 0 for one."""
        return not (self.kind == "units" and self.norm == "batch")

    @property
    def bit_bytes(self) -> int:
        """Bytes of a packed mask's bits."""
        return sum(layer.nbytes for layer in self.layers)

    @property
    def statistic_bytes(self) -> int:
        """Bytes of the normalisation statistics that each task keeps (float32); 0 unless norm is "task"."""
        return FLOAT_BYTES * sum(self.body.statistics)

    @property
    def mask_bytes(self) -> int:
        """Bytes of a packed mask as it is kept in memory: bits, then statistics."""
        return self.bit_bytes + self.statistic_bytes

    @property
    def weights(self) -> int:
        """How many weights (or units) a mask has a bit for."""
        return sum(layer.rows * layer.columns for layer in self.layers)

    def to_json(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "input_shape": list(self.input_shape),
            "hidden": list(self.hidden),
            "outputs": self.outputs,
            "width": self.width,
            "norm": self.norm,
            "channels": list(self.channels),
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Architecture:
        """Also of what version 0.1 stored, which had neither width nor norm."""
        return cls(
            input_shape=tuple(data["input_shape"]),
            hidden=tuple(data["hidden"]),
            outputs=int(data["outputs"]),
            kind=str(data["kind"]),
            width=float(data.get("width", 1.0)),
            norm=data.get("norm", "none"),
            channels=tuple(data.get("channels", ())),
        )


def _matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    return shape[0], math.prod(shape[1:])


class _RowValues(TorchFunctionMode):
    """Sees how many values the largest tensor made inside has that holds something for each of `rows` rows."""

    rows = 11

    def __init__(self) -> None:
        super().__init__()
        self.values = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, Tensor) and made.shape[:1] == (self.rows,):
            self.values = max(self.values, made.numel())
        return made


def layer_signs(seed: int, index: int, rows: int, columns: int) -> np.ndarray:
    """The sign bits of tensor `index`, bool (rows, columns); True is +c.

    The tensor's own Philox stream (counter word 3 = index) fills the rows in order, one bit a weight, lowest bit of
    each little-endian 64-bit word first.
    """
    count = rows * columns
    stream = np.random.Philox(key=seed, counter=[0, 0, 0, index])
    words = np.asarray(stream.random_raw((count + 63) // 64), dtype="<u8")
    bits = np.unpackbits(words.view(np.uint8), bitorder="little", count=count)
    return bits.astype(bool).reshape(rows, columns)


def pack_rows(bits: np.ndarray) -> np.ndarray:
    """Bool (rows, columns) to uint8 (rows, row_bytes), lowest bit first, zero-filled at each row's end."""
    return np.packbits(bits, axis=1, bitorder="little")


class Network:
    """The fixed network on one device, and the ways to run it under a mask.

    Args:
        architecture: the shapes.
        seed: 0 <= seed < 2**64.
        device: where `forward` runs.
        pretrained: weights to use instead of signs; the tensors that it lacks keep their signs. Raises
            PretrainedMismatch for tensors of another shape.
    """

    def __init__(
        self,
        architecture: Architecture,
        seed: int,
        device: torch.device | str = "cpu",
        pretrained: Pretrained | None = None,
    ) -> None:
        self.architecture = architecture
        self.seed = seed
        self.device = torch.device(device)
        self.pretrained = pretrained
        body = architecture.body
        if pretrained is not None:
            pretrained.check((*body.masked, *body.fixed))
        self._packed: list[np.ndarray] = []
        masked = [self._values(index, spec) for index, spec in enumerate(body.masked)]
        self.weights: tuple[Tensor, ...] = tuple(
            value.view(_matrix(spec.shape)) for spec, value in zip(body.masked, masked, strict=True)
        )
        count = len(body.masked) if any(spec.value is None for spec in body.masked) else 0
        self.fixed: tuple[Tensor, ...] = tuple(
            self._values(count + index, spec) for index, spec in enumerate(body.fixed)
        )
        self.packed_signs = np.concatenate([*self._packed, np.empty(0, np.uint8)])
        self._shifts = torch.arange(8, dtype=torch.uint8, device=self.device)

    def _values(self, index: int, spec: TensorSpec) -> Tensor:
        """A tensor of its natural shape: from the pretrained file, a constant, or signs."""
        if self.pretrained is not None and (tensor := self.pretrained.get(spec.name)) is not None:
            return tensor.to(self.device)
        if isinstance(spec.value, Tensor):
            return spec.value.to(self.device)
        if spec.value is not None:
            return torch.full(spec.shape, spec.value, device=self.device)
        rows, columns = _matrix(spec.shape)
        signs = layer_signs(self.seed, index, rows, columns)
        self._packed.append(pack_rows(signs).reshape(-1))
        constant = np.float32(math.sqrt(2.0 / columns))
        dense = np.where(signs, constant, -constant)
        return torch.from_numpy(dense).view(spec.shape).to(self.device)

    @property
    def signed(self) -> bool:
        """Whether every masked weight is ± its layer's constant, by the bits in `packed_signs`."""
        return self.pretrained is None and all(spec.value is None for spec in self.architecture.body.masked)

    @cached_property
    def sha256(self) -> str:
        """Hash of the shapes, all sign bits and a pretrained file's tensors: every stored mask depends on exactly
        this."""
        architecture = self.architecture
        named = {k: v for k, v in architecture.to_json().items() if k != "input_shape"}
        text = repr(architecture.widths) if architecture.kind == "mlp" else json.dumps(named, sort_keys=True)
        digest = hashlib.sha256(text.encode())
        digest.update(self.packed_signs.tobytes())
        if self.pretrained is not None:
            digest.update(self.pretrained.sha256.encode())
        return digest.hexdigest()

    def verify(self, expected: str) -> None:
        """Raises NetworkMismatch unless the weights are those that the store was made with."""
        if self.sha256 != expected:
            source = f"seed {self.seed}" + (f" and {self.pretrained.path}" if self.pretrained is not None else "")
            raise NetworkMismatch(
                f"network: {source} gives weights with SHA-256 {self.sha256[:16]}…, the store expects "
                f"{expected[:16]}…; its masks would be meaningless here"
            )

    def pack(self, masks: list[Tensor], statistics: Sequence[Tensor] = ()) -> np.ndarray:
        """One bool tensor (rows, columns) per layer, and the task's statistics, to the packed mask,
        uint8 (mask_bytes,)."""
        bits = [pack_rows(mask.cpu().numpy()).reshape(-1) for mask in masks]
        floats = [vector.cpu().numpy().astype("<f4").view(np.uint8) for vector in statistics]
        return np.concatenate([*bits, *floats])

    def density(self, masks: list[Tensor]) -> float:
        """The fraction of weights (or units) that bool masks (rows, columns) keep."""
        return sum(int(mask.sum()) for mask in masks) / self.architecture.weights

    def unpack(self, packed: np.ndarray) -> list[Tensor]:
        """The packed mask, uint8 (mask_bytes,), to one bool tensor (rows, columns) per layer."""
        data = torch.from_numpy(np.array(packed)).to(self.device)
        masks = []
        for shape in self.architecture.layers:
            rows = data[shape.offset : shape.offset + shape.nbytes].view(shape.rows, shape.row_bytes, 1)
            bits = (rows >> self._shifts) & 1
            masks.append(bits.view(shape.rows, -1)[:, : shape.columns].bool())
        return masks

    def statistics(self, packed: np.ndarray) -> list[Tensor]:
        """The task's normalisation statistics in a packed mask, a float32 vector each; [] unless norm is "task"."""
        lengths = self.architecture.body.statistics
        floats = np.array(packed[self.architecture.bit_bytes :]).view("<f4").astype(np.float32)
        return [t.to(self.device) for t in torch.from_numpy(floats).split(list(lengths))] if lengths else []

    def masked_weights(self, packed: np.ndarray) -> list[Tensor]:
        """Effective weights W ⊙ M of one mask, a float32 tensor (rows, columns) per layer."""
        if self.device.type == "cpu":
            layers = zip(self.architecture.layers, self.weights, strict=True)
            return [torch.from_numpy(unpack(self._bits(packed, shape), weight.numpy())) for shape, weight in layers]
        masks = self.unpack(packed)
        return [torch.where(mask, weight, 0.0) for mask, weight in zip(masks, self.weights, strict=True)]

    def _bits(self, packed: np.ndarray, shape: LayerShape) -> np.ndarray:
        """The packed bits of one layer, uint8 (rows, row_bytes)."""
        return packed[shape.offset : shape.offset + shape.nbytes].reshape(shape.rows, shape.row_bytes)

    def run(
        self, x: Tensor, weights: Sequence[Tensor], statistics: Sequence[Tensor] = (), training: bool = False
    ) -> Tensor:
        """Logits (n, outputs) of x (n, inputs) under the given effective weights and statistics.

        In training a task's statistics are updated in place, and the batch's own are used. Otherwise many rows go
        through a part at a time, unless they depend on each other.
        """
        body, tensors = self.architecture.body, Tensors(weights, self.fixed, statistics)
        if training or len(x) <= self._part_rows or self.architecture.norm == "batch":
            return body.run(x, tensors, training)
        return torch.cat([body.run(part, tensors, training) for part in x.split(self._part_rows)])

    @cached_property
    def _part_rows(self) -> int:
        """As many rows as may go through the layers at once, by the widest layer."""
        with _RowValues() as made, torch.no_grad():
            x = torch.zeros(_RowValues.rows, self.architecture.inputs, device=self.device)
            statistics = [torch.zeros(length, device=self.device) for length in self.architecture.body.statistics]
            self.architecture.body.run(x, Tensors(self.weights, self.fixed, statistics), training=False)
        return max(1, PART_VALUES * _RowValues.rows // made.values)

    @torch.no_grad()
    def features(self, x: Tensor) -> Tensor:
        """What the whole, unmasked network makes of x (n, inputs), (n, d): its first layers, up to FEATURES in all.

        Raises UnsupportedNetwork where a row has no features of its own.
        """
        layers = self.architecture.body.features(x, Tensors(self.weights, self.fixed))
        sizes = np.cumsum([layer.shape[1] for layer in layers])
        return torch.cat(layers[: max(1, int((sizes <= FEATURES).sum()))], dim=1)

    def forward(self, x: Tensor, packed: np.ndarray) -> Tensor:
        """Logits (n, outputs) of x (n, inputs) under one packed mask."""
        return self.run(x, self.masked_weights(packed), self.statistics(packed))
