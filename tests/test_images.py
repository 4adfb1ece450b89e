"""A folder per class of images is the batch that its pixels say."""

import io
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from streams.batch import BatchRejected
from streams.formats import Limits, decode, pack_images


def image_bytes(pixels, format="PNG", mode=None, **options):
    image = Image.fromarray(np.asarray(pixels))
    target = io.BytesIO()
    (image.convert(mode) if mode else image).save(target, format, **options)
    return target.getvalue()


def grey(value, height=4, width=6):
    return np.full((height, width), value, np.uint8)


def colour(*value, height=4, width=6):
    return np.full((height, width, 3), value, np.uint8)


def decode_files(files, limits=None):
    """`files` maps "<class>/<image>" to bytes; nothing is on the disk."""
    return decode(pack_images(files.items()), limits or Limits(), form="images")


def rejection(files, limits=None):
    with pytest.raises(BatchRejected) as caught:
        decode_files(files, limits)
    return caught.value


def test_grey_images_are_n_height_width_with_their_folders_as_labels():
    batch = decode_files(
        {"b/10.png": image_bytes(grey(3)), "b/9.png": image_bytes(grey(2)), "a/x.PNG": image_bytes(grey(1))}
    )
    assert batch.x.shape == (3, 4, 6)
    assert batch.x.dtype == np.uint8
    assert batch.x[:, 0, 0].tolist() == [1, 2, 3]  # by class, then in natural order
    assert batch.y.tolist() == ["a", "b", "b"]


def test_one_colour_image_makes_the_batch_rgb():
    batch = decode_files({"a/1.png": image_bytes(grey(7)), "b/1.png": image_bytes(colour(1, 2, 3))})
    assert batch.x.shape == (2, 4, 6, 3)
    assert batch.x[:, 0, 0].tolist() == [[7, 7, 7], [1, 2, 3]]


def test_jpegs_are_read_as_pillow_reads_them():
    pixels = np.random.default_rng(0).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    data = image_bytes(pixels, "JPEG")
    batch = decode_files({"a/1.jpeg": data, "a/2.jpg": data})
    np.testing.assert_array_equal(batch.x[0], np.asarray(Image.open(io.BytesIO(data))))
    assert decode_files({"a/1.jpg": image_bytes(grey(9), "JPEG")}).x.shape == (1, 4, 6)


@pytest.mark.parametrize(
    "data, pixel",
    [
        (image_bytes(grey(255), mode="1"), 255),
        (image_bytes(grey(50), mode="LA"), 50),
        (image_bytes(np.full((4, 6), 50 * 256 + 9, np.uint16)), 50),
        (image_bytes(colour(9, 8, 7), mode="P"), None),
        (image_bytes(colour(9, 8, 7), mode="RGBA"), [9, 8, 7]),
    ],
    ids=["bilevel", "grey with alpha", "16 bits", "palette", "alpha"],
)
def test_every_png_mode_is_grey_or_rgb_in_8_bits(data, pixel):
    x = decode_files({"a/1.png": data}).x
    assert x.shape == ((1, 4, 6) if isinstance(pixel, int) else (1, 4, 6, 3))
    assert pixel is None or x[0, 0, 0].tolist() == pixel


def test_equal_folders_give_equal_bytes_in_any_order():
    files = {f"{c}/{i}.png": image_bytes(grey(10 * i)) for c in "abc" for i in range(4)}
    shuffled = list(files.items())
    random.Random(0).shuffle(shuffled)
    assert pack_images(files.items()) == pack_images(shuffled)


def test_a_class_name_that_is_no_text_becomes_a_printable_label():
    label = os.fsdecode(b"caf\xe9")
    assert decode_files({f"{label}/1.png": image_bytes(grey(1))}).y.tolist() == ["caf\\udce9"]


PNG = image_bytes(np.random.default_rng(0).integers(0, 255, (32, 32), dtype=np.uint8))
JPEG = image_bytes(np.random.default_rng(0).integers(0, 255, (32, 32), dtype=np.uint8), "JPEG")


def png_that_claims(width, height):
    data = bytearray(PNG)
    data[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    import zlib

    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


def png_with_text(size):
    info = PngImagePlugin.PngInfo()
    info.add_text("bomb", "a" * size, zip=True)
    return image_bytes(grey(1), pnginfo=info)


def eps():
    target = io.BytesIO()
    Image.fromarray(grey(1)).save(target, "EPS")
    return target.getvalue()


@pytest.mark.parametrize(
    "data, code",
    [
        (b"", "truncated"),
        (PNG[:8], "truncated"),
        (PNG[: len(PNG) // 2], "truncated"),
        (JPEG[: len(JPEG) // 2], "truncated"),
        (PNG[:100] + b"\0" * 100 + PNG[200:], "image_rejected"),
        (b"no image", "image_rejected"),
        (eps(), "image_rejected"),
        (image_bytes(grey(1), "BMP"), "image_rejected"),
        (png_with_text(20 << 20), "image_rejected"),
        (png_that_claims(65_500, 65_500), "image_too_large"),
        (png_that_claims(5_000, 5_000), "image_too_large"),
        (image_bytes(grey(1, 5, 6)), "image_rejected"),
    ],
    ids=[
        "empty",
        "start",
        "half PNG",
        "half JPEG",
        "damaged",
        "text",
        "EPS",
        "BMP",
        "text bomb",
        "bomb",
        "big",
        "size",
    ],
)
def test_one_bad_image_names_itself_and_refuses_the_batch(data, code):
    error = rejection({"a/1.png": image_bytes(grey(1)), "b/bad.png": data})
    assert error.code == code
    assert "b/bad.png" in error.text
    assert str(error).isprintable()


def test_too_many_images_are_refused_before_they_are_read():
    files = {f"a/{i}.png": image_bytes(grey(1)) for i in range(4)}
    assert rejection(files, Limits(samples=3)).code == "too_many_samples"
    assert rejection(files, Limits(bytes=4 * 24 - 1)).code == "too_large"


@given(
    st.sampled_from([PNG, JPEG]),
    st.lists(st.tuples(st.integers(0, 5000), st.binary(min_size=1, max_size=4)), min_size=1, max_size=5),
    st.integers(0, 5000),
)
def test_any_damage_to_an_image_gives_a_batch_or_a_rejection(data, damage, cut):
    damaged = bytearray(data)
    for at, replacement in damage:
        start = at % len(damaged)
        damaged[start : start + len(replacement)] = replacement
    try:
        decode_files({"a/1.png": bytes(damaged[: max(1, len(damaged) - cut % 50)])})
    except BatchRejected as error:
        assert error.code in {"truncated", "image_rejected", "image_too_large"}


def test_formats_import_neither_torch_nor_pyarrow():
    code = "import sys, streams.decode_worker; sys.exit(bool({'torch', 'torchvision', 'pyarrow'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent.parent).returncode == 0
