"""Soft floats to whole numbers: floor and its kin, the remainder, int32, and codes of a quantized type."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import lax

from qcompiler.numerics import int32 as i32
from qcompiler.numerics.soft_float import (
    HALF,
    INT32_MAX,
    SoftFloat,
    constant,
    div,
    is_infinite,
    neg,
    normalize,
    select,
)


def floor(x: SoftFloat) -> SoftFloat:
    """The largest whole number that is not above x; exact."""
    return _whole(x, i32.right(x.mantissa, _fraction_bits(x)))


def ceil(x: SoftFloat) -> SoftFloat:
    """The smallest whole number that is not below x; exact."""
    return neg(floor(neg(x)))


def round(x: SoftFloat, method: lax.RoundingMethod) -> SoftFloat:
    """The nearest whole number; ties away from zero or to even, as `method` says; exact."""
    bits = _fraction_bits(x)
    if method == lax.RoundingMethod.AWAY_FROM_ZERO:
        rounded = i32.right_rounded(i32.magnitude(x.mantissa), bits)
        return _whole(x, i32.with_sign(rounded, i32.right(x.mantissa, 31)))
    up = i32.right_rounded(x.mantissa, bits)
    # A tie went up: the fraction was 1/2, that is, twice the number is odd and nothing follows.
    doubled = i32.left(x.mantissa, 1)
    halves = i32.right(doubled, bits)
    tie = i32.as_integer(i32.eq(i32.left(halves, bits), doubled))
    return _whole(x, i32.sub(up, i32.bit_and(i32.bit_and(tie, halves), i32.bit_and(up, 1))))


def trunc(x: SoftFloat) -> SoftFloat:
    """The nearest whole number towards zero; exact."""
    return _whole(x, i32.with_sign(i32.right(i32.magnitude(x.mantissa), _fraction_bits(x)), i32.right(x.mantissa, 31)))


def _fraction_bits(x: SoftFloat) -> jax.Array:
    """How many bits of the mantissa lie behind the point; 31 for all and more."""
    return i32.clip(lax.neg_p.bind(x.exponent), 0, 31)


def _whole(x: SoftFloat, whole: Any) -> SoftFloat:
    """`whole` as a number: it is in units of one, or of 2**exponent where `x` had no fraction."""
    return select(i32.ge(x.exponent, 0), x, normalize(whole, 0, bits=32))


def to_int(x: SoftFloat) -> jax.Array:
    """int32 towards zero; saturates at ±(2**31 - 1)."""
    size = i32.right(i32.magnitude(x.mantissa), _fraction_bits(x))
    size = i32.select(i32.eq(x.exponent, 1), i32.left(size, 1), size)
    size = i32.select(i32.gt(x.exponent, 1), INT32_MAX, size)
    return i32.with_sign(size, i32.right(x.mantissa, 31))


def rem(a: SoftFloat, b: SoftFloat) -> SoftFloat:
    """a - b * trunc(a / b), of the sign of a; exact for |a / b| < 2**29, 0 beyond 2**31 and for b = 0.

    The remainder is smaller than b, so that the low halves of the products say it exactly.
    """
    quotient = to_int(div(a, b))
    distance = i32.sub(a.exponent, b.exponent)
    rest = i32.sub(i32.left(a.mantissa, i32.clip(distance, 0, 31)), i32.mul(quotient, b.mantissa))
    # The quotient was rounded: where it came out one too large, the rest has the wrong sign.
    signs = i32.right(a.mantissa, 31)
    rest = i32.with_sign(rest, signs)
    rest = i32.with_sign(i32.add(rest, i32.bit_and(i32.right(rest, 31), i32.magnitude(b.mantissa))), signs)
    defined = i32.bit_and(i32.lt(distance, PRECISE), i32.bit_not(is_infinite(a)))
    exact = normalize(i32.select(defined, rest, 0), b.exponent)
    return select(i32.lt(distance, 0), a, exact)


#: Quotients of numbers whose exponents differ by this much may not fit int32.
PRECISE = 31


def to_codes(
    x: SoftFloat,
    scale: Any,
    zero_point: Any,
    qmin: int,
    qmax: int,
    dtype: Any,
    hold: Callable[[str, np.ndarray], Any] = lambda name, value: value,
) -> jax.Array:
    """min(max(floor(x / scale + 1/2) + zero_point, qmin), qmax): the exit to a quantized type.

    Args:
      x: numbers of any size; those outside of the range saturate.
      scale: float32 known now, positive; a number or broadcastable to `x`.
      zero_point: int32, known now or not, of magnitude at most 2**24; broadcastable to `x`.
      qmin: the smallest code, above -2**27.
      qmax: the largest code, below 2**27.
      dtype: of the result; holds both.
      hold: see `soft_float.constant`.

    The reciprocal of the scale has 30 bits and the product is cut to 28 or 29 before it is rounded half up.
    """
    factor = constant(1 / np.asarray(scale, np.float64), hold, "inverse_scale")
    if np.ndim(factor.mantissa) == 0 and factor.mantissa == HALF:
        steps, exponent = x.mantissa, i32.add(x.exponent, factor.exponent + np.int32(29))
    else:
        steps = i32.mulhi(i32.left(x.mantissa, 1), i32.left(factor.mantissa, 1))
        exponent = i32.add(x.exponent, i32.add(factor.exponent, 30))
    codes = i32.right_rounded(steps, i32.clip(lax.neg_p.bind(exponent), 0, 31))
    return lax.convert_element_type(i32.clip(i32.add(codes, zero_point), qmin, qmax), dtype)
