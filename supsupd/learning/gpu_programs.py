"""What runs on the GPU, in Triton; `gpu_kernels` launches it, and says what each result is.

A mask's bits become the operand of a matrix product in registers, two or four weights at a time, and nothing unpacked
ever reaches memory.

Masked layers. A byte holds the bits of 8 columns. Bits b and b + 4 of it lie in the two halves of a 32-bit word, so one
shift and one AND give two operands at once: bit 14 of a 16-bit float alone is 2.0 (in bfloat16 and in float16), and
bit 15 its sign. A product therefore sums the columns b, b + 4 of every byte, those that are b modulo 4, and activations
are stored to match: plane c % 4, position c // 4 for column c. Each is kept as the sum of two 16-bit floats.

Bank times vector. The same, with the vector as integers of four signed 8-bit digits and a byte's bit b as the 8-bit
integer 2^b: sums are exact, hence the same in any order. A program has two warps, since four would be given the
instructions of warp groups, which are made for wider products.
"""

# ruff: noqa: N803 - what is fixed at compile time is in capitals, as everywhere in Triton

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _halves(word: tl.tensor) -> tl.tensor:
    """The lower and the upper half of each 32-bit word beside each other, (r, w) to (r, 2 w)."""
    low = (word & 0xFFFF).to(tl.uint16)
    high = (word >> 16).to(tl.uint16)
    return tl.reshape(tl.join(low, high), (word.shape[0], 2 * word.shape[1]))


