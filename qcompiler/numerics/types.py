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
      axis: dimensions that have scales of their own, as non-negative positions; empty: one scale per tensor.
      block_size: per dimension of `axis`, how many consecutive positions share a scale (the last block may be
        shorter); empty: 1 each. ONNX and torchao have the name. Arrays of scales and zero points are as long as the
        dimension all the same, each number repeated over its block, so that they broadcast.
      narrow_range: leave out the most negative code, [-127, 127] at 8 bits, so that negation is exact.
      contracted: dimensions of `axis` that a product sums over, of a weight in groups. Numbers that are summed share
        one float scale, so along these dimensions scales are integer multiples of it; see `numerics.groups`.
    """

    bits: int = 8
    symmetric: bool = False
    axis: tuple[int, ...] = ()
    narrow_range: bool = False
    block_size: tuple[int, ...] = ()
    contracted: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.bits, int) or not (2 <= self.bits <= 16 or self.bits == 32):
            raise QuantizationError(f"a quantized type has 2 to 16 bits, or 32 for a bias; got {self.bits!r}")
        if not isinstance(self.axis, tuple) or not all(isinstance(a, int) and a >= 0 for a in self.axis):
            raise QuantizationError(f"axis is a tuple of positions from 0 up, such as (3,); got {self.axis!r}")
        sizes = self.block_size
        if sizes and (len(sizes) != len(self.axis) or not all(isinstance(n, int) and n >= 1 for n in sizes)):
            raise QuantizationError(
                f"block_size has one positive number per dimension of axis {self.axis}; got {sizes!r}"
            )
        if not isinstance(self.contracted, tuple) or not set(self.contracted) <= set(self.axis):
            raise QuantizationError(f"contracted names dimensions of axis {self.axis}; got {self.contracted!r}")

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
        """Short text: `int8`, `int8s` (symmetric), `int8s[3]` (a scale per channel of axis 3), `int8s[3/4]` (per 4),
        `int4s[~0/32,1]` (in groups of 32 along dimension 0, which is contracted)."""
        mark = lambda a: f"~{a}" if a in self.contracted else f"{a}"
        parts = [mark(a) if n == 1 else f"{mark(a)}/{n}" for a, n in self.blocks.items()]
        axis = f"[{','.join(parts)}]" if parts else ""
        return f"int{self.bits}{'s' if self.symmetric else ''}{'n' if self.narrow_range else ''}{axis}"

    @property
    def blocks(self) -> dict[int, int]:
        """Dimension of `axis` -> how many consecutive positions along it share a scale."""
        return dict(zip(self.axis, self.block_size or (1,) * len(self.axis), strict=True))

    @property
    def per_channel(self) -> QuantType:
        """The type with one scale along what is contracted."""
        kept = {a: n for a, n in self.blocks.items() if a not in self.contracted}
        sizes = tuple(kept.values()) if self.block_size and any(n > 1 for n in kept.values()) else ()
        return dataclasses.replace(self, axis=tuple(kept), block_size=sizes, contracted=())

    def batched(self) -> QuantType:
        """The same type under a new leading dimension."""
        later = lambda dims: tuple(a + 1 for a in dims)
        return dataclasses.replace(self, axis=later(self.axis), contracted=later(self.contracted))


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
    return scale, zero_point_for(low, scale, qtype)


def zero_point_for(low: Any, scale: np.ndarray, qtype: QuantType) -> np.ndarray:
    """The int32 code of real 0 where steps are of size `scale` and the smallest code stands for about `low` <= 0."""
    if qtype.symmetric:
        return np.zeros(scale.shape, np.int32)
    zero = np.rint(qtype.qmin - np.minimum(np.asarray(low, np.float64), 0.0) / scale.astype(np.float64))
    return np.clip(zero, qtype.qmin, qtype.qmax).astype(np.int32)


def extremes(array: np.ndarray, qtype: QuantType) -> tuple[np.ndarray, np.ndarray]:
    """Smallest and largest elements that share a scale, zero among them; full rank, size one outside of `axis`."""
    rest = tuple(d for d in range(array.ndim) if d not in qtype.axis)
    wide = array.astype(np.float64)
    low, high = wide.min(axis=rest, keepdims=True, initial=0.0), wide.max(axis=rest, keepdims=True, initial=0.0)
    if not qtype.axis:
        return low.reshape(()), high.reshape(())
    return over_blocks(np.minimum, low, qtype), over_blocks(np.maximum, high, qtype)


def over_blocks(reduce: np.ufunc, array: np.ndarray, qtype: QuantType) -> np.ndarray:
    """An array per channel (size one outside of `axis`), each block of a type reduced and repeated to its old length.

    Args:
      reduce: `np.minimum`, `np.maximum`.
      array: numbers per position of the dimensions in `axis`.
      qtype: whose `axis` and `block_size` count.
    """
    for axis, size in zip(qtype.axis, qtype.block_size, strict=False):
        length = array.shape[axis]
        if size > 1 and length > 1:
            starts = np.arange(0, length, size)
            array = np.repeat(reduce.reduceat(array, starts, axis=axis), np.diff([*starts, length]), axis=axis)
    return array
