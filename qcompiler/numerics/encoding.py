"""`Encoding`: everything that turns the codes of one value into reals and back."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from qcompiler.numerics import fixed_point, types
from qcompiler.numerics.ranges import Estimator, RangeStats
from qcompiler.numerics.types import QuantType


@dataclasses.dataclass(frozen=True, eq=False)
class Encoding:
    """real = (code - zero_point) * scale

    Attributes:
      type: of the codes.
      scale: float32, scalar or broadcastable to the value.
      zero_point: int32, likewise.
    """

    type: QuantType
    scale: np.ndarray
    zero_point: np.ndarray

    @classmethod
    def of_stats(cls, stats: RangeStats, qtype: QuantType, estimator: Estimator) -> Encoding:
        """The encoding per tensor that an estimator chooses; of no values at all, that of zeros.

        Raises:
          QuantizationError: the range is too wide or too narrow for a float32 scale.
        """
        low, high = 0.0, 1.0
        switch = _switch(stats)
        if switch and qtype.symmetric and qtype.bits > 8:
            scale = np.asarray(switch * 2.0 ** (2 - qtype.bits), np.float32)
            return cls(qtype, scale, np.zeros((), np.int32))
        if stats.count and max(-stats.min, stats.max) >= types.SMALLEST_NORMAL:
            low, high = estimator.estimate(stats, qtype.qmin, qtype.qmax, qtype.symmetric)
        return cls(qtype, *types.scale_and_zero_point(low, high, qtype))

    def quantize(self, x: Any) -> np.ndarray:
        """Codes of a real array, by the same rounding as the compiled program; dtype `type.dtype`."""
        return fixed_point.quantize_number(np.asarray(x), self.scale, self.zero_point, self.type).astype(
            self.type.dtype
        )

    def dequantize(self, codes: Any) -> np.ndarray:
        """The reals behind codes, float32."""
        return (np.asarray(codes).astype(np.int32) - self.zero_point).astype(np.float32) * self.scale


def _switch(stats: RangeStats) -> float | None:
    """The one positive value of a tensor that holds nothing else but zeros, if it is a power of two; else None.

    Such a value is a condition spelled as a number: `(1 - mask) * -1e30` must be zero exactly where it is one.
    """
    if stats.min != 0 or not stats.max > 0 or math.frexp(stats.max)[0] != 0.5:
        return None
    return stats.max if stats.zeros and stats.zeros + int(stats.counts[-1]) == stats.count else None
