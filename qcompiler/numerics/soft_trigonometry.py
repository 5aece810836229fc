"""Circular functions of soft floats and their inverses.

Arguments are reduced to quarter turns with 64 bits of 2/pi: the absolute error of `sin` and `cos` is below 2**-26 for
|x| < 2**29, and near 0 `sin` and `tan` keep their relative accuracy. Beyond, where neighbouring numbers are a radian
or more apart, the angle counts as 0.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from qcompiler.numerics import int32 as i32
from qcompiler.numerics.soft_float import (
    SoftFloat,
    abs_,
    add,
    compare,
    constant,
    div,
    mul,
    normalize,
    select,
    signed_as,
    sqrt,
    sub,
)
from qcompiler.numerics.soft_functions import ONE, ZERO
from qcompiler.numerics.soft_polynomial import centred, fit, fixed, squared

#: 2/pi in units of 2**-64, as two words of 32 bits.
_TWO_OVER_PI = 0xA2F9836E4E441529
_WORDS = [int(np.array(_TWO_OVER_PI >> shift & 0xFFFFFFFF, np.uint32).view(np.int32)) for shift in (32, 0)]

# Of the square of an angle within an eighth of a turn, the angle in quarter turns.
_SINE = fit(lambda w: math.sin(math.pi / 2 * math.sqrt(w)) / (math.pi / 2 * math.sqrt(w)), 0.0, 0.25, 5)
_COSINE = fit(lambda w: math.cos(math.pi / 2 * math.sqrt(w)), 0.0, 0.25, 6)
# Of 2 * w - 1 for the square w of a ratio in [0, 1].
_ARC = fit(lambda v: math.atan(math.sqrt((v + 1) / 2)) / math.sqrt((v + 1) / 2), -1.0, 1.0, 10)


def sin(x: SoftFloat) -> SoftFloat:
    """The sine of radians."""
    quadrant, sine, cosine = _reduced(x)
    return _turned(quadrant, sine, cosine)


def cos(x: SoftFloat) -> SoftFloat:
    """The cosine of radians."""
    quadrant, sine, cosine = _reduced(x)
    return _turned(i32.add(quadrant, 1), sine, cosine)


def tan(x: SoftFloat) -> SoftFloat:
    """The tangent of radians."""
    quadrant, sine, cosine = _reduced(x)
    return div(_turned(quadrant, sine, cosine), _turned(i32.add(quadrant, 1), sine, cosine))


def _turned(quadrant: Any, sine: SoftFloat, cosine: SoftFloat) -> SoftFloat:
    """The sine of an angle turned by so many quarter turns."""
    odd = i32.eq(i32.bit_and(quadrant, 1), 1)
    size = select(odd, cosine, sine)
    half_turn = i32.right(i32.left(quadrant, 30), 31)
    return SoftFloat(i32.with_sign(size.mantissa, half_turn), size.exponent)


def _reduced(x: SoftFloat) -> tuple[Any, SoftFloat, SoftFloat]:
    """`(quadrant, sin(r), cos(r))` with x = quadrant * pi/2 + r and |r| <= pi/4; `quadrant` counts modulo 4."""
    turns = _quarter_turns(x)
    quadrant = i32.right(i32.add(turns, 1 << 29), 30)
    rest = i32.sub(turns, i32.left(quadrant, 30))
    square = squared(rest)
    near = i32.lt(x.exponent, -30)
    angle = select(near, x, mul(normalize(rest, -30, bits=31), constant(math.pi / 2)))
    return quadrant, mul(angle, _SINE(square)), _COSINE(square)


def _quarter_turns(x: SoftFloat) -> Any:
    """x * 2/pi modulo 4, in units of 2**-30."""
    first, second = _WORDS
    # Below 1 the product is small enough to be shifted into place.
    product = i32.mulhi(i32.left(x.mantissa, 1), int(np.rint(2 / math.pi * 2.0**31)))
    small = i32.right_rounded(product, i32.clip(i32.sub(-30, x.exponent), 0, 31))
    # Else 64 bits of 2/pi * 2**(exponent + 30): of the higher word's product only the lower half counts, modulo 4.
    shift = i32.clip(i32.sub(2, x.exponent), 3, 31)
    high = i32.right_logical(first, shift)
    low = i32.bit_or(i32.left(first, i32.sub(32, shift)), i32.right_logical(second, shift))
    large = i32.add(i32.mul(x.mantissa, high), i32.mulhi(i32.left(x.mantissa, 1), i32.right_logical(low, 1)))
    turns = i32.select(i32.lt(x.exponent, -29), small, large)
    return i32.select(i32.gt(x.exponent, -1), 0, turns)


def atan(x: SoftFloat) -> SoftFloat:
    return atan2(x, ONE)


def atan2(y: SoftFloat, x: SoftFloat) -> SoftFloat:
    """The angle of the point (x, y), in [-pi, pi]; 0 for the origin, and a ratio of infinities counts as 0."""
    rise, run = abs_(y), abs_(x)
    steep = compare("gt", rise, run)
    ratio = div(select(steep, run, rise), select(steep, rise, run))
    angle = mul(ratio, _ARC(centred(squared(fixed(ratio)))))
    angle = select(steep, sub(constant(math.pi / 2), angle), angle)
    angle = select(compare("lt", x, ZERO), sub(constant(math.pi), angle), angle)
    return signed_as(y, angle)


def asin(x: SoftFloat) -> SoftFloat:
    """±pi/2 beyond ±1."""
    return atan2(x, _other_leg(x))


def acos(x: SoftFloat) -> SoftFloat:
    """0 or pi beyond ±1."""
    return atan2(_other_leg(x), x)


def _other_leg(x: SoftFloat) -> SoftFloat:
    """sqrt(1 - x**2) without cancellation; 0 beyond ±1."""
    return sqrt(mul(sub(ONE, x), add(ONE, x)))
