"""Sixteen bits of a mask select sixteen float32 lanes: what the loops of `kernels` are made of.

Written in LLVM's own language, which has vectors of bits, so that every processor gets its best form of them: a masked
load and an addition for sixteen weights with AVX-512, compare and blend elsewhere. Compilers do not recognise a plain
loop over bits as that. Arrays of floats are read in whole lanes: they have to be filled up to a multiple of LANES.

Numba keeps what it compiled by the date of `kernels.py`: after a change here, that file has to be saved again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 16

Builder = Any
Step = Callable[[Builder, Sequence[Any], Any, int], None]
_FLOAT, _BYTE, _INDEX = ir.FloatType(), ir.IntType(8), ir.IntType(64)
_FLOATS, _BITS, _WORD = ir.VectorType(_FLOAT, LANES), ir.VectorType(ir.IntType(1), LANES), ir.IntType(LANES)
_HALVES = ir.VectorType(ir.IntType(16), LANES)
_ZEROS = ir.Constant(_FLOATS, None)
_FUSED = ("contract",)


def _index(value: int) -> Any:
    return ir.Constant(_INDEX, value)


def _read(builder: Builder, address: Any, kind: Any) -> Any:
    """A value of this type at an address that need not be aligned."""
    value = builder.load(builder.inttoptr(address, kind.as_pointer()))
    value.align = {_FLOATS: 4, _HALVES: 2}.get(kind, 1)
    return value


def _write(builder: Builder, value: Any, address: Any) -> None:
    builder.store(value, builder.inttoptr(address, value.type.as_pointer())).align = 4


def _constant(value: float) -> Any:
    return ir.Constant(_FLOATS, [value] * LANES)


def _each_lanes(builder: Builder, bits: Sequence[Any], count: Any, unroll: int, step: Step) -> None:
    """step(builder, lanes, offset, turn) for each 16 bits of `count` bytes at each of the addresses `bits`: vectors of
    bits, and where their first lane lies in an array of floats, in bytes. `turn` counts 0 to unroll - 1, for as many
    independent sums."""

    def at(position: Any, turn: int, kind: Any = _WORD) -> None:
        words = [_read(builder, builder.add(address, position), kind) for address in bits]
        if kind is not _WORD:
            words = [builder.zext(word, _WORD) for word in words]
        lanes = [builder.bitcast(word, _BITS) for word in words]
        step(builder, lanes, builder.mul(position, _index(8 * 4)), turn)

    whole = builder.udiv(count, _index(2 * unroll))
    with cgutils.for_range(builder, whole) as loop:
        for turn in range(unroll):
            at(builder.add(builder.mul(loop.index, _index(2 * unroll)), _index(2 * turn)), turn)
    done = builder.mul(whole, _index(2 * unroll))
    with cgutils.for_range(builder, builder.udiv(builder.sub(count, done), _index(2))) as loop:
        at(builder.add(done, builder.mul(loop.index, _index(2))), 0)
    with builder.if_then(builder.trunc(count, ir.IntType(1))):
        at(builder.sub(count, _index(1)), 0, _BYTE)


def _folded(builder: Builder, vectors: Sequence[Any], join: Callable[[Builder, Any, Any], Any]) -> list[Any]:
    """All lanes of each vector joined to one value, halves first: the same on every processor.

    A power of two of vectors at most LANES; they share the shuffles, so that four cost little more than one.
    """
    vectors, members, width = list(vectors), 1, LANES  # a vector holds `members` of them, `width` lanes of each
    while width > 1:
        size, width = members * width, width // 2
        pairs = list(zip(vectors[::2], vectors[1::2], strict=True)) if len(vectors) > 1 else [(vectors[0], None)]
        starts = range(0, size * (1 if pairs[0][1] is None else 2), 2 * width)
        lower = [start + lane for start in starts for lane in range(width)]
        vectors = [
            join(builder, _picked(builder, one, other, lower), _picked(builder, one, other, [i + width for i in lower]))
            for one, other in pairs
        ]
        members = len(starts)
    return [builder.extract_element(vectors[0], ir.Constant(ir.IntType(32), place)) for place in range(members)]


def _picked(builder: Builder, one: Any, other: Any, lanes: Sequence[int]) -> Any:
    """A vector of these lanes; those of `other` are counted on from the last one of `one`."""
    second = ir.Constant(one.type, ir.Undefined) if other is None else other
    return builder.shuffle_vector(one, second, ir.Constant(ir.VectorType(ir.IntType(32), len(lanes)), list(lanes)))


def _added(builder: Builder, one: Any, other: Any) -> Any:
    return builder.fadd(one, other)


def _summed(builder: Builder, values: Any) -> Any:
    return _folded(builder, [values], _added)[0]


def _spread(builder: Builder, value: Any) -> Any:
    """One float in every lane."""
    lanes = builder.insert_element(ir.Constant(_FLOATS, ir.Undefined), value, ir.Constant(ir.IntType(32), 0))
    zeros = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
    return builder.shuffle_vector(lanes, ir.Constant(_FLOATS, ir.Undefined), zeros)


def _masked_dots(several: int, unroll: int, own_bits: bool) -> Any:
    """out[i] = Σ weights · x[i] over the set bits, for `several` rows of x that lie `stride` bytes apart.

    The bits are those at `bits` + `offset`, of all of them; or, where each has its own, at bits[i] + `offset`.
    """

    @intrinsic
    def dots(
        _context: Any, bits: Any, offset: Any, count: Any, weights: Any, x: Any, stride: Any, out: Any, out_stride: Any
    ) -> tuple[Any, Any]:
        def codegen(context: Any, builder: Builder, _signature: Any, args: Sequence[Any]) -> Any:
            bits, offset, count, weights, x, stride, out, out_stride = args
            numbers = [_index(i) for i in range(several)]
            rows = [builder.add(x, builder.mul(stride, i)) for i in numbers]
            masks = [bits]
            if own_bits:
                masks = [_read(builder, builder.add(bits, builder.mul(_index(8), i)), _INDEX) for i in numbers]
            masks = [builder.add(address, offset) for address in masks]
            sums = [[cgutils.alloca_once_value(builder, _ZEROS) for _ in range(unroll)] for _ in rows]

            def step(b: Builder, lanes: Sequence[Any], offset: Any, turn: int) -> None:
                weight = _read(b, b.add(weights, offset), _FLOATS)
                for i, (row, total) in enumerate(zip(rows, sums, strict=True)):
                    before = b.load(total[turn])
                    product = b.fmul(weight, _read(b, b.add(row, offset), _FLOATS), flags=_FUSED)
                    after = b.fadd(before, product, flags=_FUSED)
                    b.store(b.select(lanes[i % len(lanes)], after, before), total[turn])

            _each_lanes(builder, masks, count, unroll, step)
            totals = []
            for first, *others in sums:
                total = builder.load(first)
                for other in others:
                    total = builder.fadd(total, builder.load(other))
                totals.append(total)
            for i, total in zip(numbers, _folded(builder, totals, _added), strict=True):
                _write(builder, total, builder.add(out, builder.mul(out_stride, i)))
            return context.get_dummy_value()

        return types.void(*[types.intp] * 8), codegen

    return dots


dot = _masked_dots(1, 4, own_bits=False)
"""One row under one mask."""
row_dots = _masked_dots(4, 2, own_bits=False)
"""Four rows under one mask."""
mask_dots = _masked_dots(4, 4, own_bits=True)
"""A row each under four masks, as `dot` gives it under one."""


def _masked_sum(_context: Any, bits: Any, count: Any, values: Any) -> tuple[Any, Any]:
    """Σ values over the set bits, float32."""

    def codegen(_context: Any, builder: Builder, _signature: Any, args: Sequence[Any]) -> Any:
        bits, count, values = args
        sums = [cgutils.alloca_once_value(builder, _ZEROS) for _ in range(4)]

        def step(b: Builder, lanes: Sequence[Any], offset: Any, turn: int) -> None:
            kept = b.select(lanes[0], _read(b, b.add(values, offset), _FLOATS), _ZEROS)
            b.store(b.fadd(b.load(sums[turn]), kept), sums[turn])

        _each_lanes(builder, [bits], count, len(sums), step)
        first, second, third, fourth = (builder.load(total) for total in sums)
        return _summed(builder, builder.fadd(builder.fadd(first, second), builder.fadd(third, fourth)))

    return types.float32(*[types.intp] * 3), codegen


masked_sum: Any = intrinsic(_masked_sum)


def _masked_map(accumulate: bool) -> Any:
    """out[i] = value of a set bit, 0 for the others; or added to what is there."""

    @intrinsic
    def mapped(_context: Any, bits: Any, count: Any, values: Any, out: Any) -> tuple[Any, Any]:
        def codegen(context: Any, builder: Builder, _signature: Any, args: Sequence[Any]) -> Any:
            bits, count, values, out = args

            def step(b: Builder, lanes: Sequence[Any], offset: Any, _turn: int) -> None:
                target = b.add(out, offset)
                kept = b.select(lanes[0], _read(b, b.add(values, offset), _FLOATS), _ZEROS)
                _write(b, b.fadd(_read(b, target, _FLOATS), kept) if accumulate else kept, target)

            _each_lanes(builder, [bits], count, 2, step)
            return context.get_dummy_value()

        return types.void(*[types.intp] * 4), codegen

    return mapped


masked_copy = _masked_map(accumulate=False)
masked_add = _masked_map(accumulate=True)


def _halves_dot(_context: Any, halves: Any, count: Any, x: Any) -> tuple[Any, Any]:
    """Σ half · x over `count` bfloat16 numbers (the upper halves of float32), a multiple of LANES; float32."""

    def codegen(_context: Any, builder: Builder, _signature: Any, args: Sequence[Any]) -> Any:
        halves, count, x = args
        sums = [cgutils.alloca_once_value(builder, _ZEROS) for _ in range(4)]
        words = ir.VectorType(ir.IntType(32), LANES)
        sixteen = ir.Constant(words, [16] * LANES)

        def at(position: Any, turn: int) -> None:
            read = _read(builder, builder.add(halves, builder.mul(position, _index(2))), _HALVES)
            value = builder.bitcast(builder.shl(builder.zext(read, words), sixteen), _FLOATS)
            other = _read(builder, builder.add(x, builder.mul(position, _index(4))), _FLOATS)
            product = builder.fmul(value, other, flags=_FUSED)
            builder.store(builder.fadd(builder.load(sums[turn]), product, flags=_FUSED), sums[turn])

        step = LANES * len(sums)
        whole = builder.udiv(count, _index(step))
        with cgutils.for_range(builder, whole) as loop:
            for turn in range(len(sums)):
                at(builder.add(builder.mul(loop.index, _index(step)), _index(LANES * turn)), turn)
        done = builder.mul(whole, _index(step))
        with cgutils.for_range(builder, builder.udiv(builder.sub(count, done), _index(LANES))) as loop:
            at(builder.add(done, builder.mul(loop.index, _index(LANES))), 0)
        first, second, third, fourth = (builder.load(total) for total in sums)
        return _summed(builder, builder.fadd(builder.fadd(first, second), builder.fadd(third, fourth)))

    return types.float32(*[types.intp] * 3), codegen


halves_dot: Any = intrinsic(_halves_dot)


def _each_floats(
    builder: Builder, values: Any, count: Any, unroll: int, step: Callable[[Builder, Any, int], None]
) -> None:
    """step(builder, lanes, turn) for each LANES of `count` floats, a multiple of LANES."""

    def at(position: Any, turn: int) -> None:
        step(builder, _read(builder, builder.add(values, builder.mul(position, _index(4 * LANES))), _FLOATS), turn)

    lanes = builder.udiv(count, _index(LANES))
    whole = builder.udiv(lanes, _index(unroll))
    with cgutils.for_range(builder, whole) as loop:
        for turn in range(unroll):
            at(builder.add(builder.mul(loop.index, _index(unroll)), _index(turn)), turn)
    done = builder.mul(whole, _index(unroll))
    with cgutils.for_range(builder, builder.sub(lanes, done)) as loop:
        at(builder.add(done, loop.index), 0)


def _larger(builder: Builder, one: Any, other: Any) -> Any:
    return builder.select(builder.fcmp_ordered(">", one, other), one, other)


def _largest(_context: Any, values: Any, count: Any) -> tuple[Any, Any]:
    """The largest of `count` floats, a multiple of LANES; float32."""

    def codegen(_context: Any, builder: Builder, _signature: Any, args: Sequence[Any]) -> Any:
        values, count = args
        first = _read(builder, values, _FLOATS)
        most = [cgutils.alloca_once_value(builder, first) for _ in range(4)]

        def step(b: Builder, lanes: Any, turn: int) -> None:
            b.store(_larger(b, lanes, b.load(most[turn])), most[turn])

        _each_floats(builder, values, count, len(most), step)
        one, two, three, four = (builder.load(place) for place in most)
        return _folded(builder, [_larger(builder, _larger(builder, one, two), _larger(builder, three, four))], _larger)[
            0
        ]

    return types.float32(*[types.intp] * 2), codegen


largest: Any = intrinsic(_largest)

_LEAST_EXPONENT = -87.0
_ROUNDING = 1.5 * 2.0**23
"""Added to a small number it leaves the nearest integer in the lowest bits."""
_EXP = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
"""Of e^x = 1 + x + x² p(x) for |x| <= ln(2) / 2: Cephes' expf."""


