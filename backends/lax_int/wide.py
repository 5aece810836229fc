"""Lowers regions of general arithmetic: what is linear exactly, everything else in software floating point.

Codes and what is linear in them stay `Real`: exact int32 with scales known now. The first equation that is not linear
makes a `SoftFloat` of its operands (30-bit mantissas, an exponent per element), whose functions are in
`numerics.soft_float` and `numerics.soft_functions`. Rounding to codes happens once, at the region's result.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from qcompiler.backends.lax_int import bounds, rounding, rows, rules
from qcompiler.backends.lax_int.context import Context
from qcompiler.backends.lax_int.values import INT32, Int, Known, Real, Term, traced
from qcompiler.errors import QuantizationError
from qcompiler.ir import _compat, classes, identity
from qcompiler.numerics import soft_float, soft_functions, soft_reductions, soft_rounding, soft_trigonometry
from qcompiler.numerics.soft_float import SoftFloat


def apply(context: Context, eqn: _compat.JaxprEqn, values: list[Any]) -> Any:
    """The value of an equation: `Known`, `Int`, `Real`, or `SoftFloat` where it is not linear.

    Raises:
      QuantizationError: no rule for the primitive.
    """
    name = eqn.primitive.name
    if name == "qc_dequantize" and isinstance(values[0], Known):
        return _rows(*values)
    if all(isinstance(v, Known) for v in values):
        return rules.known(eqn, values)
    if name == "gather" and isinstance(values[0], Real) and np.ndim(values[0].terms[0].scale):
        return _gathered(context, eqn, values)
    if name == "qc_dequantize" or (name == "qc_quantize" and isinstance(values[0], Real)):
        return rules.apply(context, eqn, values)
    if name == "qc_quantize":
        return _codes(context, eqn, values)
    if not any(isinstance(v, Real | SoftFloat | rows.Rowed | rows.Product) for v in values) and not classes.is_float(
        eqn.outvars[0]
    ):
        out = _compat.bind(eqn, [_integers(context, v) for v in values])[0]
        return Int(out, *bounds.of_dtype(out.dtype))
    linear = _linear(context, eqn, values)
    if linear is not None:
        return linear
    if name in classes.VIEW | classes.MERGE and name not in classes.STATISTIC:
        return _moved(context, eqn, values)
    if name not in _RULES:
        raise QuantizationError(f"lax_int has no rule for {identity.describe(eqn)} in region {context.region}")
    return _RULES[name](context, eqn, values)


# Without rounding, or with one mantissa for each row


def _linear(context: Context, eqn: _compat.JaxprEqn, values: list[Any]) -> Any:
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
    if not isinstance(x, Real) or not _is_uniform(x):
        return None
    if name == "reduce_sum":
        return _sum(eqn, x)
    if name in ("reduce_max", "reduce_min", "cummax", "cummin", "argmax", "argmin"):
        return _extreme(context, eqn, x)
    if name in ("exp", "exp2"):
        one = rows.compact(context, x)
        wide = one is not None and int(np.max(one.terms[0].int.magnitude)) > 1 << 27
        return None if one is None or wide else rows.exp(one, math.e if name == "exp" else 2.0)
    if name in ("square", "integer_pow") and eqn.params.get("y", 2) == 2:
        return _product(context, x, x)
    if name in classes.VIEW and "FILL" not in str(eqn.params.get("mode")):
        return Real([Term(_moved_int(context, eqn, t.int, rest), t.scale) for t in x.terms], x.constant)
    return None


def _with_rows(context: Context, eqn: _compat.JaxprEqn, values: list[Any]) -> Any:
    """Products of integers with what there is one of per row, and sums of products; None where it is none of these."""
    name = eqn.primitive.name
    if isinstance(values[0], rows.Product):
        return (
            rows.sum_of_products(values[0], eqn.invars[0].aval.shape, eqn.params["axes"])
            if name == "reduce_sum"
            else None
        )
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
        factor = _soft(context, y)
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
    shape = eqn.invars[0].aval.shape
    whole = term.int.x if term.int.x.shape == shape else jnp.broadcast_to(term.int.x, shape)
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
        code = min(2 * reach + math.ceil((rows.MASKED_BELOW + abs(one.constant)) / abs(term.scale)), 1 << 29)
        if abs(number) < MASKS_SCORES or abs(number) / abs(term.scale) < code or code < 2 * reach:
            return None
        code *= 1 if (number > 0) == (term.scale > 0) else -1
    filled = np.int32(code)
    parts = [filled if isinstance(c, Known) else term.int.x for c in cases]
    shape = np.broadcast_shapes(*(np.shape(x) for x in (traced(which), *parts)))
    spread = [jnp.broadcast_to(x, shape) for x in (_integers(context, which), *parts)]
    out = lax.select_n(*spread)
    return Real(
        [Term(Int(out, min(np.min(term.int.low), code), max(np.max(term.int.high), code)), term.scale)], one.constant
    )


#: A constant of such magnitude that is selected beside scores is a mask.
MASKS_SCORES = 9e3


def _moved_int(context: Context, eqn: _compat.JaxprEqn, x: Int, rest: list[Any]) -> Int:
    """Elements of integers elsewhere. What is only repeated keeps dimensions of size one instead."""
    if eqn.primitive.name == "broadcast_in_dim":
        shape = [1] * eqn.outvars[0].aval.ndim
        for size, d in zip(x.x.shape, eqn.params["broadcast_dimensions"], strict=True):
            shape[d] = size
        return dataclasses.replace(x, x=lax.reshape(x.x, shape))
    whole = _spread(x, eqn)
    out = _compat.bind(eqn, [whole.x, *(_integers(context, v) for v in rest)])[0]
    if isinstance(x, rows.Peak) and eqn.primitive.name in ("reshape", "expand_dims", "squeeze"):
        return dataclasses.replace(x, x=out)
    return Int(out, *bounds.collapse(x.low, x.high))


def _is_uniform(x: Real) -> bool:
    """Whether one scale per term and one constant hold for all elements, so that elements can be moved and added."""
    return bool(x.terms) and np.ndim(x.constant) == 0 and all(np.ndim(t.scale) == 0 for t in x.terms)


def _spread(x: Int, eqn: _compat.JaxprEqn) -> Int:
    """A term as large as the value that it is part of."""
    shape = eqn.invars[0].aval.shape
    return x if x.x.shape == shape else Int(jnp.broadcast_to(x.x, shape), x.low, x.high)


def _sum(eqn: _compat.JaxprEqn, x: Real) -> Real | None:
    """The sum of a linear value, each term's integers added exactly; None where int32 could overflow."""
    count = math.prod(eqn.invars[0].aval.shape[d] for d in eqn.params["axes"])
    terms = []
    for term in rounding.merged(x.terms):
        low, high = (end * count for end in bounds.collapse(term.int.low, term.int.high))
        if max(-low, high) > INT32.max:
            return None
        terms.append(Term(Int(_compat.bind(eqn, [_spread(term.int, eqn).x])[0], low, high), term.scale))
    return Real(terms, x.constant * count)


