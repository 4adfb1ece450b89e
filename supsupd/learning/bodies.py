"""How a network of each kind runs: from inputs and effective weights to logits.

A body owns no weights. It names the tensors that are masked, those that are fixed, and the statistics that a task
keeps, and computes logits from them; `network.Network` makes the tensors.
"""

from __future__ import annotations

import copy
import itertools
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from supsupd.learning.modules import (
    CONV_CHANNELS,
    GEM_CHANNELS,
    ConvNet,
    GemResNet18,
    Norm,
    UnsupportedNetwork,
    conv_channels,
    torchvision_model,
)

RGB = 3
BATCH_EPSILON = 1e-5


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor that a body uses.

    Args:
        name: its name in a pretrained file.
        shape: as the body uses it; the first axis counts outputs.
        value: what it holds, a constant or a table of torchvision's; None: random signs times the layer's constant.
    """

    name: str
    shape: tuple[int, ...]
    value: float | Tensor | None = None


class Body(Protocol):
    """The computation of one kind of network.

    Args:
        masked: the tensors that a mask selects from, in the order of use.
        fixed: the tensors that all tasks share as they are.
        statistics: lengths of the vectors that each task keeps for itself (means and variances, in turn).
    """

    masked: tuple[TensorSpec, ...]
    fixed: tuple[TensorSpec, ...]
    statistics: tuple[int, ...]

    def run(self, x: Tensor, tensors: Tensors, training: bool) -> Tensor:
        """Logits (n, outputs) of x (n, inputs). In training the statistics given are updated in place."""

    def features(self, x: Tensor, tensors: Tensors) -> list[Tensor]:
        """What the layers make of x, (n, d) each, from the inputs on; images pooled to 2 x 2.

        Raises UnsupportedNetwork where a row's features would depend on its neighbours.
        """


@dataclass(frozen=True, slots=True)
class Tensors:
    """What a body runs on: effective weights (rows, columns) of the masked, the fixed, and a task's statistics."""

    masked: Sequence[Tensor]
    fixed: Sequence[Tensor] = ()
    statistics: Sequence[Tensor] = ()


class Mlp:
    """Linear layers with ReLU between them; every weight has its bit."""

    fixed: tuple[TensorSpec, ...] = ()
    statistics: tuple[int, ...] = ()

    def __init__(self, widths: tuple[int, ...]) -> None:
        self.masked = _linear_specs(widths)

    def run(self, x: Tensor, tensors: Tensors, training: bool) -> Tensor:
        for weight in tensors.masked[:-1]:
            x = torch.relu(x @ weight.T)
        return x @ tensors.masked[-1].T

    def features(self, x: Tensor, tensors: Tensors) -> list[Tensor]:
        found = []
        for weight in tensors.masked[:-1]:
            x = torch.relu(x @ weight.T)
            found.append(x)
        return found or [x]


class Units:
    """Linear layers whose hidden units have one bit each; all weights are kept (the paper's HopSupSup).

    Each hidden layer is normalised without running statistics and goes through Swish, the bit between them: a unit that
    is left out gives 0, and its score is trained by how it is linked to the loss around 0, alike for both signs.

    Args:
        widths: of all layers, inputs and outputs included.
        norm: group: each row by itself, over a layer's units; batch: each unit over the rows at hand (the paper's).
    """

    statistics: tuple[int, ...] = ()

    def __init__(self, widths: tuple[int, ...], norm: Norm) -> None:
        hidden = widths[1:-1]
        if not hidden:
            raise UnsupportedNetwork("a network of masked units needs a hidden layer")
        if norm not in ("group", "batch"):
            raise UnsupportedNetwork(f"units are normalised by 'group' or 'batch', not {norm!r}")
        self._axis = 1 if norm == "group" else 0
        self.fixed = _linear_specs(widths)
        self.masked = tuple(TensorSpec(f"units{i}", (1, width), value=1.0) for i, width in enumerate(hidden))

    def run(self, x: Tensor, tensors: Tensors, training: bool) -> Tensor:
        return self._hidden(x, tensors)[-1] @ tensors.fixed[-1].T

    def features(self, x: Tensor, tensors: Tensors) -> list[Tensor]:
        if self._axis == 0:
            raise UnsupportedNetwork("units normalised by the batch: a row has no features of its own")
        return self._hidden(x, tensors)

    def _hidden(self, x: Tensor, tensors: Tensors) -> list[Tensor]:
        """What each hidden layer makes of x."""
        found = []
        for weight, units in zip(tensors.fixed, tensors.masked, strict=False):
            x = functional.silu(_normalised(x @ weight.T, self._axis) * units)
            found.append(x)
        return found


