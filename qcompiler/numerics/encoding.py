"""`Encoding`: everything that turns the codes of one value into reals and back."""

from __future__ import annotations

import dataclasses
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
