"""Packed weights, bit by bit."""

from __future__ import annotations

import math
from typing import Any

import numpy as np


def unpack(packed: Any, steps: Any = None, zero_points: Any = None, *, type: Any, shape: tuple[int, ...]) -> np.ndarray:
    """The int8 weight of a `qc_unpack` equation.

    Args:
      packed: bytes; of a row of n codes first, for each power of two in the number of bits from 4 down, so many bits
        of every code, low bits first; byte i holds those of codes i, i + m, i + 2m..., m the number of bytes.
      steps, zero_points: one per group, of weights in groups.
      type: of the codes, two's complement.
      shape: of the weight.
    """
    bits = np.unpackbits(np.asarray(packed)[:, None], axis=1, bitorder="little").astype(np.int64)
    size, value, low = math.prod(shape), 0, 0
    for width in [w for w in (4, 2, 1) if type.bits & w]:
        count = math.ceil(size * width / 8)
        plane, bits = bits[:count].reshape(count, 8 // width, width), bits[count:]
        row = plane.transpose(1, 0, 2).reshape(-1, width)[:size]
        value = value + (row << np.arange(low, low + width)).sum(axis=1)
        low += width
    codes = np.where(value >= 1 << (type.bits - 1), value - (1 << type.bits), value).reshape(shape)
    if zero_points is not None:
        codes = codes - _of_elements(zero_points, type, shape)
    if steps is not None:
        codes = codes * _of_elements(steps, type, shape)
    return codes.astype(np.int8)


def _of_elements(numbers: Any, type: Any, shape: tuple[int, ...]) -> np.ndarray:
    """The number of the group in which each element is."""
    size = dict(zip(type.axis, type.block_size or (1,) * len(type.axis), strict=True))
    places = [np.arange(n) // size[d] if d in size else np.zeros(n, np.int64) for d, n in enumerate(shape)]
    return np.asarray(numbers).astype(np.int64)[np.ix_(*places)]