# In software floating point


def _integers(context: Context, value: Int | Known) -> Any:
    """Traced integers or truth values; known arrays become weights."""
    if isinstance(value, Known) and value.traced is None and value.value.ndim:
        return context.weight(context.name(context.label("integers")), value.value)
    return traced(value)


def _soft(context: Context, value: Any) -> SoftFloat:
    """A value in software floating point."""
    if isinstance(value, SoftFloat):
        return value
    if isinstance(value, rows.Rowed | rows.Product):
        return rows.soft(context, value)
    hold = lambda name, array: context.weight(context.name(context.label(name)), array)
    if isinstance(value, Known):
        return soft_float.constant(np.asarray(value.value).astype(np.float64), hold)
    if not isinstance(value, Real):
        raise QuantizationError(f"integers among reals in region {context.region}")
    numbers = lambda array: soft_float.constant(np.asarray(array, np.float64), hold)
    terms = [
        soft_float.from_int(t.int.x, t.scale)
        if np.ndim(t.scale) == 0
        else soft_float.mul(soft_float.from_int(t.int.x, np.float64(1)), numbers(t.scale))
        for t in rounding.merged(value.terms)
    ]
    if np.any(value.constant) or not terms:
        terms.append(numbers(value.constant))
    out = functools.reduce(soft_float.add, terms)
    out = out if value.low is None else soft_float.maximum(out, numbers(value.low))
    return out if value.high is None else soft_float.minimum(out, numbers(value.high))


