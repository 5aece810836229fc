"""A sum of scaled integers to codes; the specification is the docstring of `quantize_real` in the lax backend."""

from __future__ import annotations

from typing import Any

import numpy as np

from qcompiler.debug.reference.contract import quantize, rescale
from qcompiler.debug.reference.values import Ints, Real
from qcompiler.errors import OverflowProofError


def store(real: Real, scale: np.ndarray, zero: np.ndarray, qtype: Any) -> Ints:
    """A real sum to codes; the specification is the docstring of `quantize_real` in the lax backend."""
    step, zero = np.asarray(scale).astype(np.float64), np.asarray(zero).astype(np.int64)
    terms = _merge(real.terms)
    offset = real.constant / step
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
        largest = 2.0**27 / len(terms) if reach * 2.0**guard > 2.0**27 else None
        total = np.rint((offset + zero) * 2.0**guard).astype(np.int64)
        if np.max(np.abs(total)) > 2**30:
            raise OverflowProofError("a constant of a region does not fit int32")
        for ratio, (q, _) in zip(ratios, terms, strict=True):
            total = total + rescale(q.values, ratio * 2.0**guard, largest)
        if guard < 0:
            total = np.clip(total, -(2 ** (30 + guard)), 2 ** (30 + guard)) << -guard
        else:
            total = (total + ((1 << guard) >> 1)) >> guard
    low, high = (quantize(b, scale, zero, qtype).astype(np.int64) for b in (real.low, real.high))
    codes = np.minimum(np.maximum(total, low), high)
    return Ints(codes, np.int64(qtype.qmin), np.int64(qtype.qmax))


def _merge(terms: list[tuple[Ints, np.ndarray]]) -> list[tuple[Ints, np.ndarray]]:
    """Adds terms of equal scale into the first such one, where int32 holds the sum."""
    merged: list[tuple[Ints, np.ndarray]] = []
    for q, scale in terms:
        for k, (p, other) in enumerate(merged):
            low, high = p.low + q.low, p.high + q.high
            fits = max(-int(np.min(low)), int(np.max(high))) <= 2**31 - 1
            if fits and np.shape(scale) == np.shape(other) and np.all(scale == other):
                merged[k] = (Ints(p.values + q.values, low, high), other)
                break
        else:
            merged.append((q, scale))
    return merged
