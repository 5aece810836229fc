"""Interval arithmetic on integers: the proof, per op, that int32 cannot overflow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jax import dtypes

from qcompiler.backends.lax_int.values import INT32, Int, Known
from qcompiler.errors import OverflowProofError
from qcompiler.ir import _compat, identity


def of_dtype(dtype: Any) -> tuple[np.int64, np.int64]:
    """The range of an integer dtype, or of truth values."""
    if np.dtype(dtype) == bool:
        return np.int64(0), np.int64(1)
    info = dtypes.iinfo(dtype)
    return np.int64(info.min), np.int64(info.max)


def interval(value: Int | Known) -> tuple[np.ndarray, np.ndarray]:
    """Bounds of an operand; a known array is its own."""
    if isinstance(value, Known):
        wide = np.asarray(value.value).astype(np.int64)
        return wide, wide
    return value.low, value.high


def collapse(low: np.ndarray, high: np.ndarray) -> tuple[np.int64, np.int64]:
    """One interval for the whole array."""
    return np.int64(np.min(low, initial=0)), np.int64(np.max(high, initial=0))


def of_sum(a: Int | Known, b: Int | Known, sign: int) -> tuple[np.ndarray, np.ndarray]:
    """Bounds of a + sign * b."""
    (a_low, a_high), (b_low, b_high) = interval(a), interval(b)
    return (a_low + b_low, a_high + b_high) if sign > 0 else (a_low - b_high, a_high - b_low)


def of_product(a: Int | Known, b: Int | Known) -> tuple[np.ndarray, np.ndarray]:
    """Bounds of a * b, element by element."""
    corners = [x * y for x in interval(a) for y in interval(b)]
    return np.minimum.reduce(np.broadcast_arrays(*corners)), np.maximum.reduce(np.broadcast_arrays(*corners))


def of_contraction(
    x: tuple[np.int64, np.int64], weight: np.ndarray, contracted: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Bounds of sums of x * weight over the weight's contracted dimensions (kept, size one), x in one interval.

    Each weight meets the end of the interval that is worst for it, so the bound is reached by some input.
    """
    wide = weight.astype(np.int64)
    positive = np.maximum(wide, 0).sum(axis=tuple(contracted), keepdims=True)
    negative = np.minimum(wide, 0).sum(axis=tuple(contracted), keepdims=True)
    low, high = x
    return positive * low + negative * high, positive * high + negative * low


def prove(eqn: _compat.JaxprEqn, low: np.ndarray, high: np.ndarray, region: str) -> tuple[np.ndarray, np.ndarray]:
    """The bounds again, if they fit int32.

    Raises:
      OverflowProofError: they do not; the op is named.
    """
    worst = max(abs(int(np.min(low, initial=0))), abs(int(np.max(high, initial=0))))
    if worst > INT32.max:
        raise OverflowProofError(
            f"{identity.describe(eqn)} ({region}): its int32 accumulator could reach {worst:.4g}, beyond {INT32.max}; "
            "contract fewer elements at once, use fewer bits for its operands, or keep the layer in float by a qc.Rule"
        )
    return low, high
