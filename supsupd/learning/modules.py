"""Networks of images as plain torch modules: the conv networks of the lottery-ticket papers, the narrow ResNet-18 of
GEM, and any classification model of torchvision.

A module built here is only a skeleton: it says in which order tensors are used. Its weights are replaced at every call
by masked ones (`bodies.ModuleBody`). Normalisation layers are affine-free, and what they remember is decided by `norm`:

none    there are none (conv only)
group   each sample is normalised by itself over groups of channels (Wu and He 2018): no state at all
batch   by the batch at hand, in training and in use: no state, but a row's answer depends on its neighbours
task    by the batch in training, by running statistics in use; these belong to a task and are stored with its mask
fixed   by the statistics, weights and biases of a pretrained file, the same for all tasks
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

Norm = Literal["none", "group", "batch", "task", "fixed"]

POOL = 0
CONV2 = (64, 64, POOL)
CONV4 = (*CONV2, 128, 128, POOL)
CONV_CHANNELS = {"conv": CONV4, "conv2": CONV2, "conv4": CONV4, "conv6": (*CONV4, 256, 256, POOL)}
"""Channels of the 3x3 convolutions, with 2x2 poolings between them (Frankle and Carbin 2019, figure 2)."""
GEM_CHANNELS = 20
GEM_STRIDES = (1, 2, 2, 2)
GROUP_CHANNELS, LEAST_CHANNELS = 8, 4
"""Channels that are normalised together; a group of very few would leave little of a small map."""


class UnsupportedNetwork(ValueError):
    """The network can't be built or masked; the text says why."""


