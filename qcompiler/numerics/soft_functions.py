"""Exponentials, logarithms, powers and what is made of them, on soft floats.

Where a function is 0 at 0, a polynomial gives f(x) / x and the product with x is a soft one, so that results near 0
keep their relative accuracy. Relative errors are below 2**-24 where the docstring says nothing else. Special values are
as in `soft_float`: what would be NaN is 0, arguments outside of a domain included.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from qcompiler.numerics import int32 as i32
from qcompiler.numerics.soft_float import (
    INFINITY_EXPONENT,
    SoftFloat,
    abs_,
    add,
    compare,
    constant,
    div,
    is_infinite,
    maximum,
    minimum,
    mul,
    neg,
    normalize,
    reciprocal,
    saturated,
    scale_by_power_of_two,
    select,
    signed_as,
    sqrt,
    square,
    sub,
)
from qcompiler.numerics.soft_polynomial import centred, fit, fixed, squared, whole
from qcompiler.numerics.soft_rounding import floor

ZERO, ONE, TWO = constant(0.0), constant(1.0), constant(2.0)
INFINITY = constant(math.inf)


def exp(x: SoftFloat) -> SoftFloat:
    """e**x. Relative error 2**-27, and as much as |x| * 2**-28 from rounding the argument."""
    return _exp2_of_product(x, math.log2(math.e))


def exp2(x: SoftFloat) -> SoftFloat:
    """2**x, exact for whole numbers; the error is as that of `exp`."""
    return _exp2_of_product(x, 1.0)


def _exp2_of_product(x: SoftFloat, factor: float) -> SoftFloat:
    """2**(x * factor) for a factor in [1, 2): the whole part becomes the exponent, the fraction a polynomial."""
    product = i32.mulhi(i32.left(x.mantissa, 1), int(np.rint(factor * 2.0**30)))
    # In units of 2**-bits. Beyond 2**20 the result is 0 or infinite, whatever is kept; below, 30 bits are.
    bits = i32.sub(-1, x.exponent)
    kept = i32.clip(bits, 8, 30)
    product = i32.right(product, i32.clip(i32.sub(bits, 30), 0, 31))
    power = i32.right(product, kept)
    fraction = i32.right_logical(i32.left(product, i32.sub(32, kept)), 1)
    return saturated(_exp2_of_fraction(fraction), i32.sub(power, 29))


#: Fractional bits of the argument of `exp2_of_fixed`.
FIXED_BITS = 23


def exp2_of_fixed(x: Any) -> SoftFloat:
    """2**(x * 2**-23) of any int32: for arguments whose size is known, at half of the cost of `exp2`."""
    power, fraction = _power_and_fraction(x)
    return SoftFloat(_exp2_of_fraction(fraction), i32.sub(power, 29))


def exp2_to_fixed(x: Any, bits: int) -> Any:
    """2**(x * 2**-23) of int32 x <= 0, as int32 in units of 2**-bits, 0 < bits <= 29, rounded half up."""
    power, fraction = _power_and_fraction(x)
    return i32.right_rounded(_exp2_of_fraction(fraction), i32.minimum(i32.sub(29 - bits, power), 31))


def _power_and_fraction(x: Any) -> tuple[Any, Any]:
    return i32.right(x, FIXED_BITS), i32.left(i32.bit_and(x, (1 << FIXED_BITS) - 1), 31 - FIXED_BITS)


def _exp2_of_fraction(fraction: Any) -> Any:
    """2**f in units of 2**-29, for f in units of 2**-31."""
    # Each product with a fraction of 31 bits takes one bit off the coefficient's.
    total: Any = _EXP2[-1]
    for coefficient in _EXP2[-2::-1]:
        total = i32.add(i32.mulhi(total, fraction), coefficient)
    return total


def _exp2_coefficients() -> list[int]:
    """2**f on [0, 1], exact at 0; coefficient k in units of 2**-(29 + k)."""
    nodes = 0.5 + 0.5 * np.cos(np.pi * (np.arange(64) + 0.5) / 64)
    rest = np.polynomial.Polynomial.fit(nodes, np.expm1(nodes * math.log(2)) / nodes, 5, w=nodes).convert().coef
    return [int(np.rint(c * 2.0 ** (29 + k))) for k, c in enumerate([1.0, *rest])]


_EXP2 = _exp2_coefficients()
_EXPM1 = fit(lambda v: math.expm1(v) / v, -0.5, 0.5, 8)


def expm1(x: SoftFloat) -> SoftFloat:
    """e**x - 1, accurate near 0."""
    near = mul(x, _EXPM1(fixed(x)))
    return select(i32.lt(x.exponent, -30), near, sub(exp(x), ONE))


_LOG1P = fit(lambda v: math.log1p(v) / v, math.sqrt(0.5) - 1, math.sqrt(2) - 1, 12)


def _binary_logarithm(x: SoftFloat) -> tuple[SoftFloat, SoftFloat]:
    """`(k, l)` with x = 2**k * e**l for finite x > 0: k whole, |l| at most log(2) / 2."""
    low = i32.as_integer(i32.lt(x.mantissa, math.isqrt(1 << 59)))
    rest = i32.sub(i32.left(x.mantissa, low), 1 << 30)
    power = i32.sub(i32.add(x.exponent, 30), low)
    return whole(power), mul(normalize(rest, -30, bits=31), _LOG1P(rest))


def _logarithm_ends(x: SoftFloat, inside: SoftFloat) -> SoftFloat:
    end = select(is_infinite(x), INFINITY, inside)
    end = select(i32.lt(x.mantissa, 0), ZERO, end)
    return select(i32.eq(x.mantissa, 0), neg(INFINITY), end)


def log(x: SoftFloat) -> SoftFloat:
    """The natural logarithm, accurate near 1; log(0) = -inf, 0 for x < 0."""
    power, rest = _binary_logarithm(x)
    return _logarithm_ends(x, add(mul(power, constant(math.log(2))), rest))


def log2(x: SoftFloat) -> SoftFloat:
    """The logarithm to base 2, exact for powers of two; ends as for `log`."""
    power, rest = _binary_logarithm(x)
    return _logarithm_ends(x, add(power, mul(rest, constant(math.log2(math.e)))))


def log1p(x: SoftFloat) -> SoftFloat:
    """log(1 + x), accurate near 0."""
    near = mul(x, _LOG1P(fixed(x)))
    return select(i32.lt(x.exponent, -31), near, log(add(x, ONE)))


def logaddexp(a: SoftFloat, b: SoftFloat) -> SoftFloat:
    """log(e**a + e**b)."""
    distance = sub(maximum(a, b), minimum(a, b))
    return add(maximum(a, b), log1p(exp(neg(distance))))


def logistic(x: SoftFloat) -> SoftFloat:
    """1 / (1 + e**-x)."""
    return reciprocal(add(exp(neg(x)), ONE))


def tanh(x: SoftFloat) -> SoftFloat:
    """Accurate near 0."""
    # Beyond 32 the result is 1; the bound keeps infinity over infinity away.
    power = expm1(scale_by_power_of_two(minimum(abs_(x), constant(32.0)), 1))
    return signed_as(x, div(power, add(power, TWO)))


def sinh(x: SoftFloat) -> SoftFloat:
    """Accurate near 0."""
    power = expm1(abs_(x))
    return signed_as(x, scale_by_power_of_two(add(power, div(power, add(power, ONE))), -1))


def cosh(x: SoftFloat) -> SoftFloat:
    power = exp(abs_(x))
    return scale_by_power_of_two(add(power, reciprocal(power)), -1)


def asinh(x: SoftFloat) -> SoftFloat:
    """Accurate near 0."""
    size = abs_(x)
    area = square(size)
    return signed_as(x, log1p(add(size, div(area, add(sqrt(add(area, ONE)), ONE)))))


def acosh(x: SoftFloat) -> SoftFloat:
    """0 for x < 1."""
    above = maximum(sub(x, ONE), ZERO)
    return log1p(add(above, sqrt(add(scale_by_power_of_two(above, 1), square(above)))))


def atanh(x: SoftFloat) -> SoftFloat:
    """Accurate near 0; infinite at ±1, 0 beyond."""
    size = abs_(x)
    ratio = div(scale_by_power_of_two(size, 1), sub(ONE, size))
    ratio = select(compare("gt", size, ONE), ZERO, ratio)
    return signed_as(x, scale_by_power_of_two(log1p(ratio), -1))


_CBRT = fit(lambda v: math.cbrt(0.75 + v / 4), -1.0, 1.0, 9)


def cbrt(x: SoftFloat) -> SoftFloat:
    """The cube root, odd."""
    size = i32.magnitude(x.mantissa)
    # The exponent of the fraction in [1/2, 1), made positive, is 3 * third + rest; the product is exact enough for it.
    shifted = i32.add(x.exponent, 30 + 3 * INFINITY_EXPONENT)
    third = i32.mulhi(shifted, -(-(1 << 32) // 3))
    rest = i32.sub(shifted, i32.mul(third, 3))
    root = _CBRT(i32.clip(i32.left(i32.sub(size, 3 << 28), 2), 1 - (1 << 30), (1 << 30) - 1))
    factor = select(i32.eq(rest, 1), constant(2 ** (1 / 3)), constant(2 ** (2 / 3)))
    root = mul(root, select(i32.eq(rest, 0), ONE, factor))
    root = scale_by_power_of_two(root, i32.sub(third, INFINITY_EXPONENT))
    special = i32.bit_or(is_infinite(x), i32.eq(size, 0))
    return select(special, x, signed_as(x, root))


def pow(x: SoftFloat, y: SoftFloat) -> SoftFloat:
    """x**y; x**0 = 1, and for x < 0 the power is that of |x| with a sign for whole y, 0 for others.

    Relative error about |y * log2(x)| * 2**-27.
    """
    power = exp2(mul(y, log2(abs_(x))))
    half = scale_by_power_of_two(y, -1)
    odd = compare("ne", floor(half), half)
    signed = select(odd, neg(power), power)
    signed = select(compare("eq", floor(y), y), signed, ZERO)
    return select(i32.lt(x.mantissa, 0), signed, power)


def integer_pow(x: SoftFloat, n: int) -> SoftFloat:
    """x**n for an n known now, by squaring."""
    result, factor, rest = None, x, abs(n)
    while rest:
        if rest & 1:
            result = factor if result is None else mul(result, factor)
        rest >>= 1
        factor = square(factor) if rest else factor
    if result is None:
        return ONE.broadcast_to(x.shape)
    return reciprocal(result) if n < 0 else result


# Of 2 * w - 1 for the square w of an argument in [0, 1].
_ERF = fit(lambda v: math.erf(math.sqrt((v + 1) / 2)) / math.sqrt((v + 1) / 2), -1.0, 1.0, 8)


def _scaled_erfc(x: float) -> float:
    """e**(x*x) * erfc(x)."""
    if x < 25:
        return math.exp(x * x) * math.erfc(x)
    return (1 - 1 / (2 * x * x) + 3 / (4 * x**4)) / (x * math.sqrt(math.pi))


def _erfc_factor(v: float) -> float:
    """e**(x*x) * erfc(x) / t for t = 1 / (2 + x) in (0, 1/2], v = 4 * t - 1."""
    t = (v + 1) / 4
    return _scaled_erfc(1 / t - 2) / t


_ERFC = fit(_erfc_factor, -1.0, 1.0, 14)


def erf(x: SoftFloat) -> SoftFloat:
    """The error function, accurate near 0."""
    near = mul(x, _ERF(centred(squared(fixed(x)))))
    return select(i32.lt(x.exponent, -29), near, signed_as(x, sub(ONE, _erfc_of(abs_(x)))))


def erfc(x: SoftFloat) -> SoftFloat:
    """1 - erf(x); small results have a relative error of 2**-20 at x = 9, growing with the square of x."""
    tail = _erfc_of(abs_(x))
    return select(i32.lt(x.mantissa, 0), sub(TWO, tail), tail)


def _erfc_of(x: SoftFloat) -> SoftFloat:
    """erfc for x >= 0."""
    t = reciprocal(add(x, TWO))
    # t in units of 2**-30 is at most 2**29; the difference is right though the shift may wrap.
    v = i32.minimum(i32.sub(i32.left(fixed(t), 2), 1 << 30), (1 << 30) - 1)
    return mul(exp(neg(square(x))), mul(t, _ERFC(v)))


def _erf_inv_reference(log_complement: float) -> float:
    """erf_inv(x) / x for the x > 0 with -log(1 - x * x) as given, by Newton's method on erfc."""
    x = math.sqrt(-math.expm1(-log_complement))
    complement = math.exp(-log_complement) / (1 + x)
    y = math.sqrt(log_complement)
    for _ in range(60):
        y += (math.erfc(y) - complement) * math.exp(y * y) * math.sqrt(math.pi) / 2
    return y / x


