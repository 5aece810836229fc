"""What a value is inside a region: exact integers with the bounds of the contract, or a clamped sum of scaled integers.

A known array is a plain NumPy array.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from qcompiler.errors import OverflowProofError, QuantizationError
from qcompiler.ir import _compat

#: Roles of region operands that are known before any input.
KNOWN_ROLES = frozenset({"weight", "bias", "scale", "zero_point", "constant"})


@dataclasses.dataclass
class Ints:
    """Exact integers, and the bounds that the contract gives them (int64, broadcasting against the values)."""

    values: np.ndarray
    low: np.ndarray
    high: np.ndarray

    def one_interval(self) -> tuple[int, int]:
        """One interval for all elements, zero among them."""
        return min(0, int(np.min(self.low))), max(0, int(np.max(self.high)))


@dataclasses.dataclass
class Real:
    """min(max(sum of scale * ints + constant, low), high), scales in float64; infinite ends where nothing clamps."""

    terms: list[tuple[Ints, np.ndarray]]
    constant: Any = 0.0
    low: Any = -np.inf
    high: Any = np.inf

    def times(self, factor: np.ndarray) -> Real:
        ends = np.where(factor < 0, self.high, self.low), np.where(factor < 0, self.low, self.high)
        # An end at infinity stays there, of the sign it has below or above; zero times infinity is no number.
        low, high = (
            np.where(np.isinf(e), s, np.where(np.isinf(e), 0, e) * factor) for e, s in zip(ends, _ENDS, strict=True)
        )
        return Real([(q, s * factor) for q, s in self.terms], self.constant * factor, low, high)

    def plus_number(self, offset: np.ndarray) -> Real:
        return Real(self.terms, self.constant + offset, self.low + offset, self.high + offset)

    def plus(self, other: Real) -> Real:
        if np.isfinite([np.max(self.low), np.min(self.high), np.max(other.low), np.min(other.high)]).any():
            raise QuantizationError("a clamped value is summed inside a region")
        return Real([*self.terms, *other.terms], self.constant + other.constant)

    def clamped(self, least: np.ndarray | None, most: np.ndarray | None) -> Real:
        """min(max(value, least), most); None where there is no bound."""
        low, high = self.low, self.high
        if least is not None:
            low, high = np.maximum(low, least), np.maximum(high, least)
        if most is not None:
            low, high = np.minimum(low, most), np.minimum(high, most)
        return Real(self.terms, self.constant, low, high)


_ENDS = (-np.inf, np.inf)


@dataclasses.dataclass
class Choice:
    """The `max` or `min` of its cases, known arrays among them, or by `which` the first or second (`select`)."""

    how: str
    cases: list[Any]
    which: Any = None

    def times(self, factor: np.ndarray) -> Choice:
        mirrored = {"max": "min", "min": "max"} if np.any(factor < 0) else {}
        return self._each(lambda case: case.times(factor), mirrored.get(self.how, self.how))

    def plus_number(self, offset: np.ndarray) -> Choice:
        return self._each(lambda case: case.plus_number(offset), self.how)

    def clamped(self, least: np.ndarray | None, most: np.ndarray | None) -> Choice:
        return self._each(lambda case: case.clamped(least, most), self.how)

    def _each(self, change: Any, how: str) -> Choice:
        return Choice(how, [change(real(case)) for case in self.cases], self.which)


def real(value: Any) -> Real | Choice:
    """A known array as a sum without terms."""
    return Real([], value.astype(np.float64)) if known(value) else value


def read(env: dict[Any, Any], atom: Any) -> Any:
    return np.asarray(atom.val, atom.aval.dtype) if isinstance(atom, _compat.Literal) else env[atom]


def known(*values: Any) -> bool:
    return all(isinstance(v, np.ndarray | np.generic) for v in values)


def bounds(value: Any) -> tuple[Any, Any]:
    if isinstance(value, Ints):
        return value.low, value.high
    return value.astype(np.int64), value.astype(np.int64)


def whole(value: Any) -> np.ndarray:
    return value.values if isinstance(value, Ints) else value.astype(np.int64)


def fits(eqn: Any, ints: Ints) -> Ints:
    if max(-int(np.min(ints.low)), int(np.max(ints.high))) > 2**31 - 1:
        raise OverflowProofError(f"{eqn.primitive.name}: the int32 accumulator could overflow")
    return ints
