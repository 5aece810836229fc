"""Equations of wide regions that stay exact integers: with known scales, or with one factor per row.

    sum(x), x - max(x), x * 3, where(mask, x, -1e9)      ->      `Real`, int32 and scales known now
    x * rsqrt(mean(x * x))                               ->      `rows.Rowed`, one `SoftFloat` per row

What has no such form is None, and becomes a `SoftFloat` per element in `wide`.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from qcompiler.backends.lax_int import bounds, rounding, rows, rules
from qcompiler.backends.lax_int.context import Context
from qcompiler.backends.lax_int.softening import integers, soft
from qcompiler.backends.lax_int.values import INT32, Int, Known, Real, Term, traced
from qcompiler.ir import _compat, classes
from qcompiler.numerics import masks, soft_float
from qcompiler.numerics.soft_float import SoftFloat


def apply(context: Context, eqn: _compat.JaxprEqn, values: list[Any]) -> Any:
    """The result as integers with known scales, or with one factor per row; None where there is none."""
    name = eqn.primitive.name
    if name in classes.IDENTITY or classes.is_float_cast(eqn) or name == "reduce_precision":
        return values[0]
    if name == "convert_element_type" and isinstance(values[0], Int) and classes.is_float(eqn.outvars[0]):
        return rules.apply(context, eqn, values)
    values = [context.compacted[id(v)][1] if id(v) in context.compacted else v for v in values]
    by_rows = _with_rows(context, eqn, values)
    if by_rows is not None:
        return by_rows
    reals = [v for v in values if isinstance(v, Real)]
    held = [v for v in values if isinstance(v, Known)]
    if not reals or any(v.clamped for v in reals):
        return None
    if len(reals) + len(held) == len(values) and name in ("add", "sub", "mul", "div", "neg"):
        if name in ("mul", "div") and not _is_factor(eqn, values):
            return None
        if name == "sub" and len(reals) == 2 and all(len(v.terms) == 1 for v in reals):
            below = rows.below_peak(*(v.terms[0] for v in reals))
            if below is not None:
                return Real([below], reals[0].constant - reals[1].constant)
        return rules.apply(context, eqn, values)
    if name in classes.COMPARE and len(reals) + len(held) == len(values):
        return rules.apply(context, eqn, values) if all(np.all(np.isfinite(v.value)) for v in held) else None
    if name == "select_n":
        return _masked(context, values)
    (x, *rest) = values
    if not isinstance(x, Real) or not rows.is_uniform(x):
        return None
    if name == "reduce_sum":
        return _sum(eqn, x)
    if name in ("reduce_max", "reduce_min", "cummax", "cummin", "argmax", "argmin"):
        return _extreme(context, eqn, x)
    if name in ("exp", "exp2"):
        one = rows.compact(context, x)
        return None if one is None else rows.exp(one, math.e if name == "exp" else 2.0)
    if name in ("square", "integer_pow") and eqn.params.get("y", 2) == 2:
        return _product(context, x, x)
    if name in classes.VIEW and "FILL" not in str(eqn.params.get("mode")):
        return Real([Term(_moved_int(context, eqn, t.int, rest), t.scale) for t in x.terms], x.constant)
    return None


def _with_rows(context: Context, eqn: _compat.JaxprEqn, values: list[Any]) -> Any:
    """Products of integers with what there is one of per row, and sums of products; None where it is none of these."""
    name = eqn.primitive.name
    if isinstance(values[0], rows.Product):
        if name != "reduce_sum":
            return None
        return rows.sum_of_products(values[0], eqn.invars[0].aval.shape, eqn.params["axes"])
    if name == "neg" and isinstance(values[0], rows.Rowed):
        return values[0].scaled(np.float64(-1))
    if name not in ("add", "sub", "mul", "div") or len(values) != 2:
        return None
    a, b = values
    if any(isinstance(v, rows.Rowed) for v in values) and any(isinstance(v, Known) for v in values):
        if name in ("mul", "div") and not _is_factor(eqn, values):
            return None
        value, number = (a, b.value.astype(np.float64)) if isinstance(b, Known) else (b, a.value.astype(np.float64))
        if not np.all(np.isfinite(number)):
            return None
        if name in ("mul", "div"):
            return value.scaled(number if name == "mul" else 1 / number)
        value = value.scaled(np.float64(-1)) if name == "sub" and value is b else value
        return value.shifted(-number if name == "sub" and value is a else number)
    if name == "mul" and isinstance(a, Real) and isinstance(b, Real):
        return _product(context, a, b)
    if name == "mul" and any(isinstance(v, SoftFloat) for v in values) and any(isinstance(v, Known) for v in values):
        row, number = (a, b.value) if isinstance(b, Known) else (b, a.value)
        if rows.is_much_smaller(row.shape, eqn.outvars[0].aval.shape) and np.all(np.isfinite(number)):
            return rows.of_channels(row, number.astype(np.float64))
        return None
    for x, y in ((a, b), (b, a))[: 2 if name == "mul" else 1]:
        if name == "mul" and isinstance(y, rows.Rowed) and y.int.x.size == 1 and not np.any(y.constant):
            one = rows.compact(context, x) if isinstance(x, Real) else None
            if one is not None and not np.any(one.constant):
                return rows.Rowed(one.terms[0].int, one.terms[0].scale * y.scale, y.row)
        if name not in ("mul", "div") or not isinstance(x, Real | rows.Rowed) or not isinstance(y, SoftFloat | Real):
            continue
        if not rows.is_much_smaller(_shape(y), eqn.outvars[0].aval.shape):
            continue
        factor = soft(context, y)
        factor = soft_float.reciprocal(factor) if name == "div" else factor
        if isinstance(x, rows.Rowed) and not np.any(x.constant):
            return rows.Rowed(x.int, x.scale, soft_float.mul(x.row, factor))
        one = rows.compact(context, x) if isinstance(x, Real) else None
        if one is not None and not np.any(one.constant) and _shape(one) == eqn.outvars[0].aval.shape:
            return rows.Rowed(one.terms[0].int, one.terms[0].scale, factor)
    return None


def _shape(value: Any) -> tuple[int, ...]:
    if isinstance(value, SoftFloat):
        return value.shape
    return np.broadcast_shapes(*(t.int.x.shape for t in value.terms))


def _product(context: Context, a: Real, b: Real) -> rows.Product | None:
    """The product of two values without channels or constants, kept apart until it is summed."""
    found = [rows.compact(context, v) for v in (a, b)]
    if any(v is None or np.any(v.constant) for v in found):
        return None
    first, second = (v.terms[0] for v in found)
    return rows.Product(first, first if found[0] is found[1] else second)


def _is_factor(eqn: _compat.JaxprEqn, values: list[Any]) -> bool:
    """Whether one operand of a product is known and finite, or is what a quotient divides by, and no zero."""
    held = [v for v in values if isinstance(v, Known)]
    if len(held) != 1 or not np.all(np.isfinite(held[0].value)):
        return False
    return eqn.primitive.name == "mul" or (held[0] is values[1] and bool(np.all(held[0].value != 0)))


def _extreme(context: Context, eqn: _compat.JaxprEqn, x: Real) -> Any:
    """The largest or smallest, or where it is."""
    one, name = rows.compact(context, x), eqn.primitive.name
    if one is None or not one.terms[0].scale > 0:
        return None
    (term,) = one.terms
    whole = rows.full_size(term.int.x, eqn.invars[0].aval.shape)
    out = _compat.bind(eqn, [whole])[0]
    if name in classes.SEARCH:
        return Int(out, *bounds.of_dtype(out.dtype))
    if name == "reduce_max" and whole is term.int.x:
        return Real(rows.peak(term, out, eqn.params["axes"]).terms, one.constant)
    return Real([Term(Int(out, *bounds.collapse(term.int.low, term.int.high)), term.scale)], one.constant)


def _masked(context: Context, values: list[Any]) -> Real | None:
    """A selection between codes and a number that is 0 or a mask: a code of its own, below or above all others."""
    which, *cases = values
    numbers = [c.value for c in cases if isinstance(c, Known)]
    reals = [c for c in cases if isinstance(c, Real)]
    if len(cases) != 2 or len(numbers) != 1 or len(reals) != 1 or not np.all(numbers[0] == numbers[0].flat[0]):
        return None
    number, one = float(numbers[0].flat[0]), rows.compact(context, reals[0])
    if one is None or (number == 0 and one.constant != 0):
        return None
    (term,) = one.terms
    code, reach = 0, int(np.max(term.int.magnitude))
    if number:
        code = 2 * reach + math.ceil((masks.BELOW + abs(one.constant)) / abs(term.scale))
        if abs(number) < masks.MASKS_SCORES or abs(number) / abs(term.scale) < code or code > 1 << 29:
            return None
        code *= 1 if (number > 0) == (term.scale > 0) else -1
    filled = np.int32(code)
    parts = [filled if isinstance(c, Known) else term.int.x for c in cases]
    shape = np.broadcast_shapes(*(np.shape(x) for x in (traced(which), *parts)))
    out = lax.select_n(*(jnp.broadcast_to(x, shape) for x in (integers(context, which), *parts)))
    low, high = min(np.min(term.int.low), code), max(np.max(term.int.high), code)
    return Real([Term(Int(out, low, high), term.scale)], one.constant)


def in_dimensions(x: Any, eqn: _compat.JaxprEqn) -> Any:
    """What `broadcast_in_dim` makes of an array, but dimensions that it only repeats keep size one."""
    shape = [1] * eqn.outvars[0].aval.ndim
    for size, d in zip(x.shape, eqn.params["broadcast_dimensions"], strict=True):
        shape[d] = size
    return lax.reshape(x, shape)


def _moved_int(context: Context, eqn: _compat.JaxprEqn, x: Int, rest: list[Any]) -> Int:
    """Elements of integers elsewhere."""
    if eqn.primitive.name == "broadcast_in_dim":
        return dataclasses.replace(x, x=in_dimensions(x.x, eqn))
    whole = rows.full_size(x.x, eqn.invars[0].aval.shape)
    out = _compat.bind(eqn, [whole, *(integers(context, v) for v in rest)])[0]
    if isinstance(x, rows.Peak) and eqn.primitive.name in ("reshape", "expand_dims", "squeeze"):
        return dataclasses.replace(x, x=out)
    return Int(out, *bounds.collapse(x.low, x.high))


def _sum(eqn: _compat.JaxprEqn, x: Real) -> Real | None:
    """The sum of a linear value, each term's integers added exactly; None where int32 could overflow."""
    count = math.prod(eqn.invars[0].aval.shape[d] for d in eqn.params["axes"])
    terms = []
    for term in rounding.merged(x.terms):
        low, high = (end * count for end in bounds.collapse(term.int.low, term.int.high))
        if max(-low, high) > INT32.max:
            return None
        out = _compat.bind(eqn, [rows.full_size(term.int.x, eqn.invars[0].aval.shape)])[0]
        terms.append(Term(Int(out, low, high), term.scale))
    return Real(terms, x.constant * count)