def _exp(builder: Builder, x: Any) -> Any:
    """e^x for x from _LEAST_EXPONENT to 88, to two units in the last place."""
    words = ir.VectorType(ir.IntType(32), LANES)
    turns = builder.fadd(builder.fmul(x, _constant(1.44269504088896341)), _constant(_ROUNDING))
    power = builder.fsub(turns, _constant(_ROUNDING))
    rest = builder.fsub(x, builder.fmul(power, _constant(0.693359375)))
    rest = builder.fsub(rest, builder.fmul(power, _constant(-2.12194440e-4)))
    value = _constant(_EXP[0])
    for coefficient in _EXP[1:]:
        value = builder.fadd(builder.fmul(value, rest), _constant(coefficient))
    value = builder.fadd(builder.fmul(builder.fmul(value, rest), rest), builder.fadd(rest, _constant(1.0)))
    exponent = builder.shl(builder.bitcast(turns, words), ir.Constant(words, [23] * LANES))
    scale = builder.bitcast(builder.add(exponent, ir.Constant(words, [127 << 23] * LANES)), _FLOATS)
    return builder.fmul(value, scale)


def _exp_sums(_context: Any, values: Any, count: Any, most: Any, out: Any) -> tuple[Any, Any]:
    """out[0] = Σ e^d and out[1] = Σ d e^d with d = value - most, of `count` floats, a multiple of LANES.

    `most` is the largest of them; what lies far below it, as what fills up lanes does, adds nothing.
    """

    def codegen(context: Any, builder: Builder, _signature: Any, args: Sequence[Any]) -> Any:
        values, count, most, out = args
        base = _spread(builder, most)
        sums = [[cgutils.alloca_once_value(builder, _ZEROS) for _ in range(2)] for _ in range(2)]

        def step(b: Builder, lanes: Any, turn: int) -> None:
            below = _larger(b, b.fsub(lanes, base), _constant(_LEAST_EXPONENT))
            share = _exp(b, below)
            for total, value in zip(sums[turn], (share, b.fmul(share, below)), strict=True):
                b.store(b.fadd(b.load(total), value), total)

        _each_floats(builder, values, count, len(sums), step)
        for place, (one, other) in enumerate(zip(*sums, strict=True)):
            total = _summed(builder, builder.fadd(builder.load(one), builder.load(other)))
            _write(builder, total, builder.add(out, _index(4 * place)))
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, types.float32, types.intp), codegen


exp_sums: Any = intrinsic(_exp_sums)
