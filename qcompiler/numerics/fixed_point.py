"""The one definition of rounding: entry to integers, exit from them, and rescaling between them.

- `quantize`:   q = clamp(rint(x * float32(1 / s)) + z), ties to even; NaN becomes the zero point.
- `dequantize`: x = (q - z) * s in float32.
- `rescale`:    floor(x * r + 1/2) for a real ratio r, as a 31-bit multiplier and shifts: integers only, ties up, exact
                for the rounded multiplier, and the same bits on every backend.

A rescale is `((x << left) * multiplier >> 32) + rounding >> right`: the high half of one 64-bit product is enough
because the shift that follows is at least one bit, so the low half can change no result (the sum of a whole number and
a fraction below one has the same floor).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import numpy as np
from jax import lax

from qcompiler.numerics import int32
from qcompiler.numerics.types import QuantType

#: Terms of a sum are rescaled to 2**-guard output steps and must stay below 2**TERM_BITS there.
TERM_BITS = 27
#: More fractional bits than this change no result.
MAX_GUARD_BITS = 14


def quantize(x: Any, scale: Any, zero_point: Any, qtype: QuantType) -> jax.Array:
    """Real to integer: the entry of the integer program.

    Args:
      x: float array of any shape.
      scale: float32, broadcastable to `x`.
      zero_point: int32, broadcastable to `x`.
      qtype: the type of the result.

    Returns:
      Codes of dtype `qtype.dtype`. Values outside of the range saturate; NaN becomes the zero point (real 0).
    """
    steps = lax.mul(_cast(x, np.float32), lax.div_p.bind(np.float32(1), scale))
    steps = lax.round_p.bind(steps, rounding_method=lax.RoundingMethod.TO_NEAREST_EVEN)
    # Clamped in float before the cast, whose result outside of int32 is not defined. max(NaN, c) is NaN, so that the
    # comparison comes first; 2**24 leaves room for the zero point.
    zero, bound = lax.full_like(steps, 0), np.float32(2.0**24)
    steps = lax.select(lax.ne(steps, steps), zero, steps)
    steps = lax.min_p.bind(lax.max_p.bind(steps, -bound), bound)
    return clamp_to(lax.add_p.bind(_cast(steps, np.int32), zero_point), qtype)


def quantize_number(x: Any, scale: Any, zero_point: Any, qtype: QuantType) -> np.ndarray:
    """`quantize` on the host, bit for bit the same, as int64; for clamp bounds."""
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        steps = np.rint(np.asarray(x, np.float32) * (np.float32(1) / np.asarray(scale, np.float32)))
    steps = np.where(np.isnan(steps), np.float32(0), steps)
    codes = np.clip(steps.astype(np.float64), -(2.0**24), 2.0**24).astype(np.int64) + zero_point
    return np.clip(codes, qtype.qmin, qtype.qmax)


def quantize_bias(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Real to int32 at the accumulator's scale, on the host in float64; may exceed int32, which the caller checks."""
    return np.rint(np.asarray(x, np.float64) / np.asarray(scale, np.float64))


def dequantize(q: Any, scale: Any, zero_point: Any) -> jax.Array:
    """Integer to real, float32: the exit of the integer program."""
    return lax.mul(_cast(lax.sub_p.bind(_cast(q, np.int32), zero_point), np.float32), scale)


def clamp_to(q: Any, qtype: QuantType, low: Any = None, high: Any = None) -> jax.Array:
    """Saturates int32 to the type's range, and to [low, high] where that is tighter, and narrows the dtype.

    `low` and `high` are int32 (numbers, or arrays that broadcast) and lie in the type's range.
    """
    low = np.int32(qtype.qmin) if low is None else low
    high = np.int32(qtype.qmax) if high is None else high
    return _cast(lax.min_p.bind(lax.max_p.bind(q, low), high), qtype.dtype)


@dataclasses.dataclass(frozen=True, eq=False)
class Multiplier:
    """A real ratio as integers: ratio = multiplier * 2**(left - right - 32).

    Attributes:
      multiplier: int32, magnitude in [2**30, 2**31), or 0; scalar or one per channel, broadcastable.
      left: int32 shift before the product, >= 0.
      right: int32 shift after it, >= 1.
      limit: int32; inputs are clamped to [-limit, limit] where the left shift could overflow, else None.
    """

    multiplier: np.ndarray
    left: np.ndarray
    right: np.ndarray
    limit: np.ndarray | None = None

    @property
    def ratio(self) -> np.ndarray:
        """The ratio that is really applied, float64."""
        return self.multiplier.astype(np.float64) * np.exp2(self.left - self.right.astype(np.float64) - 32.0)


