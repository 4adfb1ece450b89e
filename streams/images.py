"""PNG and JPEG files to pixels, and a folder per class of them, packed as a tar."""

import io
import math
import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
from PIL import Image

from streams import tar
from streams.arrays import checked, strings
from streams.batch import Batch, BatchRejected
from streams.budget import Budget
from streams.names import natural_key, printable
from streams.reading import Limits, Reading

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")
_GREY = ("1", "L", "LA")
_DEEP_GREY = ("I", "I;16", "I;16B")  # PNGs of 16 bits
_LAST_BYTES = {b"\x89P": b"IEND\xaeB`\x82", b"\xff\xd8": b"\xff\xd9"}


def pack_images(members: Iterable[tuple[str, bytes]]) -> bytes:
    """The image files, each called `<class>/<image>`, as one tar; parses nothing.

    They come in the order of their classes, then of their names (`b2` before `b10`); equal members give equal bytes.
    """
    named = {"/".join(printable(part) for part in name.split("/")): data for name, data in members}
    return tar.pack([(name, named[name]) for name in sorted(named, key=_order)])


def decode_images(payload: bytes, reading: Reading, budget: Budget) -> Batch:
    """x is uint8, (n, H, W) when all images are grey, else (n, H, W, 3); y holds the class folders' names."""
    files = list(tar.iter_files(payload))
    for name, _ in files:
        if name.count("/") != 1:
            raise BatchRejected("image_rejected", f"{printable(name)[:200]}: expected <class>/<image>")
    if not files:
        raise BatchRejected("bad_shape", "no images, expected 1 or more")
    y = strings([name.partition("/")[0] for name, _ in files], "bad_labels", budget)
    return checked(decode_all(files, budget), y, None, budget)


def decode_all(files: Sequence[tuple[str, memoryview]], budget: Budget) -> np.ndarray:
    """The images, called by their names where one is refused, as uint8 (n, H, W) if all are grey, else (n, H, W, 3).

    Raises BatchRejected image_rejected, image_too_large, truncated, too_large or too_many_samples.
    """
    budget.check_rows(len(files))
    shapes = [_shape(name, data, budget.limits) for name, data in files]
    first = shapes[0]
    for (name, _), shape in zip(files, shapes, strict=True):
        if shape[:2] != first[:2]:
            sizes = f"{shape[1]} x {shape[0]}, the first image is {first[1]} x {first[0]}"
            raise BatchRejected("image_rejected", f"{name}: {sizes} pixels, all of a batch must have the same size")
    common = max(shapes, key=len)
    budget.take(math.prod(common) * len(files))
    x = np.empty((len(files), *common), np.uint8)
    for i, (name, data) in enumerate(files):
        pixels = _pixels(name, data)
        x[i] = pixels[..., None] if len(common) > pixels.ndim else pixels
    return x


def _order(name: str) -> tuple[str, tuple[str | int, ...], str]:
    folder, _, file = name.rpartition("/")
    return folder, natural_key(file), file


def _shape(name: str, data: memoryview, limits: Limits) -> tuple[int, ...]:
    """(H, W) or (H, W, 3), as the image's header says; no pixel is decoded."""
    with _open(name, data) as image:
        if image.width * image.height > limits.pixels:
            raise BatchRejected("image_too_large", f"{name}: at most {limits.pixels} pixels expected")
        size = image.height, image.width
        return size if image.mode in (*_GREY, *_DEEP_GREY) else (*size, 3)


def _pixels(name: str, data: memoryview) -> np.ndarray:
    """(H, W) or (H, W, 3) uint8."""
    with _open(name, data) as image:
        if image.mode in _DEEP_GREY:
            return (np.asarray(image) >> 8).astype(np.uint8)
        return np.asarray(image.convert("L" if image.mode in _GREY else "RGB"))


@contextmanager
def _open(name: str, view: memoryview) -> Iterator[Image.Image]:
    """Pillow tells damage by many exceptions; all of them mean that this is no whole image of an allowed format."""
    data = bytes(view)
    last = _LAST_BYTES.get(data[:2], b"")
    if not data or last not in data:
        raise BatchRejected("truncated", f"{name}: {len(data)} bytes, the image's end is missing")
    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG")) as image:
            yield image
    except BatchRejected:
        raise
    except Image.DecompressionBombError as error:
        raise BatchRejected("image_too_large", f"{name}: {printable(str(error))[:200]}") from error
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
        raise BatchRejected(code, f"{name}: no whole PNG or JPEG image") from error
