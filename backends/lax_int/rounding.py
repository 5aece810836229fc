"""Real values to codes, and real values compared: where a region rounds.

codes(max(s_0 x_0 + c, 0))      ->      clamp(rescale(x_0, s_0 / s) + ..., l, h)
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qcompiler.backends.lax_int import bounds
from qcompiler.backends.lax_int.context import Context
from qcompiler.backends.lax_int.values import INT32, Choice, Int, Known, Real, Term, traced
from qcompiler.errors import OverflowProofError
from qcompiler.numerics import fixed_point
from qcompiler.numerics.types import QuantType


def codes(
    context: Context, value: Real | Choice | Known, scale: np.ndarray, zero: np.ndarray, qtype: QuantType, label: str
) -> Int:
    """A value to codes of a type: of a choice, the choice of its cases' codes, since rounding keeps order."""
    if isinstance(value, Known):
        value = Real([], value.value.astype(np.float64))
    if isinstance(value, Real):
        return quantize_real(context, value, scale, zero, qtype, label)
    cases = [codes(context, c, scale, zero, qtype, f"{label}/case{k}") for k, c in enumerate(value.cases)]
    parts = [c.x for c in cases]
    if isinstance(value.which, Known) and value.which.traced is None:
        parts.insert(0, context.number(value.which.value, f"{label}/which", bool))
    elif value.which is not None:
        parts.insert(0, traced(value.which))
    shape = np.broadcast_shapes(*map(np.shape, parts))
    parts = [jnp.broadcast_to(x, shape) for x in parts]
    if value.how == "select":
        out = lax.select_n(*parts)
    else:
        out = functools.reduce((lax.max_p if value.how == "max" else lax.min_p).bind, parts)
    return Int(out, np.int64(qtype.qmin), np.int64(qtype.qmax))


def known_codes(context: Context, real: Real, scale: np.ndarray, zero: np.ndarray, qtype: QuantType, label: str) -> Int:
    """The codes of a number."""
    value = real.constant if real.low is None else np.maximum(real.constant, real.low)
    value = value if real.high is None else np.minimum(value, real.high)
    q = fixed_point.quantize_number(value, scale, zero, qtype)
    return Int(context.number(q, f"{label}/known", qtype.dtype), np.int64(qtype.qmin), np.int64(qtype.qmax))