def _normalised(x: Tensor, axis: int) -> Tensor:
    variance, mean = torch.var_mean(x, dim=axis, correction=0, keepdim=True)
    return (x - mean) * torch.rsqrt(variance + BATCH_EPSILON)


def _linear_specs(widths: tuple[int, ...]) -> tuple[TensorSpec, ...]:
    return tuple(
        TensorSpec(f"layers.{i}.weight", (after, before))
        for i, (before, after) in enumerate(itertools.pairwise(widths))
    )


class ModuleBody:
    """A torch module: its Conv2d and Linear weights are masked, everything else is fixed.

    Args:
        module: the skeleton; its own parameters are never used.
        image: (height, width, channels) of a row as it comes, flattened.
        channels: that the module wants; a grey image is repeated.
    """

    def __init__(self, module: nn.Module, image: tuple[int, int, int], channels: int) -> None:
        self._image = image
        self._channels = channels
        layers = {name: m for name, m in module.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
        if not layers:
            raise UnsupportedNetwork("the network has no maskable layer: neither Conv2d nor Linear")
        self.masked = tuple(TensorSpec(f"{name}.weight", tuple(m.weight.shape)) for name, m in layers.items())
        names = {spec.name for spec in self.masked}
        norms = [(name, m) for name, m in module.named_modules() if isinstance(m, nn.BatchNorm2d)]
        kept = [(name, m) for name, m in norms if m.track_running_stats and not m.affine]
        self._statistics = [f"{name}.{part}" for name, _ in kept for part in ("running_mean", "running_var")]
        self.statistics = tuple(m.num_features for _, m in kept for _ in range(2))
        others = {name: p.detach() for name, p in module.named_parameters() if name not in names}
        self.fixed = tuple(_fixed_spec(name, tensor) for name, tensor in others.items())
        self.fixed += tuple(_table_spec(name, b) for name, b in module.named_buffers() if self._is_fixed(name))
        self._needs_company = any(not m.affine for _, m in norms)
        self._skeletons = {True: _emptied(module).train(), False: _emptied(module).eval()}
        _without_dropout(self._skeletons[True])
        self._own = threading.local()

    def run(self, x: Tensor, tensors: Tensors, training: bool) -> Tensor:
        images = self._images(x)
        # The statistics of a batch are not defined for a single value: a row alone is its own neighbour.
        seen = images.repeat(2, 1, 1, 1) if len(x) == 1 and self._needs_company else images
        logits: Tensor = functional_call(self._skeleton(training), self._named(tensors), (seen,))
        return logits[: len(x)]

    def features(self, x: Tensor, tensors: Tensors) -> list[Tensor]:
        if self._needs_company:
            raise UnsupportedNetwork("norm is by batch or by task: a row has no features of its own")
        skeleton, found = self._skeleton(training=False), []
        norms: list[nn.Module] = [m for m in skeleton.modules() if isinstance(m, nn.GroupNorm | nn.BatchNorm2d)]
        watched = norms or [m for m in skeleton.modules() if isinstance(m, nn.Conv2d)]
        hooks = [m.register_forward_hook(lambda _m, _i, out: found.append(_pooled(out))) for m in watched]
        try:
            functional_call(skeleton, self._named(tensors), (self._images(x),))
        finally:
            for hook in hooks:
                hook.remove()
        return found

    def _images(self, x: Tensor) -> Tensor:
        """Rows (n, inputs) as (n, C, H, W), grey ones repeated where the module wants colours."""
        height, width, channels = self._image
        images = x.view(len(x), height, width, channels).permute(0, 3, 1, 2)
        return images if channels == self._channels else images.expand(-1, self._channels, -1, -1)

    def _named(self, tensors: Tensors) -> dict[str, Tensor]:
        named = {s.name: t.view(s.shape) for s, t in zip(self.masked, tensors.masked, strict=True)}
        named |= {s.name: t for s, t in zip(self.fixed, tensors.fixed, strict=True)}
        return named | dict(zip(self._statistics, tensors.statistics, strict=True))

    def _is_fixed(self, name: str) -> bool:
        """Whether a buffer belongs to no task: a table, or the running statistics of a pretrained normalisation."""
        return name not in self._statistics and not name.endswith("num_batches_tracked")

    def _skeleton(self, training: bool) -> nn.Module:
        """A copy for this thread: the call puts the tensors into the module while it runs."""
        mine: dict[bool, nn.Module] | None = getattr(self._own, "skeletons", None)
        if mine is None:
            mine = self._own.skeletons = copy.deepcopy(self._skeletons)
        return mine[training]


def _pooled(maps: Tensor) -> Tensor:
    """(n, C, H, W) to (n, 4 C): ReLU, then the mean of each quarter."""
    return functional.adaptive_avg_pool2d(torch.relu(maps), 2).flatten(1)


def _fixed_spec(name: str, tensor: Tensor) -> TensorSpec:
    """Biases are 0; what starts as a constant (scales, tokens) stays it; any other start value becomes signs."""
    if name.endswith("bias"):
        return TensorSpec(name, tuple(tensor.shape), value=0.0)
    first = float(tensor.flatten()[0])
    constant = bool((tensor == first).all())
    return TensorSpec(name, tuple(tensor.shape), value=first if constant else None)


def _table_spec(name: str, tensor: Tensor) -> TensorSpec:
    return TensorSpec(name, tuple(tensor.shape), value=tensor)


def _emptied(module: nn.Module) -> nn.Module:
    """A copy without the memory of its parameters."""
    return copy.deepcopy(module).to_empty(device="meta")


def _without_dropout(module: nn.Module) -> None:
    """Training differs from use only in the statistics: dropout would draw from a generator that is not ours."""
    for child in module.modules():
        if not isinstance(child, nn.BatchNorm2d):
            child.training = False


@dataclass(frozen=True, slots=True)
class BodyShape:
    """What a body is built from; see `network.Architecture`."""

    kind: str
    input_shape: tuple[int, ...]
    hidden: tuple[int, ...]
    outputs: int
    channels: tuple[int, ...]
    width: float
    norm: Norm


def make_body(shape: BodyShape) -> Body:
    """Raises UnsupportedNetwork when there is no such network, or none for these inputs."""
    if shape.kind in ("mlp", "units"):
        inputs = 1
        for size in shape.input_shape:
            inputs *= size
        widths = (inputs, *shape.hidden, shape.outputs)
        return Mlp(widths) if shape.kind == "mlp" else Units(widths, shape.norm)
    height, width, channels = _image_shape(shape)
    if shape.kind in CONV_CHANNELS:
        sizes = conv_channels(shape.kind, shape.channels, shape.width)
        module: nn.Module = ConvNet((channels, height, width), sizes, shape.hidden, shape.outputs, shape.norm)
    elif shape.kind == "resnet18-gem":
        module = GemResNet18(channels, max(1, round(shape.width * GEM_CHANNELS)), shape.outputs, shape.norm)
    else:
        module, wanted = torchvision_model(shape.kind, shape.outputs, shape.norm), RGB
        if channels not in (1, wanted):
            raise UnsupportedNetwork(f"{shape.kind} takes images of 1 or 3 channels, got {channels}")
        channels = wanted
    _try_out(module, (1, channels, height, width), shape)
    return ModuleBody(module, _image_shape(shape), channels)


def _image_shape(shape: BodyShape) -> tuple[int, int, int]:
    sizes = shape.input_shape
    if len(sizes) not in (2, 3):
        raise UnsupportedNetwork(f"{shape.kind} takes rows of shape (H, W) or (H, W, C), got {sizes}")
    return (sizes[0], sizes[1], sizes[2] if len(sizes) == 3 else 1)


def _try_out(module: nn.Module, size: tuple[int, ...], shape: BodyShape) -> None:
    """One image through the network with neither values nor memory: shapes that do not fit are told now."""
    skeleton = copy.deepcopy(module).to("meta").eval()
    try:
        logits = skeleton(torch.empty(size, device="meta"))
    except (RuntimeError, AssertionError) as error:
        text = (str(error) or type(error).__name__).splitlines()[0]
        raise UnsupportedNetwork(f"{shape.kind} cannot take images of {size[2]} x {size[3]}: {text}") from None
    if tuple(logits.shape) != (1, shape.outputs):
        raise UnsupportedNetwork(f"{shape.kind} gives {tuple(logits.shape)}, expected (1, {shape.outputs})")
