"""MNIST as streams of tasks: which tasks each stream has, and what it is expected to reach."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from common import StreamTask
from scipy.ndimage import rotate

SIDE = 28


@dataclass(frozen=True)
class Images:
    """Images uint8 (n, 28, 28) and their digits (n,)."""

    x: np.ndarray
    y: np.ndarray

    @classmethod
    def load(cls, path: Path, part: str) -> Images:
        """`part` is train or test; a file with the arrays train_x, train_y, test_x and test_y."""
        with np.load(path, allow_pickle=False) as file:
            return cls(file[f"{part}_x"], file[f"{part}_y"])

    def shuffled(self, rng: np.random.Generator) -> Images:
        """In random order: MNIST's own goes by writer, so that neighbours are no random draw."""
        order = rng.permutation(len(self.y))
        return Images(self.x[order], self.y[order])


@dataclass(frozen=True)
class StreamKind:
    """A stream: `make` gives its true tasks over some images, the same ones for the same generator state."""

    make: Callable[[Images, np.random.Generator], list[StreamTask]]
    least_accuracy: float


def permuted(images: Images, rng: np.random.Generator, count: int) -> list[StreamTask]:
    """Each task sees the pixels in a random order of its own."""
    orders = [rng.permutation(SIDE * SIDE) for _ in range(count)]
    return [StreamTask(f"order {i}", partial(_shuffle, order), images.x, images.y) for i, order in enumerate(orders)]


def _shuffle(order: np.ndarray, x: np.ndarray) -> np.ndarray:
    return x.reshape(len(x), -1)[:, order].reshape(x.shape)


def rotated(images: Images, _: np.random.Generator, count: int) -> list[StreamTask]:
    """A whole turn in `count` equal steps."""
    angles = [turn * 360 // count for turn in range(count)]
    return [StreamTask(f"{angle}°", partial(_turn, angle), images.x, images.y) for angle in angles]


def _turn(angle: float, x: np.ndarray) -> np.ndarray:
    return rotate(x, angle, axes=(1, 2), reshape=False, order=1)


def split(images: Images, _: np.random.Generator, labels: int) -> list[StreamTask]:
    """Two digits a task, labelled by the digit modulo `labels`."""
    tasks = []
    for first in range(0, 10, 2):
        mine = images.y // 2 == first // 2
        tasks.append(StreamTask(f"{first} or {first + 1}", as_they_are, images.x[mine], images.y[mine] % labels))
    return tasks


def turned(x: np.ndarray, angle: float) -> np.ndarray:
    """Images (n, 28, 28) turned as `rotated` does, float32: bilinear turning is linear in the pixels, so that turning
    each pixel alone gives a matrix for all images."""
    pixels = np.eye(SIDE * SIDE, dtype=np.float32).reshape(-1, SIDE, SIDE)
    return (x.reshape(len(x), -1).astype(np.float32) @ _turn(angle, pixels).reshape(SIDE * SIDE, -1)).reshape(x.shape)


def as_they_are(x: np.ndarray) -> np.ndarray:
    """The same rows."""
    return x


def stream_kinds() -> dict[str, StreamKind]:
    """All streams by name."""
    return {
        "permuted": StreamKind(partial(permuted, count=20), 0.92),
        "rotated": StreamKind(partial(rotated, count=12), 0.92),
        "split": StreamKind(partial(split, labels=2), 0.99),
        "split10": StreamKind(partial(split, labels=10), 0.99),
    }
