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
Step = Callable[[Builder, Any, Any, int], None]
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


def _each_lanes(builder: Builder, bits: Any, count: Any, unroll: int, step: Step) -> None:
    """step(builder, lanes, offset, turn) for each 16 bits of `count` bytes: a vector of bits, and where its first lane
    lies in an array of floats, in bytes. `turn` counts 0 to unroll - 1, for as many independent sums."""

    def at(position: Any, turn: int, kind: Any = _WORD) -> None:
        word = _read(builder, builder.add(bits, position), kind)
        lanes = builder.bitcast(word if kind is _WORD else builder.zext(word, _WORD), _BITS)
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


def _summed(builder: Builder, values: Any) -> Any:
    """The sum of the lanes, halves first: the same on every processor."""
    width = LANES
    while width > 1:
        width //= 2
        halves = [
            builder.shuffle_vector(
                values,
                ir.Constant(values.type, ir.Undefined),
                ir.Constant(ir.VectorType(ir.IntType(32), width), list(range(start, start + width))),
            )
            for start in (0, width)
        ]
        values = builder.fadd(*halves)
    return builder.extract_element(values, ir.Constant(ir.IntType(32), 0))


def _masked_dots(samples: int, unroll: int) -> Any:
    """out[s] = Σ weights · x[s] over the set bits, for a few samples whose rows lie `stride` bytes apart."""

    @intrinsic
    def dots(
        _context: Any, bits: Any, count: Any, weights: Any, x: Any, stride: Any, out: Any, out_stride: Any
    ) -> tuple[Any, Any]:
        def codegen(context: Any, builder: Builder, _signature: Any, args: Sequence[Any]) -> Any:
            bits, count, weights, x, stride, out, out_stride = args
            sums = [[cgutils.alloca_once_value(builder, _ZEROS) for _ in range(unroll)] for _ in range(samples)]
            rows = [builder.add(x, builder.mul(stride, _index(s))) for s in range(samples)]

            def step(b: Builder, lanes: Any, offset: Any, turn: int) -> None:
                weight = _read(b, b.add(weights, offset), _FLOATS)
                for row, total in zip(rows, sums, strict=True):
                    value = b.fmul(weight, _read(b, b.add(row, offset), _FLOATS), flags=_FUSED)
                    kept = b.select(lanes, value, _ZEROS)
                    b.store(b.fadd(b.load(total[turn]), kept, flags=_FUSED), total[turn])

            _each_lanes(builder, bits, count, unroll, step)
            for s, (first, *others) in enumerate(sums):
                total = builder.load(first)
                for other in others:
                    total = builder.fadd(total, builder.load(other))
                _write(builder, _summed(builder, total), builder.add(out, builder.mul(out_stride, _index(s))))
            return context.get_dummy_value()

        return types.void(*[types.intp] * 7), codegen

    return dots


dot = _masked_dots(1, 4)
dots = _masked_dots(4, 2)


def _masked_sum(_context: Any, bits: Any, count: Any, values: Any) -> tuple[Any, Any]:
    """Σ values over the set bits, float32."""

    def codegen(_context: Any, builder: Builder, _signature: Any, args: Sequence[Any]) -> Any:
        bits, count, values = args
        sums = [cgutils.alloca_once_value(builder, _ZEROS) for _ in range(4)]

        def step(b: Builder, lanes: Any, offset: Any, turn: int) -> None:
            kept = b.select(lanes, _read(b, b.add(values, offset), _FLOATS), _ZEROS)
            b.store(b.fadd(b.load(sums[turn]), kept), sums[turn])

        _each_lanes(builder, bits, count, len(sums), step)
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

            def step(b: Builder, lanes: Any, offset: Any, _turn: int) -> None:
                target = b.add(out, offset)
                kept = b.select(lanes, _read(b, b.add(values, offset), _FLOATS), _ZEROS)
                _write(b, b.fadd(_read(b, target, _FLOATS), kept) if accumulate else kept, target)

            _each_lanes(builder, bits, count, 2, step)
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
