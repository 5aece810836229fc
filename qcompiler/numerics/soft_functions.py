"""Transcendental functions of soft floats: int32 polynomials, their coefficients fitted here in float64.

A polynomial is evaluated in fixed point, each step a high half of a 64-bit product. Where a function is 0 at 0, the
polynomial is of f(x) / x and the product with x is a soft one, so that results near 0 keep their relative accuracy.
Special values are as in `soft_float`: what would be NaN is 0, arguments outside of a domain included.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from qcompiler.numerics import int32 as i32
from qcompiler.numerics.soft_float import (
    SoftFloat,
    _bounded,
)


def exp(x: SoftFloat) -> SoftFloat:
    """e**x. Relative error 2**-28, and as much as |x| * 2**-28 from rounding the argument."""
    return _exp2_of_product(x, math.log2(math.e))


def exp2(x: SoftFloat) -> SoftFloat:
    """2**x; exact for whole numbers."""
    return _exp2_of_product(x, 1.0)


def _exp2_of_product(x: SoftFloat, factor: float) -> SoftFloat:
    """2**(x * factor) for a factor in [1, 2): whole part to the exponent, fraction to a polynomial."""
    product = i32.mulhi(i32.left(x.mantissa, 1), np.int32(round(factor * 2.0**30)))
    bits = i32.sub(-1, x.exponent)
    kept = i32.clip(bits, 8, 30)
    product = i32.right(product, i32.minimum(i32.sub(i32.maximum(bits, 30), 30), 31))
    whole = i32.right(product, kept)
    fraction = i32.right_logical(i32.left(product, i32.sub(32, kept)), 1)
    # Each product with a fraction of 31 bits takes one bit off the coefficient's.
    total: Any = _EXP2[-1]
    for coefficient in reversed(_EXP2[:-1]):
        total = i32.add(i32.mulhi(total, fraction), coefficient)
    return _bounded(total, i32.sub(whole, 29))


def _exp2_coefficients() -> list[int]:
    """2**f on [0, 1), exact at 0; coefficient k in units of 2**-(29 + k)."""
    nodes = 0.5 + 0.5 * np.cos(np.pi * (np.arange(64) + 0.5) / 64)
    rest = np.polynomial.Polynomial.fit(nodes, np.expm1(nodes * math.log(2)) / nodes, 5, w=nodes).convert().coef
    return [round(c * 2.0 ** (29 + k)) for k, c in enumerate([1.0, *rest])]


_EXP2 = _exp2_coefficients()
