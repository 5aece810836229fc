"""What a value is while a region is lowered: a known array, exact integers with bounds, or a sum of scaled integers.

The real value never exists at run time. It is `sum_k scale_k * int_k + constant`, clamped to [low, high]; scales,
constant and clamps are known now, and `quantize` turns it into fixed-point arithmetic on the integers.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

INT32 = np.iinfo(np.int32)


@dataclasses.dataclass
class Known:
    """An array known now (NumPy), and, if it is a weight of the program, the traced value that holds it."""

    value: np.ndarray
    traced: Any = None


@dataclasses.dataclass
class Int:
    """Exact integers, traced, with proven bounds (int64 arrays that broadcast against them)."""

    x: Any
    low: np.ndarray
    high: np.ndarray

    @property
    def magnitude(self) -> np.ndarray:
        """Largest magnitude."""
        return np.maximum(np.abs(self.low), np.abs(self.high))


@dataclasses.dataclass
class Term:
    """scale * int."""

    int: Int
    scale: np.ndarray


@dataclasses.dataclass
class Real:
    """min(max(sum of terms + constant, low), high); `low` and `high` None where there is no clamp. float64."""

    terms: list[Term]
    constant: np.ndarray = dataclasses.field(default_factory=lambda: np.float64(0))
    low: np.ndarray | None = None
    high: np.ndarray | None = None

    @property
    def clamped(self) -> bool:
        """Whether a clamp has been applied."""
        return self.low is not None or self.high is not None

    def scaled(self, factor: np.ndarray) -> Real:
        """The value times known numbers; a negative factor swaps the clamps."""
        terms = [Term(t.int, t.scale * factor) for t in self.terms]
        low, high = self.low, self.high
        if np.any(factor < 0):
            below, above = (np.float64(-np.inf) if low is None else low), (np.float64(np.inf) if high is None else high)
            low, high = np.where(factor < 0, above, below), np.where(factor < 0, below, above)
        low, high = _scaled_end(low, factor, -np.inf), _scaled_end(high, factor, np.inf)
        return Real(terms, self.constant * factor, low, high)

    def shifted(self, offset: np.ndarray) -> Real:
        """The value plus known numbers."""
        low, high = (None if b is None else b + offset for b in (self.low, self.high))
        return Real(self.terms, self.constant + offset, low, high)

    def plus(self, other: Real) -> Real:
        """The sum of two values without clamps."""
        return Real([*self.terms, *other.terms], self.constant + other.constant)

    def at_least(self, bound: np.ndarray) -> Real:
        """max(value, bound)."""
        low = bound if self.low is None else np.maximum(self.low, bound)
        return Real(self.terms, self.constant, low, None if self.high is None else np.maximum(self.high, bound))

    def at_most(self, bound: np.ndarray) -> Real:
        """min(value, bound)."""
        high = bound if self.high is None else np.minimum(self.high, bound)
        return Real(self.terms, self.constant, None if self.low is None else np.minimum(self.low, bound), high)


def _scaled_end(end: np.ndarray | None, factor: np.ndarray, open_end: float) -> np.ndarray | None:
    """An end of a clamp times known numbers; what is open stays open."""
    if end is None or not np.isfinite(end).any():
        return None
    finite = np.isfinite(end)
    return np.where(finite, np.where(finite, end, 0.0) * factor, open_end)
