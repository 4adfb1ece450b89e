"""The codec of masks: lossless, never larger than raw, near the entropy, and never more bytes than were asked for."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from storage import codec, packing
from storage.codec import Undecodable, zstd

LENET = [(300, 784), (100, 300), (500, 100)]
"""Rows and columns of LeNet 300-100 with 500 outputs: no row of its last two layers fills its last byte."""
ERDOS_RENYI = [0.035, 0.101, 0.091]
"""What that budget gives these layers at density 0.05."""
FIRST = {
    "gaps": (
        "39aaeb1bcd9c442f64cf0cff60a7b5e847705444656cb0e787824df9cf913332",
        "28b52ffd20400102000200070106470f020120032d48201e06180e16392a122d1e0717180f01192a20031f1302070504112d"
        "010d15230607021c1321280407061d1c180602050f0106",
    ),
    "zstd": (
        "e0df2d2e82365c2ced24606e7e876ee4fc6b9eb365eaf135b84c426880b65419",
        "28b52ffd20781d030082c717209029e9ff8f773720cdbda67a6666e28b566c85abcaf093270859ce8648d93205f890e4ca3f"
        "df33d2422376c3cd007e91e34cd0c2ed08b53c6877f81eddf4a6817f7a84ab63e6129ef312b8ca75f34491ebf61044f688a3"
        "ea3141b833050500",
    ),
}
"""By coding: the SHA-256 of a mask's bits, and the frame that was made of them when the codec was new."""


def sparse(size, places):
    flags = np.zeros(8 * size, bool)
    flags[[place for place in places if place < 8 * size]] = True
    return packing.pack(flags)


bits = st.one_of(
    st.binary(max_size=600),
    st.builds(sparse, st.integers(0, 600), st.sets(st.integers(0, 4799), max_size=40)),
)


def layers(densities, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.random(shape) < density for shape, density in zip(LENET, densities, strict=True)]


def packed(masks):
    return b"".join(np.packbits(mask, axis=1, bitorder="little").tobytes() for mask in masks)


def entropy(masks):
    """Bytes of independent bits with each layer's density."""
    total = 0.0
    for mask in masks:
        for share in (mask.mean(), 1 - mask.mean()):
            total -= mask.size * share * np.log2(share) if share else 0.0
    return total / 8


def slow_gaps(data):
    steps, zeros = [], 0
    for flag in [*packing.unpack(data, 8 * len(data)), True]:
        if flag:
            steps += [255] * (zeros // 255) + [zeros % 255]
        zeros = 0 if flag else zeros + 1
    return bytes(steps)


def slow_from_gaps(steps):
    flags = []
    for step in steps:
        flags += [False] * step + [True] * (step < 255)
    return packing.pack(np.array(flags[:-1], bool))


@pytest.mark.parametrize("density", [0, 0.001, 0.01, 0.05, 0.12, 0.13, 0.3, 0.5, 0.9, 1])
def test_a_mask_of_any_density_comes_back_and_takes_no_more_than_its_raw_bits(density):
    data = packed(layers([density] * 3))
    coded, coding = codec.encode(data)
    assert codec.decode(coded, coding, len(data)) == data
    assert (len(coded) < len(data)) == (coding is not None)


@given(bits)
@example(b"")
@example(b"\0")
@example(b"\xff" * 300)
@example(b"\0" * 300)
@example(b"\0" * 299 + b"\x80")
def test_whatever_is_encoded_comes_back(data):
    coded, coding = codec.encode(data)
    assert codec.decode(coded, coding, len(data)) == data
    assert len(coded) <= len(data)


def test_raw_bits_are_not_copied():
    data = packed(layers([0.5] * 3))
    coded, coding = codec.encode(data)
    assert coding is None
    assert coded is data
    assert codec.decode(data, None, len(data)) is data


@pytest.mark.parametrize("densities", [[0.01] * 3, [0.05] * 3, [0.1] * 3, [0.2] * 3, [0.3] * 3, [0.4] * 3, ERDOS_RENYI])
def test_independent_bits_take_little_more_than_their_entropy(densities):
    masks = layers(densities)
    coded, _ = codec.encode(packed(masks))
    assert entropy(masks) < len(coded) < 1.06 * entropy(masks)


def test_a_mask_of_one_kind_of_bit_takes_next_to_nothing():
    for density in (0, 1):
        assert len(codec.encode(packed(layers([density] * 3)))[0]) < 300


@given(bits)
def test_gaps_are_those_that_one_counts(data):
    steps = codec.gaps(data)
    assert steps == slow_gaps(data)
    assert codec.from_gaps(steps, len(data)) == slow_from_gaps(steps) == data


@pytest.mark.parametrize(
    "steps",
    [b"", b"\x07", b"\xff", b"\x08\xff", b"\xff" * 9, bytes([20, 19]), b"\xff\xff\x02"],
    ids=["nothing", "no whole byte", "no end", "more behind the end", "all open", "too long", "far too long"],
)
def test_gaps_that_no_mask_has_are_refused(steps):
    with pytest.raises(Undecodable, match="at most 4 bytes"):
        codec.from_gaps(steps, 4)


@pytest.mark.parametrize("density", [0.05, 0.3])
def test_damage_is_refused_or_does_no_harm(density):
    data = packed(layers([density] * 3))[:4000]
    coded, coding = codec.encode(data)
    assert coding is not None
    for place in range(len(coded)):
        for bit in range(0, 8, 3):
            damaged = bytearray(coded)
            damaged[place] ^= 1 << bit
            readable(bytes(damaged), coding, len(data))
    for length in range(0, len(coded), 7):
        with pytest.raises(Undecodable):
            codec.decode(coded[:length], coding, len(data))
    for more in (b"\0", coded):
        with pytest.raises(Undecodable, match="not one whole"):
            codec.decode(coded + more, coding, len(data))


@given(st.binary(max_size=200), st.sampled_from(["zstd", "gaps"]))
def test_any_bytes_are_refused_or_read_within_the_limit(data, coding):
    readable(data, coding, 50)
    readable(zstd.compress(data), coding, 50)


def readable(data, coding, most):
    try:
        assert len(codec.decode(data, coding, most)) <= most
    except Undecodable as error:
        assert "\n" not in str(error)


def frames():
    """One that says how much it holds, one that does not, and one that says less."""
    huge = bytes(1 << 24)
    honest = zstd.compress(huge)
    silent = zstd.compress(huge, options={zstd.CompressionParameter.content_size_flag: 0})
    place = honest.index((1 << 24).to_bytes(4, "little"))
    return honest, silent, honest[:place] + (1000).to_bytes(4, "little") + honest[place + 4 :]


@pytest.mark.parametrize("coding", ["zstd", "gaps"])
@pytest.mark.parametrize("frame", frames(), ids=["honest", "silent", "lying"])
def test_a_small_frame_of_many_bytes_is_refused_before_they_are_made(frame, coding):
    tracemalloc.start()
    try:
        with pytest.raises(Undecodable):
            codec.decode(frame, coding, 1000)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_an_unknown_coding_is_refused():
    with pytest.raises(Undecodable, match="'lzma' is unknown"):
        codec.decode(zstd.compress(b"bits"), "lzma", 100)


@pytest.mark.parametrize("coding", FIRST)
def test_what_was_stored_first_can_be_read_for_ever(coding):
    digest, frame = FIRST[coding]
    assert packing.sha256(codec.decode(bytes.fromhex(frame), coding, 200)) == digest
