"""What a value is while a region is lowered: a known array, exact integers with bounds, or a real that never exists.

A `Real` is `sum_k scale_k * int_k + constant`, clamped to [low, high]; scales, constant and clamps are known now, and
`quantize` turns it into fixed-point arithmetic on the integers. A `Choice` is the larger or smaller of several reals,
or one of two by a truth value; it is made on their codes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
from jax import lax

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


def traced(value: Int | Known) -> Any:
    """The traced integers of an operand."""
    if isinstance(value, Int):
        return value.x
    if value.traced is not None:
        return value.traced
    if value.value.ndim == 0:
        return value.value[()]
    if value.value.size and np.all(value.value == value.value.flat[0]):
        # A number that the body spread out; the program holds no array that is not one of its weights.
        return lax.broadcast(value.value.flat[0], value.value.shape)
    return value.value


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


#: What a negative factor makes of a choice.
_MIRRORED = {"max": "min", "min": "max", "select": "select"}


@dataclasses.dataclass
class Choice:
    """The largest (`max`) or smallest (`min`) of its cases, or by `which` the first or second of two (`select`)."""

    how: str
    cases: list[Real | Choice]
    which: Int | Known | None = None

    def scaled(self, factor: np.ndarray) -> Choice:
        """The value times known numbers of one sign."""
        how = _MIRRORED[self.how] if np.any(factor < 0) else self.how
        return Choice(how, [c.scaled(factor) for c in self.cases], self.which)

    def shifted(self, offset: np.ndarray) -> Choice:
        """The value plus known numbers."""
        return self._each(lambda c: c.shifted(offset))

    def at_least(self, bound: np.ndarray) -> Choice:
        """max(value, bound)."""
        return self._each(lambda c: c.at_least(bound))

    def at_most(self, bound: np.ndarray) -> Choice:
        """min(value, bound)."""
        return self._each(lambda c: c.at_most(bound))

    def _each(self, change: Callable[[Any], Any]) -> Choice:
        return Choice(self.how, [change(c) for c in self.cases], self.which)


def _scaled_end(end: np.ndarray | None, factor: np.ndarray, open_end: float) -> np.ndarray | None:
    """An end of a clamp times known numbers; what is open stays open."""
    if end is None or not np.isfinite(end).any():
        return None
    finite = np.isfinite(end)
    return np.where(finite, np.where(finite, end, 0.0) * factor, open_end)