def _codes(context: Context, eqn: _compat.JaxprEqn, values: list[Any]) -> Int:
    x, scale, zero = values
    qtype = eqn.params["type"]
    numbers = np.asarray(scale.value), np.asarray(zero.value)
    if isinstance(x, rows.Rowed):
        q = rows.codes(context, x, *numbers, qtype)
        return Int(jnp.broadcast_to(q, eqn.outvars[0].aval.shape), np.int64(qtype.qmin), np.int64(qtype.qmax))
    x = _soft(context, x)
    q = soft_rounding.to_codes(x, *numbers, qtype.qmin, qtype.qmax, qtype.dtype)
    return Int(jnp.broadcast_to(q, eqn.outvars[0].aval.shape), np.int64(qtype.qmin), np.int64(qtype.qmax))


def _rows(codes: Known, scale: Known, zero: Known) -> Real:
    """A weight that rows are gathered from: its codes as they are stored, with a scale per row."""
    if np.any(zero.value):
        raise QuantizationError("rows are gathered from symmetric weights alone")
    low, high = bounds.collapse(*bounds.interval(codes))
    return Real([Term(Int(traced(codes), low, high), np.asarray(scale.value).astype(np.float64))])


def _gathered(context: Context, eqn: _compat.JaxprEqn, values: list[Any]) -> SoftFloat:
    """Rows of a weight: of its codes, and of their scales. What is out of bounds is 0."""
    (term,), index = values[0].terms, _integers(context, values[1])
    hold = lambda name, array: context.weight(context.name(context.label(name)), array)
    scale = soft_float.constant(term.scale, hold, "rows")

    def rows(array: Any, fill: int) -> Any:
        sizes = tuple(min(n, m) for n, m in zip(eqn.params["slice_sizes"], array.shape, strict=True))
        return eqn.primitive.bind(array, index, **{**eqn.params, "slice_sizes": sizes, "fill_value": fill})

    codes = soft_float.from_int(rows(term.int.x, 0))
    steps = SoftFloat(rows(scale.mantissa, 0), rows(scale.exponent, soft_float.ZERO_EXPONENT))
    return soft_float.mul(codes, steps)


def _moved(context: Context, eqn: _compat.JaxprEqn, values: list[Any]) -> SoftFloat:
    """Elements elsewhere: the same for mantissas and exponents. What a gather fills in is 0."""
    reals = [k for k, v in enumerate(eqn.invars) if classes.is_float(v)]
    if eqn.primitive.name == "broadcast_in_dim":
        # What is only repeated keeps dimensions of size one instead.
        x, shape = _soft(context, values[0]), [1] * eqn.outvars[0].aval.ndim
        for size, d in zip(x.shape, eqn.params["broadcast_dimensions"], strict=True):
            shape[d] = size
        return x.map(lambda part: lax.reshape(part, shape))
    soft = {k: _soft(context, values[k]).broadcast_to(eqn.invars[k].aval.shape) for k in reals}

    def move(part: Callable[[SoftFloat], Any], fill: int) -> Any:
        operands = [part(soft[k]) if k in soft else _integers(context, v) for k, v in enumerate(values)]
        params = eqn.params | ({"fill_value": fill} if eqn.primitive.name == "gather" else {})
        return eqn.primitive.bind(*operands, **params)

    return SoftFloat(move(lambda x: x.mantissa, 0), move(lambda x: x.exponent, soft_float.ZERO_EXPONENT))


_RULES: dict[str, Callable[[Context, _compat.JaxprEqn, list[Any]], Any]] = {}


def _rule(*names: str) -> Callable[[Any], Any]:
    def register(fun: Any) -> Any:
        _RULES.update(dict.fromkeys(names, fun))
        return fun

    return register


def _function(*names: str, fun: Callable[..., SoftFloat]) -> None:
    """A function of the operands alone."""
    rule = lambda context, eqn, values: fun(*(_soft(context, v) for v in values))
    _RULES.update(dict.fromkeys(names, rule))


for (
    _name
) in "exp exp2 expm1 log log1p log2 logistic tanh erf erfc erf_inv sinh cosh asinh acosh atanh cbrt pow".split():
    _function(_name, fun=getattr(soft_functions, _name))
for _name in "sin cos asin acos atan atan2".split():
    _function(_name, fun=getattr(soft_trigonometry, _name))
for _name in "add sub mul div neg sqrt rsqrt sign square".split():
    _function(_name, fun=getattr(soft_float, _name))
