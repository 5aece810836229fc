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


_ENDS = (-np.inf, np.inf)


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
