"""Polynomials in fixed point, fitted in float64 when the module is imported and evaluated in int32."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from qcompiler.numerics import int32 as i32
from qcompiler.numerics.soft_float import SoftFloat, normalize

#: The largest argument, just below 1.
ONE_BELOW = (1 << 30) - 1


@dataclasses.dataclass(frozen=True)
class Polynomial:
    """A polynomial of a number in [-1, 1].

    Attributes:
      coefficients: in units of 2**-bits, the constant one first.
      bits: such that no intermediate result leaves int32.
    """

    coefficients: tuple[int, ...]
    bits: int

    def __call__(self, v: Any) -> SoftFloat:
        """The value at `v`, int32 in units of 2**-30, of magnitude below 2**30."""
        v = i32.left(v, 1)
        total: Any = self.coefficients[-1]
        for coefficient in self.coefficients[-2::-1]:
            total = i32.add(i32.left(i32.mulhi(total, v), 1), coefficient)
        return normalize(total, -self.bits, bits=31)


def fit(fun: Callable[[float], float], low: float, high: float, degree: int) -> Polynomial:
    """Fits `fun`, which must not vanish, on [low, high] within [-1, 1] for a small relative error."""
    nodes = (low + high) / 2 + (high - low) / 2 * np.cos(np.pi * (np.arange(128) + 0.5) / 128)
    values = np.array([fun(float(node)) for node in nodes])
    # Least squares over Chebyshev nodes, weighted as Chebyshev polynomials are orthogonal, is close to minimax.
    c = np.polynomial.Chebyshev.fit(nodes, values, degree, domain=[low, high], w=1 / np.abs(values))
    c = c.convert(kind=np.polynomial.Polynomial, domain=[-1, 1], window=[-1, 1]).coef
    bits = 29 - math.ceil(math.log2(np.sum(np.abs(c))))
    steps = np.rint(c * 2.0**bits)
    # The half that each product loses on average, doubled, is given back by the coefficient it is added to.
    steps[:-1] += 1
    return Polynomial(tuple(int(v) for v in steps), bits)


def fixed(x: SoftFloat) -> jax.Array:
    """`x` in units of 2**-30, rounded; saturates just below 1."""
    inside = i32.right_rounded(x.mantissa, i32.clip(i32.sub(-30, x.exponent), 0, 31))
    return i32.select(i32.gt(x.exponent, -30), i32.with_sign(ONE_BELOW, i32.right(x.mantissa, 31)), inside)


def squared(v: Any) -> jax.Array:
    """v * v in units of 2**-30, as `v` is."""
    v = i32.left(v, 1)
    return i32.mulhi(v, v)


def whole(x: Any) -> SoftFloat:
    """An int32 below 2**30 in magnitude as a number."""
    return normalize(x, 0, bits=31)


def centred(v: Any) -> jax.Array:
    """2 * v - 1 for v in [0, 1), both in units of 2**-30."""
    return i32.sub(i32.left(v, 1), 1 << 30)
