"""Lowering rules, keyed by the primitive's name: what an equation of a body does to known, int and real values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qcompiler.backends.lax_int import bounds, products, rounding, windows
from qcompiler.backends.lax_int.context import Context
from qcompiler.backends.lax_int.values import Choice, Int, Known, Real, Term, traced
from qcompiler.errors import QuantizationError
from qcompiler.ir import _compat, classes, contraction, identity, scatters
from qcompiler.numerics.types import QuantType

#: rule(context, equation, values) -> value
RULES: dict[str, Callable[[Context, _compat.JaxprEqn, list[Any]], Any]] = {}


def rule(*names: str) -> Callable[[Any], Any]:
    """Registers a rule for primitives."""

    def register(fun: Any) -> Any:
        RULES.update(dict.fromkeys(names, fun))
        return fun

    return register


def apply(context: Context, eqn: _compat.JaxprEqn, values: list[Any]) -> Any:
    """The value of an equation."""
    if all(isinstance(v, Known) for v in values):
        return known(eqn, values)
    name = eqn.primitive.name
    if name not in RULES:
        raise QuantizationError(f"lax_int has no rule for {identity.describe(eqn)} in region {context.region}")
    return RULES[name](context, eqn, values)


def known(eqn: _compat.JaxprEqn, values: list[Known]) -> Known:
    """An equation on known arrays is computed now."""
    with jax.ensure_compile_time_eval():
        (result,) = _compat.bind(eqn, [jnp.asarray(v.value) for v in values])
    result = np.asarray(result)
    if result.ndim and result.dtype.kind == "i" and any(v.traced is not None for v in values):
        # Integers made of a weight are made of it at run time too, so that the program does not hold both.
        return Known(result, _compat.bind(eqn, [traced(v) for v in values])[0])
    return Known(result)


# Integers


@rule("convert_element_type")
def _convert(context: Context, eqn: _compat.JaxprEqn, values: list[Any]) -> Any:
    (x,) = values
    if isinstance(x, Int) and classes.is_float(eqn.outvars[0]):
        return Real([Term(Int(lax.convert_element_type(x.x, jnp.int32), x.low, x.high), np.float64(1))])
    if isinstance(x, Int):
        least, most = bounds.of_dtype(eqn.outvars[0].aval.dtype)
        return Int(_compat.bind(eqn, [x.x])[0], np.maximum(x.low, least), np.minimum(x.high, most))
    return x


@rule("add", "sub")
def _add(context: Context, eqn: _compat.JaxprEqn, values: list[Any]) -> Any:
    sign = 1 if eqn.primitive.name == "add" else -1
    a, b = values
    if isinstance(a, Int) or isinstance(b, Int):
        low, high = bounds.prove(eqn, *bounds.of_sum(a, b, sign), context.region)
        return Int(_compat.bind(eqn, [traced(a), traced(b)])[0], low, high)
    if isinstance(b, Known):
        return a.shifted(sign * b.value.astype(np.float64))
    b = b.scaled(np.float64(sign))
    if isinstance(a, Known):
        return b.shifted(a.value.astype(np.float64))
    if a.clamped or b.clamped:
        raise QuantizationError(f"{identity.describe(eqn)}: a clamped value is summed inside region {context.region}")
    return a.plus(b)


@rule("mul", "div")
def _multiply(context: Context, eqn: _compat.JaxprEqn, values: list[Any]) -> Any:
    a, b = values
    if isinstance(a, Int) or isinstance(b, Int):
        low, high = bounds.prove(eqn, *bounds.of_product(a, b), context.region)
        return Int(_compat.bind(eqn, [traced(a), traced(b)])[0], low, high)
    real, held = (a, b) if isinstance(b, Known) else (b, a)
    factor = held.value.astype(np.float64)
    return real.scaled(1 / factor if eqn.primitive.name == "div" else factor)


@rule("shift_right_arithmetic")
def _shift_right(context: Context, eqn: _compat.JaxprEqn, values: list[Any]) -> Any:
    x, count = values
    low, high = (np.right_shift(end, np.int64(count.value)) for end in (x.low, x.high))
    return Int(_compat.bind(eqn, [x.x, traced(count)])[0], low, high)


def _as_real(value: Any) -> Any:
    """An operand; known numbers as a constant without terms."""
    return Real([], value.value.astype(np.float64)) if isinstance(value, Known) else value


@rule("neg")
def _negate(context: Context, eqn: _compat.JaxprEqn, values: list[Any]) -> Any:
    return values[0].scaled(np.float64(-1))


@rule("max", "min", "clamp")
def _clamp(context: Context, eqn: _compat.JaxprEqn, values: list[Any]) -> Any:
    real = next(v for v in values if not isinstance(v, Known))
    if not any(isinstance(v, Known) for v in values):
        return Choice(eqn.primitive.name, values)
    if eqn.primitive.name == "clamp":
        low, _, high = values
        return real.at_least(low.value.astype(np.float64)).at_most(high.value.astype(np.float64))
    held = next(v for v in values if isinstance(v, Known)).value.astype(np.float64)
    return real.at_least(held) if eqn.primitive.name == "max" else real.at_most(held)


@rule("abs")
def _magnitude(context: Context, eqn: _compat.JaxprEqn, values: list[Any]) -> Any:
    return Choice("max", [values[0], values[0].scaled(np.float64(-1))])


@rule("select_n")
def _select(context: Context, eqn: _compat.JaxprEqn, values: list[Any]) -> Any:
    return Choice("select", [_as_real(v) for v in values[1:]], values[0])


@rule(*sorted(classes.COMPARE))
def _compare(context: Context, eqn: _compat.JaxprEqn, values: list[Any]) -> Any:
    a, b = map(_as_real, values)
    return rounding.compare(context, eqn.primitive.name, a.plus(b.scaled(np.float64(-1))), context.label("compare"))


@rule(*sorted(classes.LOGIC))
def _logic(context: Context, eqn: _compat.JaxprEqn, values: list[Any]) -> Any:
    # Of integers only `and` with a known mask of the low bits.
    most = 1 if eqn.outvars[0].aval.dtype == bool else values[1].value
    return Int(_compat.bind(eqn, [traced(v) for v in values])[0], np.int64(0), np.int64(most))


@rule("dot_general", "conv_general_dilated")
def _product(context: Context, eqn: _compat.JaxprEqn, values: list[Any]) -> Any:
    intervals = [bounds.collapse(*bounds.interval(v)) for v in values]
    operands = [traced(v) for v in values]
    if eqn.primitive.name == "dot_general":
        multiply = lambda a, b: products.dot(a, b, eqn.params["dimension_numbers"])
    else:
        kernel = values[1].value if isinstance(values[1], Known) else None
        # The kernel's values are those of the operand as it stands, not of what `through_int8` makes of it.
        multiply = lambda a, b: products.conv(a, b, eqn.params, kernel if b is operands[1] else None)
    x = products.through_int8(multiply, operands, intervals)
    held = next((k for k, v in enumerate(values) if isinstance(v, Known)), None)
    if held is None:
        depth = contraction.depth(eqn)
        corners = [a * b for a in intervals[0] for b in intervals[1]]
        low, high = np.int64(min(corners)) * depth, np.int64(max(corners)) * depth
        return Int(x, *bounds.prove(eqn, low, high, context.region))
    weight = np.asarray(values[held].value)
    rest = [d for d in range(weight.ndim) if d not in contraction.channel_dims(eqn, held)]
    ends = bounds.of_contraction(intervals[1 - held], weight, rest)
    return Int(x, *bounds.prove(eqn, *(contraction.on_result(b, eqn, held) for b in ends), context.region))


@rule("reduce_sum", "reduce_window_sum", "cumsum")
def _sum(context: Context, eqn: _compat.JaxprEqn, values: list[Any]) -> Any:
    (x,), params, shape = values, eqn.params, eqn.invars[0].aval.shape
    if eqn.primitive.name == "reduce_window_sum":
        names = ("window_dimensions", "window_strides", "padding", "base_dilation", "window_dilation")
        added, out = params["window_dimensions"], windows.window_sum(x.x, *(params[name] for name in names))
    else:
        added = [shape[d] for d in params.get("axes", (params.get("axis"),))]
        (out,) = _compat.bind(eqn, [x.x])
    low, high = (end * int(np.prod(added)) for end in bounds.collapse(x.low, x.high))
    return Int(out, *bounds.prove(eqn, low, high, context.region))


@rule("concatenate")
def _concatenate(context: Context, eqn: _compat.JaxprEqn, values: list[Any]) -> Any:
    ends = [bounds.collapse(*bounds.interval(v)) for v in values]
    out = _compat.bind(eqn, [traced(v) for v in values])[0]
    return Int(out, min(low for low, _ in ends), max(high for _, high in ends))


@rule(*sorted(classes.PLACE))
def _place(context: Context, eqn: _compat.JaxprEqn, values: list[Any]) -> Any:
    operand, update = values[0], values[1 if eqn.primitive.name == "dynamic_update_slice" else 2]
    ends = [bounds.collapse(*bounds.interval(v)) for v in (operand, update)]
    out = _compat.bind(eqn, [traced(v) for v in values])[0]
    return Int(out, min(low for low, _ in ends), max(high for _, high in ends))


@rule("scatter-add")
def _add_at_places(context: Context, eqn: _compat.JaxprEqn, values: list[Any]) -> Any:
    # Onto zeros.
    most, (low, high) = scatters.most_at_one_place(eqn), bounds.collapse(values[2].low, values[2].high)
    out = _compat.bind(eqn, [traced(v) for v in values])[0]
    return Int(out, *bounds.prove(eqn, np.minimum(low, 0) * most, np.maximum(high, 0) * most, context.region))


@rule(*sorted(classes.ORDER))
def _order(context: Context, eqn: _compat.JaxprEqn, values: list[Any]) -> list[Int]:
    """In order; places, if there are any, are the second result."""
    # Computed from no weight, so that nothing of the program holds them.
    made = [isinstance(v, Known) and v.traced is None for v in values]
    name = context.name(context.label("places"))
    operands = [context.weight(name, v.value) if m else traced(v) for v, m in zip(values, made, strict=True)]
    ordered, *places = _compat.bind(eqn, operands)
    found = Int(ordered, *bounds.collapse(values[0].low, values[0].high))
    return [found, *(Int(p, *bounds.of_dtype(p.dtype)) for p in places)]


@rule(*sorted(classes.SEARCH))
def _search(context: Context, eqn: _compat.JaxprEqn, values: list[Any]) -> Any:
    out = _compat.bind(eqn, [values[0].x])[0]
    return Int(out, *bounds.of_dtype(out.dtype))


@rule("pad")
def _pad(context: Context, eqn: _compat.JaxprEqn, values: list[Any]) -> Any:
    x, fill = values
    low, high = bounds.collapse(x.low, x.high)
    fill_low, fill_high = bounds.collapse(*bounds.interval(fill))
    return Int(_compat.bind(eqn, [x.x, traced(fill)])[0], min(low, fill_low), max(high, fill_high))


@rule(*sorted(classes.VIEW - classes.ORDER))
def _view(context: Context, eqn: _compat.JaxprEqn, values: list[Any]) -> Any:
    (x, *rest) = values
    if not isinstance(x, Int):
        raise QuantizationError(f"{identity.describe(eqn)}: a view of reals inside region {context.region}")
    low, high = bounds.collapse(x.low, x.high)
    if eqn.primitive.name == "gather" and (fill := eqn.params["fill_value"]) is not None:
        low, high = min(low, np.int64(fill)), max(high, np.int64(fill))
    return Int(_compat.bind(eqn, [x.x, *map(traced, rest)])[0], low, high)


@rule(*sorted(classes.IDENTITY - {"copy"}))
def _identity(context: Context, eqn: _compat.JaxprEqn, values: list[Any]) -> Any:
    return values[0]


# Between integers and reals


@rule("qc_dequantize")
def _dequantize(context: Context, eqn: _compat.JaxprEqn, values: list[Any]) -> Any:
    q, scale, zero = values
    shifted = fixed_point_shift(eqn, q, zero, context)
    return Real([Term(shifted, np.asarray(scale.value).astype(np.float64))])


def fixed_point_shift(eqn: _compat.JaxprEqn, q: Int, zero: Known, context: Context) -> Int:
    """q - zero point, int32."""
    x = lax.convert_element_type(q.x, jnp.int32)
    if not np.any(zero.value):
        return Int(x, q.low, q.high)
    low, high = bounds.prove(eqn, *bounds.of_sum(q, zero, -1), context.region)
    return Int(lax.sub_p.bind(x, traced(zero)), low, high)


@rule("qc_quantize")
def _quantize(context: Context, eqn: _compat.JaxprEqn, values: list[Any]) -> Any:
    real, scale, zero = values
    qtype: QuantType = eqn.params["type"]
    numbers = np.asarray(scale.value), np.asarray(zero.value)
    q = rounding.codes(context, real, *numbers, qtype, context.label(qtype.name))
    return Int(jnp.broadcast_to(q.x, eqn.outvars[0].aval.shape), q.low, q.high)
