"""The contract of single values: entry to integers, exit from them, and rescaling between them, in NumPy."""

from __future__ import annotations

import math
from typing import Any

import numpy as np


def quantize(x: Any, scale: Any, zero_point: Any, qtype: Any) -> np.ndarray:
    """clamp(rint(x * float32(1 / s)) + z), half to even; NaN becomes the zero point; the steps saturate at 2**24."""
    steps = _steps(x, scale)
    steps = np.where(np.isnan(steps), np.float32(0), steps)
    codes = np.clip(steps, -(2.0**24), 2.0**24).astype(np.int64) + np.asarray(zero_point).astype(np.int64)
    return np.clip(codes, qtype.qmin, qtype.qmax).astype(qtype.dtype)


def dequantize(q: Any, scale: Any, zero_point: Any) -> np.ndarray:
    """(q - z) * s in float32."""
    difference = np.asarray(q).astype(np.int64) - np.asarray(zero_point).astype(np.int64)
    return difference.astype(np.float32) * np.asarray(scale, np.float32)


def _steps(x: Any, scale: Any) -> np.ndarray:
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        return np.rint(np.asarray(x).astype(np.float32) * (np.float32(1) / np.asarray(scale, np.float32)))


def rescale(x: Any, ratio: Any, largest: float | None = None) -> np.ndarray:
    """floor(x * M * 2**(left - right - 32) + 1/2), M the 31-bit multiplier of `ratio`; int64 in, int64 out.

    With ratio = m * 2**e, m in [1/2, 1): M = rint(m * 2**31), carried into e if it reaches 2**31; right =
    max(1, -e - 1), left = right + e + 1, at most 30. Before that, x saturates at 2**(30 - left) where left > 0, and at
    floor(largest / |ratio|). Ratios with right > 31 become 0.
    """
    x, ratio = np.asarray(x, np.int64), np.asarray(ratio, np.float64)
    numbers = [_multiplier(number, largest) for number in ratio.ravel().tolist()]
    multiplier, left, right, limit = np.asarray(numbers, np.int64).reshape(-1, 4).T.reshape(4, *ratio.shape)
    # Below 2**30 before the product, which therefore fits 61 bits.
    product = (np.clip(x, -limit, limit) << left) * multiplier
    return (product + (1 << (31 + right))) >> (32 + right)


def _multiplier(ratio: float, largest: float | None) -> tuple[int, int, int, int]:
    """(M, left, right, the magnitude at which x saturates) of one ratio."""
    mantissa, exponent = math.frexp(abs(ratio))
    multiplier = round(math.ldexp(mantissa, 31))
    if multiplier == 1 << 31:
        multiplier, exponent = 1 << 30, exponent + 1
    right = max(1, -exponent - 1)
    if multiplier == 0 or right > 31:
        return 0, 0, 1, 0
    left = min(right + exponent + 1, 30)
    limit = 1 << (30 - left) if left > 0 else (1 << 31) - 1
    if largest is not None:
        limit = min(limit, math.floor(largest / abs(ratio)))
    return (multiplier if ratio > 0 else -multiplier), left, right, limit
