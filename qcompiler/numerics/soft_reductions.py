"""Reductions and scans of soft floats along axes: sums, products, extremes and where they lie.

Sums align all mantissas to the largest exponent along the axes and add halves of 15 bits in two int32 accumulators, so
that up to 2**15 terms lose nothing but what alignment rounds: 2**-30 of the largest term for each, unbiased. A sum does
not depend on the order of its terms.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qcompiler.numerics import int32 as i32
from qcompiler.numerics.soft_float import (
    INT32_MIN,
    ZERO_EXPONENT,
    SoftFloat,
    compare,
    maximum,
    minimum,
    mul,
    neg,
    normalize,
    order_key,
    select,
)

#: Bits of each half of a mantissa; 2**HALF_BITS terms fit an accumulator.
HALF_BITS = 15
ONE = SoftFloat(np.int32(1 << 29), np.int32(-29))


def reduce_sum(x: SoftFloat, axes: Sequence[int]) -> SoftFloat:
    """Sums along `axes`, which vanish; 0 where there is nothing to add.

    Infinities of both signs cancel as often as they meet.
    """
    axes = _axes(x, axes)
    if 0 in x.shape:
        return _empty(x, axes, 0)
    top = _keep(lax.reduce_max(_full(x).exponent, axes), x.shape, axes)
    high, low, extra = _halves(x, top, math.prod(x.shape[a] for a in axes))
    total = _joined(lax.reduce_sum(high, axes), lax.reduce_sum(low, axes), lax.squeeze(top, axes), extra)
    return total


def cumsum(x: SoftFloat, axis: int, reverse: bool = False) -> SoftFloat:
    """Running sums along `axis`, of the shape of `x`; errors are relative to the largest element along the axis."""
    if 0 in x.shape:
        return x
    top = _keep(lax.reduce_max(_full(x).exponent, (axis,)), x.shape, (axis,))
    high, low, extra = _halves(x, top, x.shape[axis])
    return _joined(lax.cumsum(high, axis, reverse), lax.cumsum(low, axis, reverse), top, extra)


def _halves(x: SoftFloat, top: Any, count: int) -> tuple[jax.Array, jax.Array, int]:
    """Mantissas in units of 2**(top + extra), as high * 2**15 + low; sums of `count` of either fit int32."""
    extra = max(0, (count - 1).bit_length() - HALF_BITS)
    aligned = i32.right_rounded(x.mantissa, i32.minimum(i32.sub(i32.add(top, extra), x.exponent), 31))
    return i32.right(aligned, HALF_BITS), i32.bit_and(aligned, (1 << HALF_BITS) - 1), extra


def _joined(high: Any, low: Any, top: Any, extra: int) -> SoftFloat:
    """(high * 2**15 + low) * 2**(top + extra), for 0 <= low < 2**30."""
    high = i32.add(high, i32.right(low, HALF_BITS))
    low = i32.bit_and(low, (1 << HALF_BITS) - 1)
    # As many bits of the low half as there is room for.
    room = i32.clip(i32.sub(i32.leading_zeros(i32.magnitude(high)), 2), 0, HALF_BITS)
    dropped = i32.sub(HALF_BITS, room)
    return normalize(i32.add(i32.left(high, room), i32.right(low, dropped)), i32.add(top, i32.add(dropped, extra)))


def reduce_prod(x: SoftFloat, axes: Sequence[int]) -> SoftFloat:
    """Products along `axes`, by a tree; 1 where there is nothing to multiply."""
    axes = _axes(x, axes)
    kept = tuple(a for a in range(len(x.shape)) if a not in axes)
    shape = tuple(x.shape[a] for a in kept)
    count = math.prod(x.shape[a] for a in axes)
    if 0 in x.shape:
        return _empty(x, axes, ONE)
    x = x.map(lambda v: lax.reshape(lax.transpose(v, axes + kept), (count, *shape)))
    while count > 1:
        half, rest = count // 2, count % 2
        product = mul(_part(x, 0, half, 0), _part(x, half, 2 * half, 0))
        if rest:
            product = _concatenated(product, _part(x, 2 * half, count, 0))
        x, count = product, half + rest
    return x.map(lambda v: lax.squeeze(v, (0,)))


def reduce_max(x: SoftFloat, axes: Sequence[int]) -> SoftFloat:
    """Largest elements along `axes`, none of which may be of size 0.

    The key of sign and exponent first, then mantissas among those that reach it.
    """
    axes = _axes(x, axes)
    key = order_key(_full(x))
    top = lax.reduce_max(key, axes)
    reach = i32.eq(key, _keep(top, x.shape, axes))
    mantissa = lax.reduce_max(i32.select(reach, x.mantissa, INT32_MIN), axes)
    return SoftFloat(mantissa, i32.add(i32.magnitude(top), ZERO_EXPONENT))


def reduce_min(x: SoftFloat, axes: Sequence[int]) -> SoftFloat:
    """Smallest elements along `axes`, none of which may be of size 0."""
    return neg(reduce_max(neg(x), axes))


def argmax(x: SoftFloat, axis: int) -> jax.Array:
    """int32 index along `axis` of the first of the largest elements."""
    top = reduce_max(x, (axis,)).map(lambda v: lax.expand_dims(v, (axis,)))
    places = lax.broadcasted_iota(np.int32, x.shape, axis)
    return lax.reduce_min(i32.select(compare("eq", x, top), places, x.shape[axis]), (axis,))


def argmin(x: SoftFloat, axis: int) -> jax.Array:
    """int32 index along `axis` of the first of the smallest elements."""
    return argmax(neg(x), axis)


def cummax(x: SoftFloat, axis: int, reverse: bool = False) -> SoftFloat:
    return scan(maximum, x, axis, reverse)


def cummin(x: SoftFloat, axis: int, reverse: bool = False) -> SoftFloat:
    return scan(minimum, x, axis, reverse)


def cumprod(x: SoftFloat, axis: int, reverse: bool = False) -> SoftFloat:
    return scan(mul, x, axis, reverse)


def scan(combine: Callable[[SoftFloat, SoftFloat], SoftFloat], x: SoftFloat, axis: int, reverse: bool) -> SoftFloat:
    """Combines ever longer runs of elements: after k rounds, the 2**k that end at each place.

    The rounds are a loop: written out, XLA:CPU computes each round again in all that read it.
    """
    x, count = _full(x), x.shape[axis]
    if count < 2:
        return x
    places = lax.broadcasted_iota(np.int32, x.shape, axis)

    def round_(state: tuple[Any, SoftFloat]) -> tuple[Any, SoftFloat]:
        step, x = state
        # The element `step` places before (or behind) each, where there is one.
        start = step if reverse else i32.sub(count, step)
        inside = i32.lt(places, i32.sub(count, step)) if reverse else i32.ge(places, step)
        twice = x.map(lambda v: lax.concatenate([v, v], axis))
        other = twice.map(lambda v: lax.dynamic_slice_in_dim(v, start, count, axis))
        # Unlike a sum, none of these operations minds the order of its operands.
        return i32.left(step, 1), select(inside, combine(other, x), x)

    return lax.while_loop(lambda state: i32.lt(state[0], count), round_, (jnp.int32(1), x))[1]


def _part(x: SoftFloat, start: int, stop: int, axis: int) -> SoftFloat:
    return x.map(lambda v: lax.slice_in_dim(v, start, stop, axis=axis))


def _concatenated(a: SoftFloat, b: SoftFloat, axis: int = 0) -> SoftFloat:
    a, b = _full(a), _full(b)
    return SoftFloat(lax.concatenate([a.mantissa, b.mantissa], axis), lax.concatenate([a.exponent, b.exponent], axis))


def _full(x: SoftFloat) -> SoftFloat:
    return x.broadcast_to(x.shape)


def _axes(x: SoftFloat, axes: Sequence[int]) -> tuple[int, ...]:
    return tuple(a % len(x.shape) for a in axes)


def _keep(reduced: Any, shape: tuple[int, ...], axes: tuple[int, ...]) -> jax.Array:
    """Brings reduced axes back, of size 1."""
    return lax.reshape(reduced, tuple(1 if a in axes else n for a, n in enumerate(shape)))


def _empty(x: SoftFloat, axes: tuple[int, ...], value: Any) -> SoftFloat:
    shape = tuple(n for a, n in enumerate(x.shape) if a not in axes)
    value = SoftFloat(np.int32(0), np.int32(ZERO_EXPONENT)) if value == 0 else value
    return value.broadcast_to(shape)