for _name in "floor ceil rem".split():
    _function(_name, fun=getattr(soft_rounding, _name))
_function("abs", fun=soft_float.abs_)
_function("max", fun=soft_float.maximum)
_function("min", fun=soft_float.minimum)
_function("one_minus_square", fun=lambda x: soft_float.sub(soft_float.constant(np.float64(1)), soft_float.square(x)))
_function("clamp", fun=lambda low, x, high: soft_float.minimum(soft_float.maximum(x, low), high))


@_rule("integer_pow")
def _integer_pow(context: Context, eqn: _compat.JaxprEqn, values: list[Any]) -> SoftFloat:
    return soft_functions.integer_pow(_soft(context, values[0]), eqn.params["y"])


@_rule("round")
def _round(context: Context, eqn: _compat.JaxprEqn, values: list[Any]) -> SoftFloat:
    return soft_rounding.round(_soft(context, values[0]), eqn.params["rounding_method"])


@_rule(*sorted(classes.COMPARE))
def _compare(context: Context, eqn: _compat.JaxprEqn, values: list[Any]) -> Int:
    found = soft_float.compare(eqn.primitive.name, *(_soft(context, v) for v in values))
    return Int(jnp.broadcast_to(found, eqn.outvars[0].aval.shape), np.int64(0), np.int64(1))


@_rule("is_finite")
def _is_finite(context: Context, eqn: _compat.JaxprEqn, values: list[Any]) -> Int:
    found = lax.not_p.bind(soft_float.is_infinite(_soft(context, values[0])))
    return Int(jnp.broadcast_to(found, eqn.outvars[0].aval.shape), np.int64(0), np.int64(1))


@_rule("select_n")
def _select(context: Context, eqn: _compat.JaxprEqn, values: list[Any]) -> SoftFloat:
    which, found = _integers(context, values[0]), [_soft(context, c) for c in values[1:]]
    out = found[0]
    for k, case in enumerate(found[1:], 1):
        this = which if eqn.invars[0].aval.dtype.kind == "b" else lax.eq(which, np.int32(k))
        out = soft_float.select(this, case, out)
    return out


@_rule("convert_element_type")
def _convert(context: Context, eqn: _compat.JaxprEqn, values: list[Any]) -> Int:
    x, dtype = _soft(context, values[0]), eqn.outvars[0].aval.dtype
    if dtype.kind == "b":
        found = soft_float.compare("ne", x, soft_float.constant(np.float64(0)))
        return Int(found, np.int64(0), np.int64(1))
    low, high = bounds.of_dtype(dtype)
    whole = lax.clamp(np.int32(max(low, INT32.min)), soft_rounding.to_int(x), np.int32(min(high, INT32.max)))
    return Int(lax.convert_element_type(whole, dtype), low, high)


def _reduction(*names: str, fun: Callable[..., SoftFloat]) -> None:
    """A reduction, given the operand at full size and what of `axes`, `axis` and `reverse` its equation has."""

    def rule(context: Context, eqn: _compat.JaxprEqn, values: list[Any]) -> Any:
        x = _soft(context, values[0]).broadcast_to(eqn.invars[0].aval.shape)
        return fun(x, **{k: eqn.params[k] for k in ("axes", "axis", "reverse") if k in eqn.params})

    _RULES.update(dict.fromkeys(names, rule))


for _name in "reduce_sum reduce_max reduce_min reduce_prod cumsum cumprod cummax cummin".split():
    _reduction(_name, fun=getattr(soft_reductions, _name))


def _log_of_sums(x: SoftFloat, axis: int, reverse: bool) -> SoftFloat:
    """log(cumsum(exp(x)))"""
    return soft_reductions.scan(soft_functions.logaddexp, x, axis, reverse)


_reduction("cumlogsumexp", fun=_log_of_sums)


@_rule(*sorted(classes.SEARCH))
def _search(context: Context, eqn: _compat.JaxprEqn, values: list[Any]) -> Int:
    x = _soft(context, values[0]).broadcast_to(eqn.invars[0].aval.shape)
    (axis,) = eqn.params["axes"]
    out = getattr(soft_reductions, eqn.primitive.name)(x, axis)
    dtype = eqn.outvars[0].aval.dtype
    return Int(lax.convert_element_type(out, dtype), *bounds.of_dtype(dtype))
