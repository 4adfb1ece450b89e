"""What is done to images, by torchvision's v2 operations: sizes and scales always, flips and crops in training."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from supsupd.sections import ImageTransforms


class ShapeMismatch(ValueError):
    """Rows that do not fit the network; the text says what came and what is expected."""


@dataclass(frozen=True)
class Transforms:
    """Images (n, H, W) or (n, H, W, C), channels last.

    Args:
        resize: (height, width) that every image is brought to, whatever it comes with.
        mean, sd: per channel, of values in 0..1 where they come as whole numbers.
        horizontal_flip, vertical_flip: in training, each with probability 1/2.
        crop: in training, shifts by up to so many pixels; what comes in from outside is 0.
    """

    resize: tuple[int, int] | None = None
    mean: tuple[float, ...] | None = None
    sd: tuple[float, ...] | None = None
    horizontal_flip: bool = False
    vertical_flip: bool = False
    crop: int = 0

    @classmethod
    def of(cls, settings: ImageTransforms) -> Transforms:
        return cls.from_json(settings.model_dump())

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Transforms:
        lists = {name: tuple(value) for name, value in data.items() if isinstance(value, list)}
        return cls(**(data | lists))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def prepares(self) -> bool:
        """Whether rows are changed before they are learned or answered."""
        return self.resize is not None or self.mean is not None

    @property
    def augments(self) -> bool:
        """Whether rows are varied in training."""
        return self.horizontal_flip or self.vertical_flip or self.crop > 0

    def output_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Of one image of this shape. Raises ShapeMismatch when it is none, or has other channels than `mean`."""
        if not self.prepares and not self.augments:
            return shape
        if len(shape) not in (2, 3):
            raise ShapeMismatch(f"rows of shape {shape} came, transforms take images (H, W) or (H, W, C)")
        channels = shape[2] if len(shape) == 3 else 1
        if self.mean is not None and len(self.mean) != channels:
            raise ShapeMismatch(f"images of {channels} channels came, network.transforms.mean has {len(self.mean)}")
        return (*self.resize, *shape[2:]) if self.resize is not None else shape

    def prepared(self, x: np.ndarray) -> np.ndarray:
        """Images (n, H, W[, C]) of any numeric type resized and normalised, float32 (n, height, width[, C])."""
        scale = np.iinfo(x.dtype).max if x.dtype.kind in "iu" else 1.0
        with np.errstate(over="ignore"):  # what float32 can't hold is cut off later
            rows = (x / scale).astype(np.float32)
        images = torch.from_numpy(rows).view(*x.shape[:3], -1).permute(0, 3, 1, 2)
        v2 = _operations()
        if self.resize is not None:
            images = v2.resize(images, list(self.resize), antialias=True)
        if self.mean is not None and self.sd is not None:
            images = v2.normalize(images, list(self.mean), list(self.sd))
        return images.permute(0, 2, 3, 1).reshape(len(x), *images.shape[2:], *x.shape[3:]).numpy()

    def augmented(self, rows: Tensor, shape: tuple[int, ...], order: np.random.Generator) -> Tensor:
        """Rows (n, inputs) that are images of `shape`, each flipped and shifted by chances of its own."""
        v2 = _operations()
        images = rows.view(len(rows), shape[0], shape[1], -1).permute(0, 3, 1, 2)
        for wanted, flip in ((self.horizontal_flip, v2.horizontal_flip), (self.vertical_flip, v2.vertical_flip)):
            if wanted:
                coins = torch.from_numpy(order.random(len(rows)) < 0.5).to(rows.device)
                images = torch.where(coins[:, None, None, None], flip(images), images)
        if self.crop:
            images = _shifted(images, self.crop, order)
        return images.permute(0, 2, 3, 1).reshape(len(rows), -1)


def _operations() -> Any:
    """torchvision's v2 functions, loaded by the first image that needs one: it takes seconds."""
    from torchvision.transforms.v2 import functional

    return functional


def _shifted(images: Tensor, most: int, order: np.random.Generator) -> Tensor:
    """Images (n, C, H, W), each cut at its own place out of a frame of zeros `most` pixels wide."""
    count, _, height, width = images.shape
    frame = _operations().pad(images, [most])
    top, left = torch.from_numpy(order.integers(0, 2 * most + 1, (2, count))).to(images.device)
    rows = top[:, None] + torch.arange(height, device=images.device)
    columns = left[:, None] + torch.arange(width, device=images.device)
    each = torch.arange(count, device=images.device)[:, None, None]
    return frame.permute(0, 2, 3, 1)[each, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
