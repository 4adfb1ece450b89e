"""Packed masks: n bits in (n + 7) // 8 bytes and back, and nothing else accepted."""

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage import packing

masks = st.lists(st.booleans(), max_size=300).map(lambda bits: np.array(bits, dtype=bool))


@given(masks)
def test_unpack_gives_back_what_pack_was_given(bits):
    data = packing.pack(bits)
    assert len(data) == (len(bits) + 7) // 8
    back = packing.unpack(data, len(bits))
    assert back.dtype == np.bool_
    assert np.array_equal(back, bits)


@given(masks)
def test_popcount_counts_the_weights_kept(bits):
    assert packing.popcount(packing.pack(bits)) == bits.sum()


def test_bit_i_is_bit_i_mod_8_from_the_lowest_of_byte_i_div_8():
    bits = np.zeros(11, dtype=bool)
    bits[[0, 3, 9]] = True
    assert packing.pack(bits) == bytes([0b00001001, 0b00000010])


@given(masks, st.integers(-9, 9).filter(bool))
def test_another_length_is_refused(bits, more):
    data = packing.pack(bits)
    wrong = data + bytes(more) if more > 0 else data[:more]
    if len(wrong) != len(data):
        with pytest.raises(ValueError, match="bytes"):
            packing.unpack(wrong, len(bits))


@pytest.mark.parametrize("n", [1, 7, 9, 15])
def test_set_padding_is_refused(n):
    data = bytearray(packing.pack(np.ones(n, dtype=bool)))
    data[-1] |= 0x80
    with pytest.raises(ValueError, match="padding"):
        packing.unpack(bytes(data), n)


@pytest.mark.parametrize("n", [-1, -8])
def test_a_negative_number_of_bits_is_refused(n):
    with pytest.raises(ValueError, match="bytes"):
        packing.unpack(b"", n)


@pytest.mark.parametrize("wrong", [np.zeros((2, 4), bool), np.zeros(8, np.uint8), np.float32([0.5])])
def test_only_flat_booleans_are_packed(wrong):
    with pytest.raises(ValueError, match="flat array of bool"):
        packing.pack(wrong)


def test_the_hash_is_sha256_in_hexadecimal():
    assert packing.sha256(b"mask") == hashlib.sha256(b"mask").hexdigest()
