"""Floating point in int32: what integer programs compute with where a value has no fixed scale.

A number is `mantissa * 2**exponent`, both int32, with 2**29 <= |mantissa| < 2**30: 30 significant bits against the 24
of float32, and exponents far beyond its range. Products are the high halves of 64-bit products (`lax.mulhi`), so that
neither a float nor a 64-bit type appears. Exact: `neg`, `abs_`, comparisons, `floor`, `rem`. `add` and `sub` err by at
most 2**-29 of the larger operand, `mul` by 2**-28 of the result, `div` and `sqrt` by 2**-29, `rsqrt` by 2**-27.

Special values, the same for every function here and in `soft_functions`:

- 0 is mantissa 0 and exponent `ZERO_EXPONENT`, below every other, so that a maximum of exponents ignores it. It has no
  sign. Results below 2**-EXPONENT_LIMIT become 0.
- Infinity is mantissa ±2**29 and exponent `INFINITY_EXPONENT`. Results beyond 2**EXPONENT_LIMIT become infinite.
- There is no NaN. What would be one is 0: 0/0, inf - inf, inf/inf, 0 * inf, the square root or logarithm of a negative
  number, the remainder by 0. x/0 is infinite with the sign of x, log(0) = -inf, rsqrt(0) = inf.

Operands have equal rank and broadcast where a dimension is 1; numbers of rank 0 broadcast against anything.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import lax

from qcompiler.numerics import int32 as i32

#: Bits of a mantissa.
PRECISION = 30
HALF = 1 << (PRECISION - 1)
#: Finite numbers other than 0 have exponents of at most this magnitude.
EXPONENT_LIMIT = 1 << 17
INFINITY_EXPONENT = 1 << 19
ZERO_EXPONENT = -(1 << 20)

INT32_MIN, INT32_MAX = -(1 << 31), (1 << 31) - 1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class SoftFloat:
    """mantissa * 2**exponent, normalized; a pytree of two arrays.

    Attributes:
      mantissa: int32 array, 0 or of magnitude in [2**29, 2**30).
      exponent: int32 array, of the mantissa's shape or broadcastable to it.
    """

    mantissa: Any
    exponent: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return np.shape(self.mantissa)

    def map(self, fun: Callable[[Any], Any]) -> SoftFloat:
        """Applies a function that only moves elements (a reshape, a slice, a gather) to both arrays."""
        return SoftFloat(fun(self.mantissa), fun(i32.broadcast_to(self.exponent, self.shape)))

    def broadcast_to(self, shape: tuple[int, ...]) -> SoftFloat:
        """Equal rank, or rank 0, to the shape given."""
        return SoftFloat(i32.broadcast_to(self.mantissa, shape), i32.broadcast_to(self.exponent, shape))


# Making numbers.


def normalize(mantissa: Any, exponent: Any, *, bits: int = 32) -> SoftFloat:
    """The number mantissa * 2**exponent, cut to 30 bits towards 0.

    Args:
      mantissa: int32, any value.
      exponent: int32, broadcastable to `mantissa`, of magnitude at most 2**21.
      bits: a bound known now, |mantissa| < 2**(bits - 1) (and -2**31 for 32): smaller ones cost less.
    """
    if bits == 32:
        lowest = i32.eq(mantissa, INT32_MIN)
        mantissa = i32.select(lowest, -HALF, mantissa)
        exponent = i32.add(exponent, i32.left(i32.as_integer(lowest), 1))
    zeros = i32.leading_zeros(i32.magnitude(mantissa))
    if bits <= 31:
        shift = i32.sub(zeros, 2)
        return saturated(i32.left(mantissa, shift), i32.sub(exponent, shift), zero=True)
    # To 31 bits, of which the last is cut: so no element needs a shift to the right of its own.
    shift = i32.sub(zeros, 1)
    aligned = i32.left(mantissa, shift)
    aligned = i32.right(i32.sub(aligned, i32.right(aligned, 31)), 1)
    return saturated(aligned, i32.sub(exponent, i32.sub(shift, 1)), zero=True)


def saturated(mantissa: Any, exponent: Any, *, zero: bool = False) -> SoftFloat:
    """Saturates to 0 and to infinity. `zero`: a mantissa may be 0 without an exponent that says so."""
    over, under = i32.gt(exponent, EXPONENT_LIMIT), i32.lt(exponent, -EXPONENT_LIMIT)
    infinity = i32.left(i32.bit_or(i32.right(mantissa, 31), 1), PRECISION - 1)
    if zero:
        under = i32.bit_or(under, i32.eq(mantissa, 0))
    mantissa = i32.select(under, 0, i32.select(over, infinity, mantissa))
    return SoftFloat(mantissa, i32.select(under, ZERO_EXPONENT, i32.select(over, INFINITY_EXPONENT, exponent)))


def constant(
    value: Any, hold: Callable[[str, np.ndarray], Any] = lambda name, value: value, name: str = "constant"
) -> SoftFloat:
    """Numbers known now, rounded to 30 bits to nearest.

    Args:
      value: float64 number or array; may be infinite.
      hold: `(name, array) -> array`, called for arrays so that a program can hold them as weights; numbers stay.
      name: prefix of the names given to `hold`.

    Raises:
      ValueError: an element is NaN.
    """
    value = np.asarray(value, np.float64)
    if np.any(np.isnan(value)):
        raise ValueError("a NaN has no soft float: replace it before it becomes a constant")
    finite = np.isfinite(value)
    fraction, exponent = np.frexp(np.where(finite, value, 0))
    mantissa = np.rint(np.ldexp(fraction, PRECISION)).astype(np.int64)
    carry = np.abs(mantissa) == 1 << PRECISION
    mantissa, exponent = np.where(carry, mantissa // 2, mantissa), exponent - PRECISION + carry
    mantissa = np.where(finite, mantissa, np.where(value > 0, HALF, -HALF)).astype(np.int32)
    exponent = np.where(finite, np.where(mantissa == 0, ZERO_EXPONENT, exponent), INFINITY_EXPONENT).astype(np.int32)
    if value.ndim == 0:
        return SoftFloat(np.int32(mantissa), np.int32(exponent))
    return SoftFloat(hold(f"{name}_mantissa", mantissa), hold(f"{name}_exponent", exponent))


def from_int(x: Any, scale: Any = 1.0, hold: Callable[[str, np.ndarray], Any] = lambda name, value: value) -> SoftFloat:
    """x * scale; a scale that is a power of two, or one per channel, costs no multiplication.

    Args:
      x: int8, uint8, int16, uint16 or int32 array, any values; the narrow ones cost less.
      scale: float64 known now, a number or broadcastable to `x`.
      hold: see `constant`.
    """
    narrow = np.dtype(x.dtype).itemsize < 4
    x = lax.convert_element_type(x, np.int32)
    factor = constant(scale)
    bits = 31 if narrow else 32
    if np.all(np.abs(factor.mantissa) == HALF) and np.all(factor.mantissa > 0):
        exponent = factor.exponent + np.int32(PRECISION - 1)
        return normalize(x, exponent if exponent.ndim == 0 else hold("scale_exponent", exponent), bits=bits)
    return mul(normalize(x, 0, bits=bits), constant(scale, hold, "scale"))


# Arithmetic.


def neg(x: SoftFloat) -> SoftFloat:
    return SoftFloat(lax.neg_p.bind(x.mantissa), x.exponent)


def abs_(x: SoftFloat) -> SoftFloat:
    return SoftFloat(i32.magnitude(x.mantissa), x.exponent)


def signed_as(x: SoftFloat, size: SoftFloat) -> SoftFloat:
    """`size` >= 0 with the sign of x, that of 0 being positive."""
    return SoftFloat(i32.with_sign(size.mantissa, i32.right(x.mantissa, 31)), size.exponent)


def sign(x: SoftFloat) -> SoftFloat:
    """-1, 0 or 1."""
    positive = i32.bit_or(i32.right(x.mantissa, 31), 1)
    zero = i32.eq(x.mantissa, 0)
    return SoftFloat(
        i32.select(zero, 0, i32.left(positive, PRECISION - 1)), i32.select(zero, ZERO_EXPONENT, 1 - PRECISION)
    )


def scale_by_power_of_two(x: SoftFloat, power: Any) -> SoftFloat:
    """x * 2**power for an int32 `power` of magnitude at most 2**18."""
    moved = saturated(x.mantissa, i32.add(x.exponent, power))
    return select(is_infinite(x), x, moved)


def is_infinite(x: SoftFloat) -> jax.Array:
    return i32.eq(x.exponent, INFINITY_EXPONENT)


def mul(a: SoftFloat, b: SoftFloat) -> SoftFloat:
    product = i32.mulhi(i32.left(a.mantissa, 1), i32.left(b.mantissa, 1))
    # 29 or 30 bits: -1 where one is missing, else 0.
    short = i32.right(i32.sub(i32.magnitude(product), HALF), 31)
    exponent = i32.add(i32.add(i32.add(a.exponent, b.exponent), PRECISION), short)
    return saturated(i32.left(product, lax.neg_p.bind(short)), exponent)


def square(x: SoftFloat) -> SoftFloat:
    return mul(x, x)


def add(a: SoftFloat, b: SoftFloat) -> SoftFloat:
    """a + b; exact where the signs differ and the exponents by at most 1."""
    top = i32.maximum(a.exponent, b.exponent)
    # Operands of different sign leave room for a bit below the last one: 0 for them, else 1.
    coarse = i32.add(i32.right(i32.bit_xor(a.mantissa, b.mantissa), 31), 1)
    total = i32.add(_aligned(a, top, coarse), _aligned(b, top, coarse))
    # At most 31 bits, and where it is 31, half of it stays below 2**30.
    shift = i32.sub(i32.leading_zeros(i32.magnitude(total)), 1)
    return saturated(i32.right(i32.left(total, shift), 1), i32.sub(i32.add(top, coarse), shift), zero=True)


def sub(a: SoftFloat, b: SoftFloat) -> SoftFloat:
    return add(a, neg(b))


def _aligned(x: SoftFloat, top: Any, coarse: Any) -> jax.Array:
    """The mantissa in units of 2**(top - 1 + coarse) for top >= exponent; rounded where `coarse` is 1, else cut."""
    doubled = i32.right(i32.left(x.mantissa, 1), i32.minimum(i32.sub(top, x.exponent), 31))
    return i32.right(i32.add(doubled, coarse), coarse)


def div(a: SoftFloat, b: SoftFloat) -> SoftFloat:
    """a / b; exact where the quotient has at most 29 bits.

    Two digits of 15 bits, each the remainder times an approximate reciprocal of the divisor. Remainders are small, so
    that the low halves of the products say them exactly.
    """
    divisor = i32.maximum(i32.magnitude(b.mantissa), HALF)
    inverse = _inverse(divisor)
    dividend = i32.with_sign(a.mantissa, i32.right(b.mantissa, 31))
    # dividend / divisor in units of 2**-15: (dividend * 2) * (inverse * 2) / 2**32 has 29 fractional bits.
    high = i32.right_rounded(i32.mulhi(i32.left(dividend, 1), i32.left(inverse, 1)), 14)
    rest = i32.sub(i32.left(dividend, 15), i32.mul(high, divisor))
    low = i32.right_rounded(i32.mulhi(i32.left(rest, 1), inverse), 13)
    quotient = i32.add(i32.left(high, 15), low)
    wide = i32.ge(i32.magnitude(quotient), 1 << PRECISION)
    mantissa = i32.select(wide, i32.right(i32.add(quotient, 1), 1), quotient)
    # Exponents of special divisors outweigh those of any dividend: x / 0 = inf, 0 / 0 = inf / inf = 0.
    special = i32.select(is_infinite(b), 2 * INFINITY_EXPONENT, i32.maximum(b.exponent, -INFINITY_EXPONENT))
    exponent = i32.add(i32.sub(i32.sub(a.exponent, special), PRECISION), i32.as_integer(wide))
    return saturated(mantissa, exponent)


def reciprocal(x: SoftFloat) -> SoftFloat:
    return div(SoftFloat(np.int32(HALF), np.int32(1 - PRECISION)), x)


def _inverse(divisor: Any) -> jax.Array:
    """2**59 / divisor, below 2**30, for a divisor in [2**29, 2**30); relative error below 2**-25.

    The quadratic that is best on [1/2, 1] errs by 1/99, and a Newton step y += y * (1 - d * y) squares the error.
    """
    d = i32.left(divisor, 1)
    y = i32.add(i32.left(i32.mulhi(d, _INVERSE_START[2]), 1), _INVERSE_START[1])
    y = i32.left(i32.add(i32.left(i32.mulhi(d, y), 1), _INVERSE_START[0]), 1)
    for _ in range(2):
        residual = i32.sub(1 << 28, i32.mulhi(d, y))
        y = i32.add(y, i32.mulhi(y, i32.left(residual, 4)))
    return i32.minimum(y, (1 << PRECISION) - 1)


def rsqrt(x: SoftFloat) -> SoftFloat:
    """1 / sqrt(x); 0 for x < 0."""
    root, half = _inverse_root(x)
    exponent = i32.sub(1 - PRECISION, half)
    valid = i32.bit_not(i32.lt(x.mantissa, 0))
    exponent = i32.select(i32.eq(x.mantissa, 0), INFINITY_EXPONENT, exponent)
    exponent = i32.select(is_infinite(x), ZERO_EXPONENT, exponent)
    return saturated(i32.select(valid, root, 0), i32.select(valid, exponent, ZERO_EXPONENT))


def sqrt(x: SoftFloat) -> SoftFloat:
    """The square root, exact where it has at most 30 bits; 0 for x < 0.

    The root in 15 bits, and the remainder, which is then exact, times half of the inverse root.
    """
    inverse, half = _inverse_root(x)
    radicand = _radicand(x)
    # radicand is in units of 2**-31, inverse of 2**-29.
    high = i32.right_rounded(i32.mulhi(radicand, inverse), 13)
    rest = i32.sub(radicand, i32.left(i32.mul(high, high), 1))
    # rest has 18 bits in units of 2**-31; half of its product with `inverse`, in units of 2**-30.
    low = i32.right_rounded(i32.mulhi(i32.left(rest, 12), inverse), 11)
    root = i32.minimum(i32.add(i32.left(high, 15), low), (1 << PRECISION) - 1)
    zero = i32.lt(x.mantissa, 1)
    exponent = i32.select(is_infinite(x), INFINITY_EXPONENT, i32.sub(half, PRECISION))
    return saturated(i32.select(zero, 0, root), i32.select(zero, ZERO_EXPONENT, exponent))


def _radicand(x: SoftFloat) -> jax.Array:
    """The mantissa as a fraction in [1/4, 1) of 2**31, such that what remains of the exponent is even."""
    return i32.left(i32.maximum(x.mantissa, HALF), i32.sub(1, i32.bit_and(x.exponent, 1)))


def _inverse_root(x: SoftFloat) -> tuple[jax.Array, jax.Array]:
    """`(y, k)` with 1/sqrt(x) = y * 2**(-29 - k) and y in [2**29, 2**30), for x > 0."""
    radicand = _radicand(x)
    y: Any = _ROOT_START[-1]
    for coefficient in _ROOT_START[-2::-1]:
        y = i32.add(i32.left(i32.mulhi(radicand, y), 1), coefficient)
    y = i32.left(y, 3)
    for _ in range(2):
        y = i32.minimum(y, (1 << PRECISION) - 1)
        doubled = i32.left(y, 1)
        squared = i32.mulhi(doubled, doubled)
        # y += y * (1 - x * y**2) / 2; the residual has 28 fractional bits, its error of two floors is centred.
        residual = i32.sub(1 << 28, i32.mulhi(i32.left(squared, 1), radicand))
        y = i32.add(y, i32.mulhi(y, i32.sub(i32.left(residual, 3), 4)))
    # An odd exponent has given one bit of the radicand away.
    half = i32.right(i32.add(i32.add(x.exponent, PRECISION), 1), 1)
    return i32.clip(y, HALF, (1 << PRECISION) - 1), half


def _inverse_start() -> list[int]:
    """1/d on [1/2, 1] as a quadratic of least relative error, its coefficients in units of 2**-28."""
    # 1 - d * p(d) is the Chebyshev polynomial T3 on [1/2, 1], scaled to 1 at d = 0.
    error = np.polynomial.Chebyshev.basis(3, domain=[0.5, 1.0]).convert(kind=np.polynomial.Polynomial).coef
    return [int(np.rint(value * 2.0**28)) for value in -(error / error[0])[1:]]


def _root_start() -> list[int]:
    """1/sqrt(x) on [1/4, 1] as a polynomial, relative error below 1/250, its coefficients in units of 2**-26."""
    nodes = 0.625 + 0.375 * np.cos(np.pi * (np.arange(64) + 0.5) / 64)
    c = np.polynomial.Polynomial.fit(nodes, nodes**-0.5, 4, w=nodes**0.5).convert().coef
    return [int(np.rint(value * 2.0**26)) for value in c]


_INVERSE_START = _inverse_start()
_ROOT_START = _root_start()


# Order.


def order_key(x: SoftFloat) -> jax.Array:
    """int32 that orders numbers of different sign or exponent; where equal, mantissas decide."""
    return i32.with_sign(i32.sub(x.exponent, ZERO_EXPONENT), i32.right(x.mantissa, 31))


def compare(name: str, a: SoftFloat, b: SoftFloat) -> jax.Array:
    """`a name b`, a bool array; `name` is lt, le, gt, ge, eq or ne.

    Raises:
      ValueError: another name.
    """
    if name not in ("lt", "le", "gt", "ge", "eq", "ne"):
        raise ValueError(f"unknown comparison {name!r}: lt, le, gt, ge, eq or ne")
    if name in ("gt", "le"):
        a, b = b, a
    if name in ("eq", "ne"):
        equal = i32.bit_and(i32.eq(a.exponent, b.exponent), i32.eq(a.mantissa, b.mantissa))
        return equal if name == "eq" else i32.bit_not(equal)
    key_a, key_b = order_key(a), order_key(b)
    tied = i32.bit_and(i32.eq(key_a, key_b), i32.lt(a.mantissa, b.mantissa))
    less = i32.bit_or(i32.lt(key_a, key_b), tied)
    return less if name in ("lt", "gt") else i32.bit_not(less)


def select(pred: Any, on_true: SoftFloat, on_false: SoftFloat) -> SoftFloat:
    """`on_true` where `pred`, else `on_false`; all three broadcast."""
    return SoftFloat(
        i32.select(pred, on_true.mantissa, on_false.mantissa), i32.select(pred, on_true.exponent, on_false.exponent)
    )


def maximum(a: SoftFloat, b: SoftFloat) -> SoftFloat:
    return select(compare("lt", a, b), b, a)


def minimum(a: SoftFloat, b: SoftFloat) -> SoftFloat:
    return select(compare("lt", b, a), b, a)
