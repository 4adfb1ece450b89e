"""A folder per class of PNG and JPEG files, made into the same .npz bytes that a file would hold."""

import io
import struct
import zlib
from collections.abc import Callable, Sequence
from pathlib import PurePath
from typing import Any

import numpy as np
from PIL import Image

from streams.batch import Batch, BatchRejected
from streams.formats import Limits, encode
from streams.names import natural_key, printable

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")
_GREY = ("1", "L", "LA")
_DEEP_GREY = ("I", "I;16", "I;16B")  # PNGs of 16 bits
_LAST_BYTES = {b"\x89P": b"IEND\xaeB`\x82", b"\xff\xd8": b"\xff\xd9"}


def encode_folder(root: str, paths: Sequence[str], read: Callable[[str], bytes], limits: Limits) -> bytes:
    """Make the images at `paths`, each `<root>/<class>/<image>`, into canonical .npz bytes.

    x is uint8, (n, H, W) when all images are grey, else (n, H, W, 3); y holds the class folders' names.
    `read` gives a file's bytes. Raises BatchRejected image_rejected, image_too_large, truncated, too_large or
    too_many_samples, and whatever `read` raises.
    """
    if len(paths) > limits.samples:
        raise BatchRejected("too_many_samples", f"{len(paths)} images, at most {limits.samples} expected")
    folder = _image_folder(root, paths, lambda path: _load_image(path, read, limits))
    images: list[np.ndarray] = []
    for i in range(len(folder)):
        image, _ = folder[i]
        images.append(image)
        _check_fits(image, images[0], len(folder), _place(folder.samples[i][0]), limits)
    if any(image.ndim == 3 for image in images):
        images = [image if image.ndim == 3 else np.repeat(image[..., None], 3, axis=2) for image in images]
    return encode(Batch(np.stack(images), np.array([folder.classes[label] for label in folder.targets])))


def _image_folder(root: str, paths: Sequence[str], loader: Callable[[str], np.ndarray]) -> Any:
    """torchvision's ImageFolder over exactly these files: its own walk would follow symbolic links."""
    from torchvision.datasets import ImageFolder

    labels = {path: printable(PurePath(path).parent.name) for path in paths}
    ordered = sorted(paths, key=lambda path: (labels[path], natural_key(PurePath(path).name)))

    class ListedFolder(ImageFolder):
        def find_classes(self, directory: Any) -> tuple[list[str], dict[str, int]]:
            classes = sorted(set(labels.values()))
            return classes, {label: i for i, label in enumerate(classes)}

        @staticmethod
        def make_dataset(directory: Any, class_to_idx: dict[str, int], **_: Any) -> list[tuple[str, int]]:
            return [(path, class_to_idx[labels[path]]) for path in ordered]

    return ListedFolder(root, loader=loader)


def _load_image(path: str, read: Callable[[str], bytes], limits: Limits) -> np.ndarray:
    """(H, W) or (H, W, 3) uint8."""
    data = read(path)
    last = _LAST_BYTES.get(data[:2], b"")
    if not data or last not in data:
        raise BatchRejected("truncated", f"{_place(path)}: {len(data)} bytes, the image's end is missing")
    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG")) as image:
            if image.width * image.height > limits.pixels:
                raise _too_large(path, limits)
            return _to_array(image)
    except Image.DecompressionBombError as error:
        raise _too_large(path, limits) from error
    except BatchRejected:
        raise
    except (
        OSError,
        ValueError,
        SyntaxError,
        EOFError,
        IndexError,
        KeyError,
        struct.error,
        zlib.error,
    ) as error:
        # An embedded preview has the same last bytes, and some cameras put more behind them.
        code = "image_rejected" if last in data[-64:] else "truncated"
        raise BatchRejected(code, f"{_place(path)}: no whole PNG or JPEG image") from error


def _to_array(image: Image.Image) -> np.ndarray:
    if image.mode in _DEEP_GREY:
        return (np.asarray(image) >> 8).astype(np.uint8)
    return np.asarray(image.convert("L" if image.mode in _GREY else "RGB"))


def _check_fits(image: np.ndarray, first: np.ndarray, count: int, place: str, limits: Limits) -> None:
    if image.shape[:2] != first.shape[:2]:
        sizes = "{1} x {0}, the first image is {3} x {2}".format(*image.shape[:2], *first.shape[:2])
        raise BatchRejected("image_rejected", f"{place}: {sizes} pixels, all of a batch must have the same size")
    if image.nbytes * count > limits.bytes:
        raise BatchRejected("too_large", f"{count} images like {place} take more than {limits.bytes} bytes")


def _too_large(path: str, limits: Limits) -> BatchRejected:
    return BatchRejected("image_too_large", f"{_place(path)}: at most {limits.pixels} pixels expected")


def _place(path: str) -> str:
    return printable("/".join(PurePath(path).parts[-2:]))