def make_norm(norm: Norm, channels: int) -> nn.Module:
    """An affine-free normalisation of (n, channels, ...)."""
    if norm == "none":
        return nn.Identity()
    if norm == "group":
        together = math.gcd(GROUP_CHANNELS, channels)
        return nn.GroupNorm(channels // together if together >= LEAST_CHANNELS else 1, channels, affine=False)
    if norm == "fixed":
        return nn.BatchNorm2d(channels)
    # Momentum 1: in training it leaves what it saw; `Learner` decides what a task keeps of that.
    return nn.BatchNorm2d(channels, affine=False, track_running_stats=norm == "task", momentum=1.0)


class ConvNet(nn.Module):
    """3x3 convolutions with 2x2 poolings between them, then linear layers; ReLU throughout.

    A pooling comes before the normalisation and the ReLU of its convolution: the same without a normalisation, and
    less work with one.

    Args:
        shape: (channels, height, width) of a sample.
        channels: of each convolution; 0 is a pooling.
        hidden: widths of the linear layers before the last.
        outputs: width of the last.
        norm: after each convolution; "group" normalises each hidden linear layer over its units as well.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        channels: Sequence[int],
        hidden: tuple[int, ...],
        outputs: int,
        norm: Norm,
    ) -> None:
        super().__init__()
        parts: list[nn.Module] = []
        before, height, width = shape
        for after, following in zip(channels, (*channels[1:], None), strict=True):
            if after == POOL:
                continue
            parts.append(nn.Conv2d(before, after, 3, padding=1, bias=False))
            if following == POOL:
                parts.append(nn.MaxPool2d(2))
                height, width = height // 2, width // 2
            parts += [make_norm(norm, after), nn.ReLU()]
            before = after
        if min(height, width) < 1:
            raise UnsupportedNetwork(
                f"images of {shape[1]} x {shape[2]} are too small for {channels.count(POOL)} poolings"
            )
        self.features = nn.Sequential(*parts)
        widths = (before * height * width, *hidden, outputs)
        self.linear = nn.ModuleList(nn.Linear(a, b, bias=False) for a, b in itertools.pairwise(widths))
        self.norms = nn.ModuleList(
            nn.LayerNorm(w, elementwise_affine=False) if norm == "group" else nn.Identity() for w in hidden
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x).flatten(1)
        for layer, norm in zip(self.linear, self.norms, strict=False):
            x = torch.relu(norm(layer(x)))
        logits: Tensor = self.linear[-1](x)
        return logits


def conv_channels(kind: str, channels: Sequence[int], width: float) -> tuple[int, ...]:
    """Of a conv network: those given, or its kind's own times `width`. Raises UnsupportedNetwork."""
    found = tuple(channels) or CONV_CHANNELS[kind]
    doubled = any(a == b == POOL for a, b in itertools.pairwise(found))
    if found[0] == POOL or doubled:
        raise UnsupportedNetwork(f"network.channels {list(found)}: a pooling (0) must follow a convolution")
    return tuple(max(1, round(width * c)) if c != POOL else POOL for c in found)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al. 2016).

    The 1x1 convolution of the shortcut reads every `stride`-th place by slicing: as a strided one it corrupts the heap
    where it has less than 8 input channels and they come last in memory (oneDNN 3.13 of torch 2.15, AVX2, backward).
    """

    def __init__(self, before: int, after: int, stride: int, norm: Norm) -> None:
        super().__init__()
        self.stride = stride
        self.conv1 = nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False)
        self.norm1 = make_norm(norm, after)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.norm2 = make_norm(norm, after)
        self.shortcut = nn.Sequential()
        if stride != 1 or before != after:
            self.shortcut = nn.Sequential(nn.Conv2d(before, after, 1, bias=False), make_norm(norm, after))

    def forward(self, x: Tensor) -> Tensor:
        inner = self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x)))))
        return torch.relu(inner + self.shortcut(x[:, :, :: self.stride, :: self.stride]))


class GemResNet18(nn.Module):
    """The ResNet-18 for small images of GEM (Lopez-Paz and Ranzato 2017): a quarter of the usual width or so.

    Args:
        channels: input channels.
        width: of the first stage; the others have two, four and eight times as many channels.
        outputs: width of the last layer.
        norm: after each convolution.
    """

    def __init__(self, channels: int, width: int, outputs: int, norm: Norm) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.norm1 = make_norm(norm, width)
        blocks: list[nn.Module] = []
        before = width
        for stage, stride in enumerate(GEM_STRIDES):
            after = width * 2**stage
            blocks += [BasicBlock(before, after, stride, norm), BasicBlock(after, after, 1, norm)]
            before = after
        self.blocks = nn.Sequential(*blocks)
        self.linear = nn.Linear(before, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(torch.relu(self.norm1(self.conv1(x))))
        logits: Tensor = self.linear(functional.adaptive_avg_pool2d(x, 1).flatten(1))
        return logits


OWN_KINDS = ("mlp", "units", *CONV_CHANNELS, "resnet18-gem")


def check_kind(kind: str) -> None:
    """Raises UnsupportedNetwork for a name that is neither ours nor one of torchvision's classification models."""
    if kind in OWN_KINDS:
        return
    from torchvision import models

    if kind not in models.list_models(module=models):
        raise UnsupportedNetwork(_why_not(kind, models.list_models()))


def torchvision_model(name: str, outputs: int, norm: Norm) -> nn.Module:
    """A classification model of torchvision with its batch normalisations replaced. Raises UnsupportedNetwork."""
    from torchvision import models

    check_kind(name)
    options: dict[str, object] = {"num_classes": outputs}
    if name in ("googlenet", "inception_v3"):  # their auxiliary heads and slow start values are of no use here
        options |= {"aux_logits": False, "init_weights": False}
    with torch.random.fork_rng(devices=[]):  # its start values are thrown away: let them cost nobody randomness
        module: nn.Module = models.get_model(name, weights=None, **options)
    if norm == "none":
        raise UnsupportedNetwork(f"norm 'none' is for mlp and conv networks: {name} has its own normalisation layers")
    _replace_norms(module, norm)
    return module


def _why_not(name: str, everything: list[str]) -> str:
    if name in everything:
        return f"torchvision's {name} is no classification model of images"
    return f"unknown network kind {name!r}, expected {', '.join(OWN_KINDS)} or torchvision's name"


def _replace_norms(module: nn.Module, norm: Norm) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, make_norm(norm, child.num_features))
        else:
            _replace_norms(child, norm)