def multiplier_for(ratio: Any, bound: Any, largest: float | None = None) -> Multiplier:
    """The `Multiplier` of a real ratio, for inputs of magnitude at most `bound`.

    Args:
      ratio: float64, scalar or array; any sign; magnitudes below 2**-33 become 0, which is what they round to.
      bound: largest magnitude of the inputs, broadcastable; decides whether they need a clamp before a left shift.
        Inputs beyond that clamp saturate: their results would be 2**27 or more.
      largest: results saturate there, if given: inputs are clamped at floor(largest / |ratio|), in float64.
    """
    ratio = np.asarray(ratio, np.float64)
    mantissa, exponent = np.frexp(np.abs(ratio))
    whole = np.rint(np.ldexp(mantissa, 31)).astype(np.int64)
    carry = whole == 1 << 31
    whole, exponent = np.where(carry, 1 << 30, whole), exponent + carry
    right = np.maximum(1, -exponent - 1)
    left = np.maximum(0, right + exponent + 1)
    vanishes = (right > 31) | (whole == 0)
    whole, right, left = (np.where(vanishes, z, v) for z, v in ((0, whole), (1, right), (0, left)))
    left = np.minimum(left, 30)
    limit = np.where(left > 0, np.int64(1) << (30 - left), np.int64((1 << 31) - 1))
    if largest is not None:
        with np.errstate(divide="ignore"):
            limit = np.minimum(limit, np.floor(largest / np.abs(ratio)).clip(0, 2.0**31 - 1).astype(np.int64))
    return Multiplier(
        multiplier=(np.sign(ratio).astype(np.int64) * whole).astype(np.int32),
        left=left.astype(np.int32),
        right=right.astype(np.int32),
        limit=limit.astype(np.int32) if np.any(np.asarray(bound, np.float64) > limit) else None,
    )


def rescale(x: Any, m: Multiplier, *, constant: Any = lambda name, value: value) -> jax.Array:
    """floor(x * ratio + 1/2) of int32 `x`, in int32.

    Args:
      x: int32 array.
      m: see `multiplier_for`; its arrays broadcast against `x`.
      constant: `(name, array) -> array`, called for arrays so that a program can hold them as weights; numbers stay.
    """

    def held(name: str, value: np.ndarray) -> Any:
        return np.int32(value) if value.ndim == 0 else constant(name, value)

    def shift(name: str, value: np.ndarray) -> Any:
        """Shifts per channel are kept in a byte each."""
        return np.int32(value) if value.ndim == 0 else _cast(constant(name, value.astype(np.int8)), np.int32)

    if m.limit is not None:
        x = lax.min_p.bind(lax.max_p.bind(x, held("low_limit", -m.limit)), held("limit", m.limit))
    if np.any(m.left):
        x = lax.shift_left_p.bind(x, shift("left", m.left))
    product = int32.mulhi(x, held("multiplier", m.multiplier))
    right = shift("right", m.right)
    if m.right.ndim == 0:
        half = np.int32(1 << (int(m.right) - 1))
    else:
        half = lax.shift_left_p.bind(lax.full_like(right, 1), lax.sub_p.bind(right, np.int32(1)))
    return lax.shift_right_arithmetic_p.bind(lax.add_p.bind(product, half), right)


def guard_bits(total: float, finest: float = 0.0) -> int:
    """Fractional bits that a sum of rescaled terms may carry when the magnitudes of its terms add up to `total`.

    Args:
      total: the sum of the largest magnitudes of the terms, in output steps.
      finest: the smallest step of any term, in output steps.

    Returns:
      0 to `MAX_GUARD_BITS`; negative where `total` is beyond 2**TERM_BITS: then the sum is in units of 2**-guard output
      steps, never more than half of `finest`, though it may still be too wide, so that terms must saturate.
    """
    if not total > 0:
        return MAX_GUARD_BITS
    mantissa, exponent = math.frexp(total)
    exact = TERM_BITS - exponent + (mantissa == 0.5)
    if exact >= 0:
        return min(exact, MAX_GUARD_BITS)
    coarsest = math.frexp(finest)[1] - 2 if 0 < finest < math.inf else 0
    return -min(-exact, max(0, coarsest))


def round_guard(total: Any, guard: int) -> jax.Array:
    """From units of 2**-guard output steps to whole ones: drops fractional bits of int32, half up, or saturates."""
    if not guard:
        return total
    if guard < 0:
        most = np.int32(1 << (30 + guard))
        return lax.shift_left_p.bind(lax.min_p.bind(lax.max_p.bind(total, -most), most), np.int32(-guard))
    return lax.shift_right_arithmetic_p.bind(lax.add_p.bind(total, np.int32(1 << (guard - 1))), np.int32(guard))


def _cast(x: Any, dtype: Any) -> Any:
    return lax.convert_element_type(x, dtype)