@triton.jit
def _times_kept_signs(
    acc: tl.tensor, kept: tl.tensor, negative: tl.tensor, x: tl.tensor, plane: tl.tensor
) -> tl.tensor:
    """acc + ±2 x over the kept weights; kept and negative (r, b) are packed bits, x points to (n, 2 b) of 4 planes."""
    # 0x1001 copies the upper four bits to the upper half; each pair of bits is then (kept, negative)
    even = ((kept & 0x55) | ((negative << 1) & 0xAA)) * 0x1001
    odd = (((kept >> 1) & 0x55) | (negative & 0xAA)) * 0x1001
    for b in tl.static_range(4):
        codes = even if b % 2 == 0 else odd
        pair = (codes << (14 - 2 * (b // 2))) & 0xC000C000
        operand = _halves(pair).to(x.dtype.element_ty, bitcast=True)
        acc = tl.dot(operand, tl.trans(tl.load(x + b * plane)), acc)
    return acc


@triton.jit
def _times_kept_weights(
    acc: tl.tensor,
    kept: tl.tensor,
    weights: tl.tensor,
    inside: tl.tensor,
    x: tl.tensor,
    plane: tl.tensor,
    part: tl.tensor,
) -> tl.tensor:
    """acc + weight x over the kept weights; weights points to (r, 2 b) of 4 planes of 2 parts, each `part` long."""
    for b in tl.static_range(4):
        bits = _halves(((kept * 0x1001) >> b) & 0x00010001)
        values = tl.trans(tl.load(x + b * plane))
        for half in tl.static_range(2):
            weight = tl.load(weights + (4 * half + b) * part, mask=inside, other=0.0)
            acc = tl.dot(tl.where(bits != 0, weight, 0.0), values, acc)
    return acc


@triton.jit(do_not_specialize=["samples"], do_not_specialize_on_alignment=["slots"])
def masked_layer(
    x: tl.tensor,
    bank: tl.tensor,
    slots: tl.tensor,
    fixed: tl.tensor,
    out: tl.tensor,
    scale: tl.tensor,
    mask_stride: tl.tensor,
    rows: tl.tensor,
    row_bytes: tl.tensor,
    samples: tl.tensor,
    SHARED: tl.constexpr,
    SIGNED: tl.constexpr,
    LAST: tl.constexpr,
    ROWS: tl.constexpr,
    SAMPLES: tl.constexpr,
    BYTES: tl.constexpr,
) -> None:
    """One layer of every mask on a tile of its rows; the shapes are those that `gpu_kernels` allocates.

    x: activations, of all masks alike if SHARED; bank: where the layer begins in the packed masks; fixed: SIGNED, the
    packed bits of the negative weights, else the weights in two parts; out: LAST, logits, else activations.
    """
    tiles, blocks = tl.cdiv(rows, ROWS), tl.cdiv(samples, SAMPLES)
    pid = tl.program_id(0)
    tile, block, mask = pid % tiles, (pid // tiles) % blocks, (pid // (tiles * blocks)).to(tl.int64)
    i = tl.arange(0, ROWS)
    # Hidden rows in the order of the planes they go to, so that what is stored lies side by side.
    row = tile * ROWS + (i if LAST else 4 * (i % (ROWS // 4)) + i // (ROWS // 4))
    inside, byte = (row < rows)[:, None], tl.arange(0, BYTES)[None, :]
    at = row[:, None] * row_bytes + byte
    bits = bank + tl.load(slots + mask) * mask_stride
    width = tl.cdiv(row_bytes, 8) * 16
    plane = 2 * SAMPLES * width
    values = x + (block if SHARED else mask * blocks + block) * 4 * plane
    values += tl.arange(0, 2 * SAMPLES)[:, None] * width + tl.arange(0, 2 * BYTES)[None, :]
    weights = fixed + row[:, None] * width + tl.arange(0, 2 * BYTES)[None, :]
    acc = tl.zeros((ROWS, 2 * SAMPLES), dtype=tl.float32)
    for start in range(0, row_bytes, BYTES):
        there = inside & (start + byte < row_bytes)
        kept = tl.load(bits + start + at, mask=there, other=0).to(tl.uint32)
        if SIGNED:
            negative = tl.load(fixed + start + at, mask=there, other=0).to(tl.uint32)
            acc = _times_kept_signs(acc, kept, negative, values + 2 * start, plane)
        else:
            acc = _times_kept_weights(acc, kept, weights + 2 * start, inside, values + 2 * start, plane, rows * width)
    total = tl.sum(tl.reshape(acc, (ROWS, 2, SAMPLES)), axis=1) * scale
    n = tl.arange(0, SAMPLES)[None, :]
    if LAST:
        n += block * SAMPLES
        logits = out + (mask * samples + n) * rows + row[:, None]
        tl.store(logits, total, mask=inside & (n < samples))
    else:
        out += (mask * blocks + block) * 8 * SAMPLES * (tl.cdiv(rows, 64) * 16)
        _store_parts(out, tl.where(inside, tl.maximum(total, 0.0), 0.0), i, tile, rows)


@triton.jit
def _store_parts(out: tl.tensor, values: tl.tensor, i: tl.tensor, tile: tl.tensor, rows: tl.tensor) -> None:
    """values (r, n) as the next layer reads them: two parts, in planes; the rows that fill up the planes are 0."""
    R: tl.constexpr = values.shape[0]
    SAMPLES: tl.constexpr = values.shape[1]
    width = tl.cdiv(rows, 64) * 16
    position = tile * (R // 4) + i % (R // 4)
    there = (position < width)[:, None]
    target = out + ((i // (R // 4)) * (2 * SAMPLES * width) + position)[:, None]
    target += tl.arange(0, SAMPLES)[None, :] * width
    high = values.to(out.dtype.element_ty)
    tl.store(target, high, mask=there)
    tl.store(target + SAMPLES * width, (values - high.to(tl.float32)).to(out.dtype.element_ty), mask=there)


@triton.jit
def _power_of_two(exponent: tl.tensor) -> tl.tensor:
    """2^exponent in float64, -1022 <= exponent <= 1023."""
    return ((exponent + 1023).to(tl.int64) << 52).to(tl.float64, bitcast=True)


@triton.jit
def split_vector(
    vector: tl.tensor, digits: tl.tensor, units: tl.tensor, length: tl.tensor, CHUNK: tl.constexpr
) -> None:
    """The values of a chunk of columns as integers of four signed 8-bit digits, in units of 2^-29 of their greatest.

    vector: float32 (length,), as if followed by zeros; digits: (chunks, 8 bits, 4 digits, CHUNK bytes), lowest digit
    first; units: float64 (chunks,).
    """
    chunk = tl.program_id(0)
    byte, bit = tl.arange(0, CHUNK)[:, None], tl.arange(0, 8)[None, :]
    at = 8 * (chunk * CHUNK + byte) + bit
    value = tl.load(vector + at, mask=at < length, other=0.0)
    most = tl.max(tl.max(tl.abs(value), axis=1), axis=0)
    field = most.to(tl.uint32, bitcast=True) >> 23
    exponent = tl.maximum(field.to(tl.int32), 1) - 127  # every value is less than 2^(exponent + 1)
    tl.store(units + chunk, _power_of_two(exponent - 29))
    whole = (value.to(tl.float64) * _power_of_two(29 - exponent)).to(tl.int32)
    target = digits + (chunk.to(tl.int64) * 8 + bit) * (4 * CHUNK) + byte
    for place in tl.static_range(4):
        digit = ((whole + 128) & 255) - 128
        tl.store(target + place * CHUNK, digit.to(tl.int8))
        whole = (whole - digit) >> 8


@triton.jit
def _plane(acc: tl.tensor, byte: tl.tensor, digits: tl.tensor, b: tl.constexpr, CHUNK: tl.constexpr) -> tl.tensor:
    """acc + 2^b times the sum of the digits where bit b is set."""
    kept = (byte & (1 << b)).to(tl.int8, bitcast=True)
    place = tl.arange(0, 8)[:, None]  # four digits, filled up to the narrowest product
    values = tl.load(digits + b * (4 * CHUNK), mask=place < 4, other=0)
    return tl.dot(kept, tl.trans(values), acc)


@triton.jit(do_not_specialize=["masks"], do_not_specialize_on_alignment=["slots"])
def bank_times_digits(
    bank: tl.tensor,
    slots: tl.tensor,
    digits: tl.tensor,
    units: tl.tensor,
    out: tl.tensor,
    masks: tl.tensor,
    stride: tl.tensor,
    length: tl.tensor,
    UNIT: tl.constexpr,
    CHUNK: tl.constexpr,
    MASKS: tl.constexpr,
    BYTES: tl.constexpr,
) -> None:
    """out[chunk, mask], float64 (chunks, masks): the chunk's part of the sum over the mask's set bits.

    stride: of the bank's rows, and length of the masks, both in UNIT bytes, so that the compiler knows how wide it may
    read.
    """
    blocks = tl.cdiv(masks, MASKS)
    block, chunk = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    mask = block * MASKS + tl.arange(0, MASKS)
    inside = (mask < masks)[:, None]
    slot = tl.load(slots + mask, mask=mask < masks, other=0)
    column = tl.arange(0, BYTES)[None, :]
    rows = bank + slot[:, None] * stride * UNIT
    values = digits + chunk.to(tl.int64) * (32 * CHUNK) + tl.arange(0, 8)[:, None] * CHUNK + column
    a0 = tl.zeros((MASKS, 8), dtype=tl.int32)
    a1, a2, a3, a4, a5, a6, a7 = a0, a0, a0, a0, a0, a0, a0
    for start in range(0, CHUNK, BYTES):
        at = chunk * CHUNK + start + column
        byte = tl.load(rows + at, mask=inside & (at < length * UNIT), other=0)
        a0 = _plane(a0, byte, values + start, 0, CHUNK)
        a1 = _plane(a1, byte, values + start, 1, CHUNK)
        a2 = _plane(a2, byte, values + start, 2, CHUNK)
        a3 = _plane(a3, byte, values + start, 3, CHUNK)
        a4 = _plane(a4, byte, values + start, 4, CHUNK)
        a5 = _plane(a5, byte, values + start, 5, CHUNK)
        a6 = _plane(a6, byte, values + start, 6, CHUNK)
        a7 = _plane(a7, byte, values + start, 7, CHUNK)
    # As a signed integer bit 7 is -2^7; every sum is a multiple of its power of two.
    total = a0 + (a1 >> 1) + (a2 >> 2) + (a3 >> 3) + (a4 >> 4) + (a5 >> 5) + (a6 >> 6) - (a7 >> 7)
    place = tl.arange(0, 8)[None, :]
    whole = tl.sum(total.to(tl.int64) << (8 * place), axis=1)
    tl.store(out + chunk * masks + mask, whole.to(tl.float64) * tl.load(units + chunk), mask=mask < masks)


@triton.jit
def keep_weights(
    packed: tl.tensor,
    weight: tl.tensor,
    out: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    ROWS: tl.constexpr,
    BYTES: tl.constexpr,
) -> None:
    """out = weight where the bit is set, else 0; packed (rows, row_bytes), weight and out (rows, columns)."""
    row_bytes = tl.cdiv(columns, 8)
    blocks = tl.cdiv(row_bytes, BYTES)
    row = (tl.program_id(0) // blocks) * ROWS + tl.arange(0, ROWS)[:, None]
    byte = (tl.program_id(0) % blocks) * BYTES + tl.arange(0, BYTES)[None, :]
    bits = tl.load(packed + row * row_bytes + byte, mask=(row < rows) & (byte < row_bytes), other=0)
    kept = (bits[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1
    kept = tl.reshape(kept, (ROWS, 8 * BYTES)) != 0
    column = (tl.program_id(0) % blocks) * (8 * BYTES) + tl.arange(0, 8 * BYTES)[None, :]
    there = (row < rows) & (column < columns)
    at = row * columns + column
    tl.store(out + at, tl.where(kept, tl.load(weight + at, mask=there, other=0.0), 0.0), mask=there)


@triton.jit(do_not_specialize=["lr", "share"])
def rmsprop(
    gradient: tl.tensor,
    weight: tl.tensor,
    scores: tl.tensor,
    average: tl.tensor,
    second: tl.tensor,
    out: tl.tensor,
    size: tl.tensor,
    lr: tl.tensor,
    share: tl.tensor,
    DECAY: tl.constexpr,
    EPSILON: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One step of RMSProp in place, and in `out` the effective weights that follow; everything float32 (size,)."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = at < size
    fixed = tl.load(weight + at, mask=there, other=0.0)
    slope = tl.load(gradient + at, mask=there, other=0.0) * fixed
    moment = tl.load(second + at, mask=there, other=0.0) * DECAY + (1.0 - DECAY) * slope * slope
    tl.store(second + at, moment, mask=there)
    direction = tl.div_rn(slope, tl.sqrt_rn(moment) + EPSILON)
    score = tl.load(scores + at, mask=there, other=0.0) - lr * direction
    tl.store(scores + at, score, mask=there)
    mean = tl.load(average + at, mask=there, other=0.0)
    tl.store(average + at, mean + share * (score - mean), mask=there)
    tl.store(out + at, tl.where(score >= 0, fixed, 0.0), mask=there)
