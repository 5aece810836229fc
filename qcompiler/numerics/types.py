"""How a real value is stored in an integer: `QuantType`, and the scale and zero point that a range gives it.

real = (q - zero_point) * scale
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from qcompiler.errors import QuantizationError


@dataclasses.dataclass(frozen=True)
class QuantType:
    """A quantized type; hashable, so that it can be a parameter of a primitive.

    Attributes:
      bits: 2 to 16, or 32 for biases and accumulators.
      symmetric: the zero point is 0.
      axis: dimensions that have a scale of their own, as non-negative positions; empty: one scale per tensor.
      narrow_range: leave out the most negative code, [-127, 127] at 8 bits, so that negation is exact.
    """

    bits: int = 8
    symmetric: bool = False
    axis: tuple[int, ...] = ()
    narrow_range: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.bits, int) or not (2 <= self.bits <= 16 or self.bits == 32):
            raise QuantizationError(f"a quantized type has 2 to 16 bits, or 32 for a bias; got {self.bits!r}")
        if not isinstance(self.axis, tuple) or not all(isinstance(a, int) and a >= 0 for a in self.axis):
            raise QuantizationError(f"axis is a tuple of positions from 0 up, such as (3,); got {self.axis!r}")

    @property
    def qmin(self) -> int:
        """Smallest code."""
        return -(1 << (self.bits - 1)) + int(self.narrow_range)

    @property
    def qmax(self) -> int:
        """Largest code."""
        return (1 << (self.bits - 1)) - 1

    @property
    def dtype(self) -> np.dtype:
        """The integer dtype that stores the codes: int8, int16 or int32."""
        return np.dtype(np.int8 if self.bits <= 8 else np.int16 if self.bits <= 16 else np.int32)

    @property
    def name(self) -> str:
        """Short text: `int8`, `int8s` (symmetric), `int8s[3]` (scale per channel of axis 3)."""
        axis = f"[{','.join(map(str, self.axis))}]" if self.axis else ""
        return f"int{self.bits}{'s' if self.symmetric else ''}{'n' if self.narrow_range else ''}{axis}"

    def batched(self) -> QuantType:
        """The same type under a new leading dimension."""
        return dataclasses.replace(self, axis=tuple(a + 1 for a in self.axis))


#: Operands of dots and convs.
ACTIVATION = QuantType(8)
WEIGHT = QuantType(8, symmetric=True, narrow_range=True)
#: Values that live between: residual streams, inputs of reductions, results.
STREAM = QuantType(16, symmetric=True)
#: Index of a table.
INDEX = QuantType(12)
#: Bias at the accumulator's scale.
BIAS = QuantType(32, symmetric=True)

#: A scale and its reciprocal must be normal float32 numbers, with room for steps of it and for products with others.
SMALLEST_SCALE = 2.0**-100
LARGEST_SCALE = 2.0**60
#: Smaller numbers are zeros: float32 arithmetic on CPUs and GPUs flushes them.
SMALLEST_NORMAL = 2.0**-126


def scale_and_zero_point(low: Any, high: Any, qtype: QuantType) -> tuple[np.ndarray, np.ndarray]:
    """Scale (float32) and zero point (int32) that cover [low, high], zero always representable exactly.

    Affine: s = (high - low) / (qmax - qmin), z = round(qmin - low / s) (gemmlowp, Jacob et al. 2018, section 2.1);
    symmetric: s = max(-low, high) / qmax, z = 0. Zeros alone get the scale 1. Of several channels,
    those next to zero beside the largest get `SMALLEST_SCALE`.

    Args:
      low, high: real numbers or arrays of them, low <= 0 <= high after including zero.
      qtype: bits, symmetry, range.

    Raises:
      QuantizationError: a bound is NaN or infinite, or the range is too wide or too narrow for float32.
    """
    low = np.minimum(np.asarray(low, np.float64), 0.0)
    high = np.maximum(np.asarray(high, np.float64), 0.0)
    if not (np.isfinite(low).all() and np.isfinite(high).all()):
        raise QuantizationError(f"a range must be finite, got [{low.min()}, {high.max()}]")
    if qtype.symmetric:
        scale = np.maximum(-low, high) / qtype.qmax
    else:
        scale = (high - low) / (qtype.qmax - qtype.qmin)
    if (scale > LARGEST_SCALE).any():
        raise QuantizationError(
            f"the range [{low.min():g}, {high.max():g}] is too wide: its scale would overflow float32"
        )
    # A constant zero has no range; any scale represents it, and 1 keeps multipliers ordinary.
    zeros = np.maximum(-low, high) < SMALLEST_NORMAL
    if not zeros.all() and scale.max() < SMALLEST_SCALE:
        raise QuantizationError(
            f"the range [{low.min():g}, {high.max():g}] is too narrow: its scale would underflow float32"
        )
    scale = np.where(zeros, 1.0, np.maximum(scale, SMALLEST_SCALE)).astype(np.float32)
    if qtype.symmetric:
        return scale, np.zeros(scale.shape, np.int32)
    zero = np.clip(np.rint(qtype.qmin - low / scale.astype(np.float64)), qtype.qmin, qtype.qmax)
    return scale, zero.astype(np.int32)