#: -log(1 - x * x) below this is the central polynomial's, which is of it; the outer one's is of its root.
_CENTRAL = 5.0
#: Where 1 - |x| is 2**-30, the root of -log(1 - x * x) is below this.
_OUTERMOST = 4.6
_ROOT = math.sqrt(_CENTRAL)
_ERF_INV_CENTRAL = fit(lambda v: _erf_inv_reference((v + 1) / 2 * _CENTRAL), -1.0, 1.0, 10)
_ERF_INV_OUTER = fit(lambda v: _erf_inv_reference((_ROOT + (v + 1) / 2 * (_OUTERMOST - _ROOT)) ** 2), -1.0, 1.0, 9)


def erf_inv(x: SoftFloat) -> SoftFloat:
    """The inverse of `erf`; infinite at ±1, 0 beyond. Relative error below 2**-22."""
    size = abs_(x)
    complement = mul(sub(ONE, size), add(ONE, size))
    w = neg(log(complement))
    central = _ERF_INV_CENTRAL(fixed(sub(mul(w, constant(2 / _CENTRAL)), ONE)))
    span = (_OUTERMOST - _ROOT) / 2
    outer = _ERF_INV_OUTER(fixed(sub(mul(sqrt(w), constant(1 / span)), constant(_ROOT / span + 1))))
    inside = mul(x, select(compare("lt", w, constant(_CENTRAL)), central, outer))
    end = signed_as(x, select(compare("eq", size, ONE), INFINITY, ZERO))
    return select(compare("lt", size, ONE), inside, end)