def quantize_real(
    context: Context, real: Real, scale: np.ndarray, zero: np.ndarray, qtype: QuantType, label: str
) -> Int:
    """A real sum to codes: each term rescaled to output steps (with guard bits where there are several), one rounding.

    Everything below is exact, so that it can be implemented again from here (`debug/reference/` does).

    The sum. A real value is sum_k s_k x_k + c, clamped to [low, high]; x_k are integers, all else is known, in float64.
    `dequantize` gives one term, x = q - z, s = float64(float32 scale). A factor f multiplies every s_k, c and both
    ends, in program order (x / f is x times 1/f); a negative one swaps the ends, an open end stays open. An added
    constant is added to c and to both ends; a sum lists the terms of the left operand first; max and min by a bound
    move both ends. Terms of equal or opposite scales (of equal shapes) are first added or subtracted as integers, each
    to or from the earliest such term with which its bounds fit int32.

    One term and c / s_out = 0 everywhere: t = rescale(x, s / s_out) + z.
    No term: the entry's code of c between the ends.
    Otherwise, with r_k = s_k / s_out and reach R = sum_k max|r_k| B_k + max|c / s_out + z|, B_k the bound of |x_k| (the
    largest of |r_k| B_k over channels, terms added in order):
      g = the largest of 0..14 with R 2**g <= 2**27; if R > 2**27, g = -min(K, A), with K the least for which
        R 2**-K <= 2**27 and 2**A at most half of the smallest |r_k| that is not 0 (A = 0 if there is no such A > 0);
      t = (sum_k rescale(x_k, r_k 2**g) + rint((c / s_out + z) 2**g) + 2**(g-1)) >> g for g > 0, without half and shift
        for g = 0, and clamped to +-2**(30+g), then << -g, for g < 0; there, if max|c / s_out + z| <= 2**29, its rint
        is added behind the shift, in whole steps.
    Where R 2**g > 2**27 even then, g falls on while max|c / s_out + z| 2**g > 2**26 / number of terms: what saturates
    must not lose to a constant.
    So where terms are wide and nearly cancel, the sum is in coarser units, but still finer than the terms' own steps.
    If even R 2**g > 2**27, with L = 2**27 / number of terms, r_k 2**g is held within +-L, and rescale k saturates x_k
    at floor(L / |r_k 2**g|): the bounds of
    accumulators are pessimistic, and such values would be far beyond the range of the result.
    The code is min(max(t, l), h), with l and h the codes of the ends by the entry's formula in float32, or the ends of
    the type. `rescale` and the entry are specified in `numerics.fixed_point`.

    Bounds of integers, which R depends on: codes have those of their dtype, and where `dequantize` reads them those of
    their type; converted integers also keep to those of the new dtype; sums, differences, elementwise products and
    right shifts interval arithmetic; integers with a mask m [0, m]. An interval used as one for a whole array is
    widened to hold 0. It is used so by: views (shape changes, maxima), which have their operand's; a sum of n elements,
    n times it; padding and concatenation, with what is added; a product of two activations of depth n, n times the
    extreme corner; a product with a weight w, per channel of the result sum(max(w, 0)) low + sum(min(w, 0)) high, and
    likewise above.

    Raises:
      OverflowProofError: the constant exceeds 2**30 at g.
    """
    step = scale.astype(np.float64)
    terms = merged(real.terms)
    if not terms:
        return known_codes(context, real, scale, zero, qtype, label)
    offset = real.constant / step
    if len(terms) == 1 and not np.any(offset):
        total = _rescaled(context, terms[0], terms[0].scale / step, f"{label}/0")
        if np.any(zero):
            total = lax.add_p.bind(total, context.number(zero, f"{label}/zero_point"))
    else:
        ratios = [t.scale / step for t in terms]
        reach = sum(float(np.max(np.abs(r) * t.int.magnitude, initial=0)) for r, t in zip(ratios, terms, strict=True))
        reach += float(np.max(np.abs(offset + zero), initial=0))
        finest = min(float(np.min(np.abs(r), where=r != 0, initial=np.inf)) for r in ratios)
        guard = fixed_point.guard_bits(reach, finest)
        most, wide = 2.0**fixed_point.TERM_BITS, float(np.max(np.abs(offset + zero), initial=0))
        while reach * 2.0**guard > most and wide * 2.0**guard > most / (2 * len(terms)):
            guard -= 1
        whole = guard < 0 and wide <= 2.0**29
        constant = np.rint((offset + zero) * (1.0 if whole else 2.0**guard))
        if np.max(np.abs(constant), initial=0) > 2.0**30:
            raise OverflowProofError(
                f"a constant added in region {context.region} is {np.max(np.abs(offset)):.3g} steps of its output, too "
                "large for int32: calibrate on data that reaches it, or keep the layer in float by a qc.Rule"
            )
        largest = most / len(terms) if reach * 2.0**guard > most else None
        ratios = [r * 2.0**guard for r in ratios]
        if largest is not None:
            ratios = [np.clip(r, -largest, largest) for r in ratios]
        parts = [
            _rescaled(context, t, r, f"{label}/{k}", largest)
            for k, (t, r) in enumerate(zip(terms, ratios, strict=True))
        ]
        held = [context.number(constant, f"{label}/constant")] if np.any(constant) else []
        total = functools.reduce(lax.add_p.bind, parts if whole else [*parts, *held])
        total = fixed_point.round_guard(total, guard)
        total = functools.reduce(lax.add_p.bind, held, total) if whole else total
    ends = [None if b is None else fixed_point.quantize_number(b, scale, zero, qtype) for b in (real.low, real.high)]
    free = (qtype.qmin, qtype.qmax)
    low, high = (
        None if b is None or np.all(b == f) else context.number(b, f"{label}/{which}")
        for b, f, which in zip(ends, free, ("low", "high"), strict=True)
    )
    q = fixed_point.clamp_to(total, qtype, low, high)
    return Int(q, np.int64(qtype.qmin), np.int64(qtype.qmax))


