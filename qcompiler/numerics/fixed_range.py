"""`FixedRange`: a range that is known, not estimated: a pixel's, a sigmoid's, what a data sheet says."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

from qcompiler.numerics.ranges import Estimator, RangeStats


@dataclasses.dataclass(frozen=True)
class FixedRange(Estimator):
    """Always the same range, whatever calibration saw.

    Attributes:
      low: at most 0, in the unit of the tensor.
      high: at least 0, and more than `low`.

    Raises:
      ValueError: the ends are not finite, do not include zero, or are the same.
    """

    name: ClassVar[str] = "fixed"
    low: float = -1.0
    high: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low <= 0 <= self.high > self.low):
            raise ValueError(f"a range goes from low <= 0 to high >= 0, low < high; got ({self.low}, {self.high})")

    def estimate(self, stats: RangeStats, qmin: int, qmax: int, symmetric: bool) -> tuple[float, float]:
        """The range; if symmetric, the smallest one that holds it. The statistics are not read."""
        return self._ends(stats, qmin, qmax, symmetric)

    def _ends(self, stats: RangeStats, qmin: int, qmax: int, symmetric: bool) -> tuple[float, float]:
        most = max(-self.low, self.high)
        return (-most, most) if symmetric else (self.low, self.high)
