"""Lowers regions of general arithmetic: what is linear exactly, everything else in software floating point.

Codes and what is linear in them stay `Real`: exact int32 with scales known now. The first equation that is not linear
makes a `SoftFloat` of its operands (30-bit mantissas, an exponent per element), whose functions are in
`numerics.soft_float` and `numerics.soft_functions`. Rounding to codes happens once, at the region's result.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from qcompiler.backends.lax_int import bounds, linear, rows, rules
from qcompiler.backends.lax_int.context import Context
from qcompiler.backends.lax_int.softening import integers, soft
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
        out = _compat.bind(eqn, [integers(context, v) for v in values])[0]
        return Int(out, *bounds.of_dtype(out.dtype))
    exact = linear.apply(context, eqn, values)
    if exact is not None:
        return exact
    if name in classes.VIEW | classes.MERGE and name not in classes.STATISTIC:
        return _moved(context, eqn, values)
    if name not in _RULES:
        raise QuantizationError(f"lax_int has no rule for {identity.describe(eqn)} in region {context.region}")
    return _RULES[name](context, eqn, values)


def _codes(context: Context, eqn: _compat.JaxprEqn, values: list[Any]) -> Int:
    x, scale, zero = values
    qtype = eqn.params["type"]
    numbers = np.asarray(scale.value), np.asarray(zero.value)
    if isinstance(x, rows.Rowed):
        q = rows.codes(context, x, *numbers, qtype)
    else:
        q = soft_rounding.to_codes(soft(context, x), *numbers, qtype.qmin, qtype.qmax, qtype.dtype)
    return Int(jnp.broadcast_to(q, eqn.outvars[0].aval.shape), np.int64(qtype.qmin), np.int64(qtype.qmax))


def _rows(codes: Known, scale: Known, zero: Known) -> Real:
    """A weight that rows are gathered from: its codes as they are stored, with a scale per row."""
    if np.any(zero.value):
        raise QuantizationError("rows are gathered from symmetric weights alone")
    low, high = bounds.collapse(*bounds.interval(codes))
    return Real([Term(Int(traced(codes), low, high), np.asarray(scale.value).astype(np.float64))])


def _gathered(context: Context, eqn: _compat.JaxprEqn, values: list[Any]) -> SoftFloat:
    """Rows of a weight: of its codes, and of their scales. What is out of bounds is 0."""
    (term,), index = values[0].terms, integers(context, values[1])
    scale = soft_float.constant(term.scale, context.hold, "rows")

    def gather(array: Any, fill: int) -> Any:
        sizes = tuple(min(n, m) for n, m in zip(eqn.params["slice_sizes"], array.shape, strict=True))
        return eqn.primitive.bind(array, index, **{**eqn.params, "slice_sizes": sizes, "fill_value": fill})

    codes = soft_float.from_int(gather(term.int.x, 0))
    steps = SoftFloat(gather(scale.mantissa, 0), gather(scale.exponent, soft_float.ZERO_EXPONENT))
    return soft_float.mul(codes, steps)


def _moved(context: Context, eqn: _compat.JaxprEqn, values: list[Any]) -> SoftFloat:
    """Elements elsewhere: the same for mantissas and exponents. What a gather fills in is 0."""
    reals = [k for k, v in enumerate(eqn.invars) if classes.is_float(v)]
    if eqn.primitive.name == "broadcast_in_dim":
        return soft(context, values[0]).map(lambda part: linear.in_dimensions(part, eqn))
    whole = {k: soft(context, values[k]).broadcast_to(eqn.invars[k].aval.shape) for k in reals}

    def move(part: Callable[[SoftFloat], Any], fill: int) -> Any:
        operands = [part(whole[k]) if k in whole else integers(context, v) for k, v in enumerate(values)]
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
    rule = lambda context, eqn, values: fun(*(soft(context, v) for v in values))
    _RULES.update(dict.fromkeys(names, rule))


#: Modules, and primitives whose names their functions have.
_NAMED = {
    soft_float: "add sub mul div neg sqrt rsqrt sign square",
    soft_functions: "exp exp2 expm1 log log1p log2 logistic tanh erf erfc erf_inv sinh cosh asinh acosh atanh cbrt pow",
    soft_trigonometry: "sin cos asin acos atan atan2",
    soft_rounding: "floor ceil rem",
}
for _module, _names in _NAMED.items():
    for _name in _names.split():
        _function(_name, fun=getattr(_module, _name))
_function("abs", fun=soft_float.abs_)
_function("max", fun=soft_float.maximum)
_function("min", fun=soft_float.minimum)
_function("one_minus_square", fun=lambda x: soft_float.sub(soft_float.constant(np.float64(1)), soft_float.square(x)))
_function("clamp", fun=lambda low, x, high: soft_float.minimum(soft_float.maximum(x, low), high))


@_rule("integer_pow")
def _integer_pow(context: Context, eqn: _compat.JaxprEqn, values: list[Any]) -> SoftFloat:
    return soft_functions.integer_pow(soft(context, values[0]), eqn.params["y"])


@_rule("round")
def _round(context: Context, eqn: _compat.JaxprEqn, values: list[Any]) -> SoftFloat:
    return soft_rounding.round(soft(context, values[0]), eqn.params["rounding_method"])


@_rule(*sorted(classes.COMPARE))
def _compare(context: Context, eqn: _compat.JaxprEqn, values: list[Any]) -> Int:
    found = soft_float.compare(eqn.primitive.name, *(soft(context, v) for v in values))
    return Int(jnp.broadcast_to(found, eqn.outvars[0].aval.shape), np.int64(0), np.int64(1))


@_rule("is_finite")
def _is_finite(context: Context, eqn: _compat.JaxprEqn, values: list[Any]) -> Int:
    found = lax.not_p.bind(soft_float.is_infinite(soft(context, values[0])))
    return Int(jnp.broadcast_to(found, eqn.outvars[0].aval.shape), np.int64(0), np.int64(1))


@_rule("select_n")
def _select(context: Context, eqn: _compat.JaxprEqn, values: list[Any]) -> SoftFloat:
    which, found = integers(context, values[0]), [soft(context, c) for c in values[1:]]
    out = found[0]
    for k, case in enumerate(found[1:], 1):
        this = which if eqn.invars[0].aval.dtype.kind == "b" else lax.eq(which, np.int32(k))
        out = soft_float.select(this, case, out)
    return out


@_rule("convert_element_type")
def _convert(context: Context, eqn: _compat.JaxprEqn, values: list[Any]) -> Int:
    x, dtype = soft(context, values[0]), eqn.outvars[0].aval.dtype
    if dtype.kind == "b":
        found = soft_float.compare("ne", x, soft_float.constant(np.float64(0)))
        return Int(found, np.int64(0), np.int64(1))
    low, high = bounds.of_dtype(dtype)
    whole = lax.clamp(np.int32(max(low, INT32.min)), soft_rounding.to_int(x), np.int32(min(high, INT32.max)))
    return Int(lax.convert_element_type(whole, dtype), low, high)


def _reduction(*names: str, fun: Callable[..., SoftFloat]) -> None:
    """A reduction, given the operand at full size and what of `axes`, `axis` and `reverse` its equation has."""

    def rule(context: Context, eqn: _compat.JaxprEqn, values: list[Any]) -> Any:
        x = soft(context, values[0]).broadcast_to(eqn.invars[0].aval.shape)
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
    x = soft(context, values[0]).broadcast_to(eqn.invars[0].aval.shape)
    (axis,) = eqn.params["axes"]
    out = getattr(soft_reductions, eqn.primitive.name)(x, axis)
    dtype = eqn.outvars[0].aval.dtype
    return Int(lax.convert_element_type(out, dtype), *bounds.of_dtype(dtype))
