"""A sum of scaled integers to codes; the specification is the docstring of `quantize_real` in the lax backend."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from qcompiler.debug.reference.contract import quantize, rescale
from qcompiler.debug.reference.values import Choice, Ints, Real, real, whole
from qcompiler.errors import OverflowProofError


def store(value: Any, scale: np.ndarray, zero: np.ndarray, qtype: Any) -> Ints:
    """A real to codes, a choice by the codes of its cases."""
    if not isinstance(value, Choice):
        return _store(real(value), scale, zero, qtype)
    cases = [store(case, scale, zero, qtype).values for case in value.cases]
    if value.how == "select":
        chosen = np.where(whole(value.which) != 0, cases[1], cases[0])
    else:
        chosen = functools.reduce(np.maximum if value.how == "max" else np.minimum, cases)
    return Ints(chosen, np.int64(qtype.qmin), np.int64(qtype.qmax))


def _store(value: Real, scale: np.ndarray, zero: np.ndarray, qtype: Any) -> Ints:
    step, zero = np.asarray(scale).astype(np.float64), np.asarray(zero).astype(np.int64)
    terms = _merge(value.terms)
    if not terms:
        number = np.minimum(np.maximum(value.constant, value.low), value.high)
        codes = quantize(number, scale, zero, qtype).astype(np.int64)
        return Ints(codes, np.int64(qtype.qmin), np.int64(qtype.qmax))
    offset = value.constant / step
    if len(terms) == 1 and not np.any(offset):
        total = rescale(terms[0][0].values, terms[0][1] / step) + zero
    else:
        ratios = [s / step for _, s in terms]
        reach = 0.0
        for ratio, (q, _) in zip(ratios, terms, strict=True):
            reach += float(np.max(np.abs(ratio) * np.maximum(np.abs(q.low), np.abs(q.high))))
        reach += float(np.max(np.abs(offset + zero)))
        guard = 14
        while guard > -30 and reach * 2.0**guard > 2.0**27:
            guard -= 1
        if guard < 0:
            coarse = 0
            finest = min(float(np.abs(r[r != 0]).min(initial=np.inf)) for r in map(np.atleast_1d, ratios))
            while finest < np.inf and 2.0 ** (coarse + 1) <= finest / 2:
                coarse += 1
            guard = max(guard, -coarse)
            constant = float(np.max(np.abs(offset + zero)))
            while reach * 2.0**guard > 2.0**27 and constant * 2.0**guard > 2.0**26 / len(terms):
                guard -= 1
        largest = 2.0**27 / len(terms) if reach * 2.0**guard > 2.0**27 else None
        behind = guard < 0 and float(np.max(np.abs(offset + zero))) <= 2.0**29
        number = np.rint((offset + zero) * (1 if behind else 2.0**guard)).astype(np.int64)
        if np.max(np.abs(number)) > 2**30:
            raise OverflowProofError("a constant of a region does not fit int32")
        total = np.int64(0) if behind else number
        for ratio, (q, _) in zip(ratios, terms, strict=True):
            ratio = ratio * 2.0**guard
            total = total + rescale(q.values, ratio if largest is None else np.clip(ratio, -largest, largest), largest)
        if guard < 0:
            total = (np.clip(total, -(2 ** (30 + guard)), 2 ** (30 + guard)) << -guard) + (number if behind else 0)
        else:
            total = (total + ((1 << guard) >> 1)) >> guard
    low, high = (quantize(b, scale, zero, qtype).astype(np.int64) for b in (value.low, value.high))
    codes = np.minimum(np.maximum(total, low), high)
    return Ints(codes, np.int64(qtype.qmin), np.int64(qtype.qmax))


def sign(real: Real, comparison: str) -> np.ndarray:
    """A real sum against 0 (`lt`, `le`, `gt`, `ge`, `eq`, `ne`); the specification is `compare` in the lax backend."""
    terms = _merge(real.terms)
    if len(terms) == 1:
        less, at_most = (_below(*terms[0], real.constant, strict) for strict in (True, False))
    else:
        reach = sum(float(np.max(np.abs(s) * np.maximum(np.abs(q.low), np.abs(q.high)))) for q, s in terms)
        unit = max((reach + float(np.max(np.abs(real.constant)))) / 2.0**27, 2.0**-1000)
        total = np.rint(real.constant / unit).astype(np.int64)
        for q, scale in terms:
            total = total + rescale(q.values, scale / unit)
        less, at_most = total < 0, total <= 0
    table = {"lt": less, "le": at_most, "gt": ~at_most, "ge": ~less, "eq": at_most & ~less, "ne": less | ~at_most}
    return table[comparison]


def _below(q: Ints, scale: np.ndarray, constant: Any, strict: bool) -> np.ndarray:
    """scale * q + constant < 0, or <= 0, as integers against the float64 quotient."""
    scale, constant = np.broadcast_arrays(np.asarray(scale, np.float64), np.asarray(constant, np.float64))
    with np.errstate(divide="ignore", invalid="ignore"):
        turn = np.where(scale == 0, 0.0, -constant / scale)
    # Integers less than a number are those less than its ceiling; not greater, less than the floor plus one.
    below = np.where(scale > 0, np.ceil(turn) if strict else np.floor(turn) + 1, 0)
    above = np.where(scale < 0, np.floor(turn) + 1 if strict else np.ceil(turn), 0)
    least, most = -(2.0**31), 2.0**31 - 1
    below, above = (np.clip(end, least, most).astype(np.int64) for end in (below, above))
    # A threshold at the end of int32 is not reached: q < -2**31 never holds.
    always = (constant < 0) | ((constant == 0) & (not strict))
    of_zero = np.where(always, q.values < most, q.values < least)
    return np.where(scale > 0, q.values < below, np.where(scale < 0, q.values >= above, of_zero))


def _merge(terms: list[tuple[Ints, np.ndarray]]) -> list[tuple[Ints, np.ndarray]]:
    """Adds a term of equal or opposite scale to the first such one, where int32 holds the result."""
    merged: list[tuple[Ints, np.ndarray]] = []
    for q, scale in terms:
        for k, (p, other) in enumerate(merged):
            if np.shape(scale) != np.shape(other):
                continue
            sign = 1 if np.all(scale == other) else -1 if np.all(scale == -other) else 0
            least, most = (q.low, q.high) if sign > 0 else (-q.high, -q.low)
            low, high = p.low + least, p.high + most
            if sign and max(-int(np.min(low)), int(np.max(high))) <= 2**31 - 1:
                merged[k] = (Ints(p.values + sign * q.values, low, high), other)
                break
        else:
            merged.append((q, scale))
    return merged
