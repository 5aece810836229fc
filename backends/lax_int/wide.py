"""Lowers regions of general arithmetic: what is linear exactly, everything else in software floating point.

Codes and what is linear in them stay `Real`: exact int32 with scales known now. The first equation that is not linear
makes a `SoftFloat` of its operands (30-bit mantissas, an exponent per element), whose functions are in
`numerics.soft_float` and `numerics.soft_functions`. Rounding to codes happens once, at the region's result.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from qcompiler.backends.lax_int import bounds, rounding, rules
from qcompiler.backends.lax_int.context import Context
from qcompiler.backends.lax_int.values import INT32, Int, Known, Real, Term, traced
from qcompiler.errors import QuantizationError
from qcompiler.ir import _compat, classes, identity
from qcompiler.numerics import soft_float, soft_functions, soft_reductions, soft_rounding
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
    if not any(isinstance(v, Real | SoftFloat) for v in values) and not classes.is_float(eqn.outvars[0]):
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


# Linear, and exact


def _linear(context: Context, eqn: _compat.JaxprEqn, values: list[Any]) -> Any:
    """The result where it is linear in integers that are at hold, without rounding; else None."""
    name = eqn.primitive.name
    if name in classes.IDENTITY or classes.is_float_cast(eqn) or name == "reduce_precision":
        return values[0]
    if name == "convert_element_type" and isinstance(values[0], Int) and classes.is_float(eqn.outvars[0]):
        return rules.apply(context, eqn, values)
    reals = [v for v in values if isinstance(v, Real)]
    held = [v for v in values if isinstance(v, Known)]
    if not reals or any(v.clamped for v in reals):
        return None
    if len(reals) + len(held) == len(values) and name in ("add", "sub", "mul", "div", "neg"):
        if name in ("mul", "div") and not (
            held and np.all(np.isfinite(held[0].value)) and (name == "mul" or (held[0] is values[1] and _nonzero(held)))
        ):
            return None
        return rules.apply(context, eqn, values)
    if name in classes.COMPARE and len(reals) + len(held) == len(values):
        return rules.apply(context, eqn, values) if all(np.all(np.isfinite(v.value)) for v in held) else None
    (x, *rest) = values
    if not isinstance(x, Real) or not _is_uniform(x):
        return None
    if name == "reduce_sum":
        return _sum(eqn, x)
    if name in ("reduce_max", "reduce_min", "cummax", "cummin", "argmax", "argmin"):
        (term, *others) = rounding.merged(x.terms)
        if others or not term.scale > 0:
            return None
        out = _compat.bind(eqn, [term.int.x])[0]
        if name in classes.SEARCH:
            return Int(out, *bounds.of_dtype(out.dtype))
        return Real([Term(Int(out, *bounds.collapse(term.int.low, term.int.high)), term.scale)], x.constant)
    if name in classes.VIEW and "FILL" not in str(eqn.params.get("mode")):
        places = [_integers(context, v) for v in rest]
        move = lambda i: Int(_compat.bind(eqn, [i.x, *places])[0], *bounds.collapse(i.low, i.high))
        return Real([Term(move(_spread(t.int, eqn)), t.scale) for t in x.terms], x.constant)
    return None


def _nonzero(held: list[Known]) -> bool:
    return bool(np.all(held[0].value != 0))


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
) in "exp exp2 expm1 log log1p logistic tanh erf erfc erf_inv sin cos asin acos atan sinh cosh asinh acosh".split():
    _function(_name, fun=getattr(soft_functions, _name, None))
for _name in "atanh cbrt pow atan2 log2".split():
    _function(_name, fun=getattr(soft_functions, _name, None))
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
    """log(cumsum(exp(x))), with the largest of all taken out."""
    most = soft_reductions.reduce_max(x, (axis,)).map(lambda part: lax.expand_dims(part, (axis,)))
    sums = soft_reductions.cumsum(soft_functions.exp(soft_float.sub(x, most)), axis, reverse)
    return soft_float.add(soft_functions.log(sums), most)


_reduction("cumlogsumexp", fun=_log_of_sums)


@_rule(*sorted(classes.SEARCH))
def _search(context: Context, eqn: _compat.JaxprEqn, values: list[Any]) -> Int:
    x = _soft(context, values[0]).broadcast_to(eqn.invars[0].aval.shape)
    (axis,) = eqn.params["axes"]
    out = getattr(soft_reductions, eqn.primitive.name)(x, axis)
    dtype = eqn.outvars[0].aval.dtype
    return Int(lax.convert_element_type(out, dtype), *bounds.of_dtype(dtype))