def _rescaled(context: Context, term: Term, ratio: np.ndarray, label: str, largest: float | None = None) -> Any:
    multiplier = fixed_point.multiplier_for(ratio, term.int.magnitude, largest)
    rank = term.int.x.ndim

    def constant(name: str, value: np.ndarray) -> Any:
        value = value.reshape((1,) * (rank - value.ndim) + value.shape)
        return context.weight(context.name(f"{label}/{name}"), value)

    return fixed_point.rescale(term.int.x, multiplier, constant=constant)


def merged(terms: list[Term]) -> list[Term]:
    """Terms of equal or opposite scales added or subtracted as integers, exactly, where int32 holds the result."""
    out: list[Term] = []
    for term in terms:
        for k, held in enumerate(out):
            sign = 1 if _same(held.scale, term.scale) else -1
            low, high = bounds.of_sum(held.int, term.int, sign)
            fits = max(-np.min(low), np.max(high)) <= bounds.INT32.max
            if fits and (sign > 0 or _same(held.scale, -term.scale)):
                combine = lax.add_p if sign > 0 else lax.sub_p
                out[k] = Term(Int(combine.bind(held.int.x, term.int.x), low, high), held.scale)
                break
        else:
            out.append(term)
    return out


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    return np.shape(a) == np.shape(b) and np.array_equal(a, b)


def compare(context: Context, name: str, real: Real, label: str) -> Int:
    """A real sum against 0, as truth values.

    Terms of equal or opposite scales are first added or subtracted as integers, as in `quantize_real`.
    One term: s x + c < 0 as x < T, with t = -c / s in float64 and T = ceil(t) where s > 0; negated x < T with
      T = floor(t) + 1 where s < 0. s x + c <= 0 with floor(t) + 1 and ceil(t) in their places. Where s = 0, T is an
      end of int32.
    Several: (sum_k rescale(x_k, s_k / u) + rint(c / u)) against 0, u = (sum_k max|s_k| B_k + max|c|) / 2**27, B_k the
      bound of |x_k|.
    `gt`, `ge` negate `le`, `lt`; equal is neither less nor greater.

    Args:
      context: of the region.
      name: `lt`, `le`, `gt`, `ge`, `eq` or `ne`.
      real: without clamps.
      label: for names of weights.
    """
    terms = merged(real.terms)
    if len(terms) == 1:
        less = lambda strict: _below(context, terms[0], real.constant, strict, f"{label}/{'lt' if strict else 'le'}")
    else:
        reach = sum(float(np.max(np.abs(t.scale) * t.int.magnitude, initial=0)) for t in terms)
        unit = max((reach + float(np.max(np.abs(real.constant), initial=0))) / 2.0**fixed_point.TERM_BITS, 2.0**-1000)
        parts = [_rescaled(context, t, t.scale / unit, f"{label}/{k}") for k, t in enumerate(terms)]
        total = context.number(np.rint(real.constant / unit), f"{label}/constant")
        for part in parts:
            total = lax.add_p.bind(part, total)
        less = lambda strict: (lax.lt_p if strict else lax.le_p).bind(total, np.int32(0))
    if name in ("lt", "ge"):
        out = less(True)
    elif name in ("le", "gt"):
        out = less(False)
    else:
        out = lax.and_p.bind(less(False), lax.not_p.bind(less(True)))
    out = lax.not_p.bind(out) if name in ("gt", "ge", "ne") else out
    return Int(out, np.int64(0), np.int64(1))


def _below(context: Context, term: Term, constant: np.ndarray, strict: bool, label: str) -> jax.Array:
    """scale * x + constant < 0, or <= 0."""
    scale, constant = np.broadcast_arrays(term.scale, constant)
    rising = scale > 0
    with np.errstate(divide="ignore", invalid="ignore"):
        bound = -constant / scale
    threshold = np.where(rising == strict, np.ceil(bound), np.floor(bound) + 1)
    always = (constant < 0) | ((constant == 0) & (not strict))
    threshold = np.where(scale == 0, np.where(always, np.inf, -np.inf), threshold)
    threshold = np.clip(threshold, INT32.min, INT32.max).astype(np.int64)
    below = lax.lt_p.bind(term.int.x, context.number(threshold, f"{label}/threshold"))
    falling = scale < 0
    if not np.any(falling):
        return below
    flip = np.True_ if np.all(falling) else context.weight(context.name(f"{label}/falling"), falling)
    return lax.xor_p.bind(below, flip)
