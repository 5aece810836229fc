"""The integers of one region, equation by equation."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from qcompiler.debug.reference import contractions, views
from qcompiler.debug.reference.products import product
from qcompiler.debug.reference.sums import sign, store
from qcompiler.debug.reference.tables import table
from qcompiler.debug.reference.values import KNOWN_ROLES, Choice, Ints, Real, bounds, fits, known, read, real, whole
from qcompiler.debug.reference.views import VIEWS, view
from qcompiler.debug.reference.wide import wide
from qcompiler.errors import QuantizationError
from qcompiler.ir import _compat, classes


def region(eqn: Any, operands: Sequence[Any]) -> list[np.ndarray]:
    """The results of one fused region.

    Args:
      eqn: the region equation.
      operands: one array per operand, the codes of activations and the weights alike.
    """
    body = _compat.open_jaxpr(eqn.params["body"])
    if eqn.params["kind"] == "table":
        return table(eqn, body, operands)
    if eqn.params["kind"] == "wide":
        return wide(body, operands)
    env: dict[Any, Any] = {}
    for var, role, operand in zip(body.invars, eqn.params["roles"], operands, strict=True):
        array = np.asarray(operand)
        if role in KNOWN_ROLES:
            env[var] = array
        else:
            least, most = (0, 1) if array.dtype == bool else (np.iinfo(array.dtype).min, np.iinfo(array.dtype).max)
            env[var] = Ints(array.astype(np.int64), np.int64(least), np.int64(most))
    for inner in body.eqns:
        values = [read(env, v) for v in inner.invars]
        made = apply(inner, values)
        env.update(zip(inner.outvars, made if isinstance(made, list) else [made], strict=True))
    results = [read(env, v) for v in body.outvars]
    return [np.asarray(r.values).astype(v.aval.dtype) for r, v in zip(results, eqn.outvars, strict=True)]


def requantize(eqn: Any, operands: Sequence[Any]) -> list[np.ndarray]:
    """The result of a requantize equation; its operands are codes, scale, zero point, and the new scale, zero point."""
    q, scale_in, zero_in, scale_out, zero_out = map(np.asarray, operands)
    in_type, qtype = eqn.params["in_type"], eqn.params["type"]
    zero = zero_in.astype(np.int64)
    codes = Ints(q.astype(np.int64) - zero, in_type.qmin - zero, in_type.qmax - zero)
    real = Real([(codes, scale_in.astype(np.float64))])
    return [store(real, scale_out, zero_out, qtype).values.astype(qtype.dtype)]


def apply(eqn: Any, values: list[Any]) -> Any:
    name = eqn.primitive.name
    if name in VIEWS:
        return view(eqn, values)
    if name not in _RULES:
        raise QuantizationError(f"the reference has no rule for {name}")
    return _RULES[name](eqn, values)


def _convert(eqn: Any, values: list[Any]) -> Any:
    (x,), dtype = values, eqn.params["new_dtype"]
    if known(x):
        return x.astype(dtype)
    if not isinstance(x, Ints):
        return x
    if classes.is_float(eqn.outvars[0]):
        return Real([(x, np.float64(1))])
    info = np.iinfo(dtype)
    return Ints(x.values, np.maximum(x.low, info.min), np.minimum(x.high, info.max))


def _add(eqn: Any, values: list[Any]) -> Any:
    a, b = values
    subtract = eqn.primitive.name == "sub"
    if known(a, b):
        return a - b if subtract else a + b
    if isinstance(a, Ints) or isinstance(b, Ints):
        (a_low, a_high), (b_low, b_high) = bounds(a), bounds(b)
        if subtract:
            return fits(eqn, Ints(whole(a) - whole(b), a_low - b_high, a_high - b_low))
        return fits(eqn, Ints(whole(a) + whole(b), a_low + b_low, a_high + b_high))
    if not known(b):
        b = b.times(np.float64(-1)) if subtract else b
        return b.plus_number(a.astype(np.float64)) if known(a) else a.plus(b)
    return a.plus_number(-b.astype(np.float64) if subtract else b.astype(np.float64))


def _multiply(eqn: Any, values: list[Any]) -> Any:
    a, b = values
    if known(a, b):
        return a / b if eqn.primitive.name == "div" else a * b
    if isinstance(a, Ints) or isinstance(b, Ints):
        ends = np.broadcast_arrays(*(x * y for x in bounds(a) for y in bounds(b)))
        return fits(eqn, Ints(whole(a) * whole(b), np.minimum.reduce(ends), np.maximum.reduce(ends)))
    value, number = (b, a) if known(a) else (a, b)
    number = number.astype(np.float64)
    return value.times(1 / number if eqn.primitive.name == "div" else number)


def _shift_right(eqn: Any, values: list[Any]) -> Any:
    x, count = values[0], int(values[1])
    if known(x):
        return np.floor_divide(x, x.dtype.type(1 << count))
    return Ints(*(np.floor_divide(part, 1 << count) for part in (x.values, x.low, x.high)))


def _low_bits(eqn: Any, values: list[Any]) -> Any:
    """`and` with a mask of the low bits: the remainder by a power of two."""
    x, mask = values[0], int(values[1])
    if known(x):
        return np.mod(x, x.dtype.type(mask + 1))
    return Ints(np.mod(x.values, mask + 1), np.int64(0), np.int64(mask))


def _negate(eqn: Any, values: list[Any]) -> Any:
    return -values[0] if known(values[0]) else values[0].times(np.float64(-1))


def _clamp(eqn: Any, values: list[Any]) -> Any:
    name = eqn.primitive.name
    if name != "clamp" and not any(known(v) for v in values):
        return Choice(name, values)
    if name == "clamp":
        least, value, most = values
    else:
        value, bound = values if not known(values[0]) else values[::-1]
        least, most = (bound, None) if name == "max" else (None, bound)
    return value.clamped(*(None if end is None else end.astype(np.float64) for end in (least, most)))


def _magnitude(eqn: Any, values: list[Any]) -> Any:
    return Choice("max", [values[0], values[0].times(np.float64(-1))])


def _select(eqn: Any, values: list[Any]) -> Any:
    which, *cases = values
    if known(*values):
        return np.where(which, cases[1], cases[0])
    return Choice("select", cases, which)


def _compare(eqn: Any, values: list[Any]) -> Any:
    if known(*values):
        return _COMPARISONS[eqn.primitive.name](*values)
    a, b = map(real, values)
    return _truth(sign(a.plus(b.times(np.float64(-1))), eqn.primitive.name))


def _logic(eqn: Any, values: list[Any]) -> Any:
    if eqn.outvars[0].aval.dtype != bool:
        return _low_bits(eqn, values)
    found = _LOGIC[eqn.primitive.name](*(whole(v).astype(bool) for v in values))
    return found if known(*values) else _truth(found)


def _truth(values: np.ndarray) -> Ints:
    return Ints(np.asarray(values).astype(np.int64), np.int64(0), np.int64(1))


_COMPARISONS = {"lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal} | {
    "eq": np.equal,
    "ne": np.not_equal,
}
_LOGIC = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor, "not": np.logical_not}


def _reduce_sum(eqn: Any, values: list[Any]) -> Any:
    axes = tuple(eqn.params["axes"])
    if known(values[0]):
        return values[0].sum(axis=axes, dtype=values[0].dtype)
    count = math.prod(values[0].values.shape[d] for d in axes)
    low, high = values[0].one_interval()
    return fits(eqn, Ints(values[0].values.sum(axis=axes), np.int64(low * count), np.int64(high * count)))


def _sum_of_windows(eqn: Any, values: list[Any]) -> Any:
    params, x = eqn.params, values[0]
    if eqn.primitive.name == "cumsum":
        axis, count = params["axis"], x.values.shape[params["axis"]]
        turned = np.flip(x.values, axis) if params["reverse"] else x.values
        sums = np.cumsum(turned, axis)
        sums = np.flip(sums, axis) if params["reverse"] else sums
    else:
        count = math.prod(params["window_dimensions"])
        sums = contractions.window(params, x.values, np.add, 0)
    low, high = x.one_interval()
    return fits(eqn, Ints(sums, np.int64(low * count), np.int64(high * count)))


def _pad(eqn: Any, values: list[Any]) -> Any:
    padded = contractions.spread_and_pad(whole(values[0]), eqn.params["padding_config"], int(whole(values[1])))
    return padded.astype(values[0].dtype) if known(*values) else _all_of(padded, values)


def _concatenate(eqn: Any, values: list[Any]) -> Any:
    if known(*values):
        return np.concatenate(values, eqn.params["dimension"])
    return _all_of(np.concatenate([whole(v) for v in values], eqn.params["dimension"]), values)


def _all_of(found: np.ndarray, values: list[Any]) -> Ints:
    """Integers among those of several values."""
    ends = [Ints(found, *bounds(v)).one_interval() for v in values]
    return Ints(found, np.int64(min(low for low, _ in ends)), np.int64(max(high for _, high in ends)))


def _search(eqn: Any, values: list[Any]) -> Any:
    (axis,) = eqn.params["axes"]
    found = (np.argmax if eqn.primitive.name == "argmax" else np.argmin)(values[0].values, axis)
    info = np.iinfo(eqn.params["index_dtype"])
    return Ints(found, np.int64(info.min), np.int64(info.max))


def _place(eqn: Any, values: list[Any]) -> Ints:
    name, params = eqn.primitive.name, eqn.params
    operand, update, *places = values if name == "dynamic_update_slice" else (values[0], values[2], values[1])
    found = views.place(name, params, whole(operand), whole(update), [whole(v) for v in places])
    return _all_of(found, [operand, update])


def _add_at_places(eqn: Any, values: list[Any]) -> Ints:
    zeros, places, updates = values
    found = views.place("scatter-add", eqn.params, whole(zeros), whole(updates), [whole(places)])
    most = 1 if eqn.params["unique_indices"] else math.prod(eqn.invars[1].aval.shape[:-1])
    low, high = updates.one_interval()
    return fits(eqn, Ints(found, np.int64(min(low, 0) * most), np.int64(max(high, 0) * most)))


def _iota(eqn: Any, values: list[Any]) -> np.ndarray:
    shape, dimension = eqn.params["shape"], eqn.params["dimension"]
    along = [-1 if d == dimension else 1 for d in range(len(shape))]
    return np.broadcast_to(np.arange(shape[dimension], dtype=eqn.params["dtype"]).reshape(along), shape)


def _order(eqn: Any, values: list[Any]) -> list[Ints]:
    """In order: ascending of `sort`, the largest of `top_k`; among equals the first is first."""
    x, params = values[0], eqn.params
    axis = params["dimension"] if eqn.primitive.name == "sort" else params.get("axis", -1)
    codes = x.values if eqn.primitive.name == "sort" else -x.values
    places = np.argsort(codes, axis, kind="stable")
    if eqn.primitive.name == "top_k":
        places = np.take(places, np.arange(params["k"]), axis)
    found = Ints(np.take_along_axis(x.values, places, axis), *x.one_interval())
    info = np.iinfo(np.int32)
    return [found, Ints(places, np.int64(info.min), np.int64(info.max))][: len(eqn.outvars)]


def _from_codes(eqn: Any, values: list[Any]) -> Any:
    q, scale, zero = values
    qtype = eqn.params["type"]
    if qtype.bits != 32:
        q = Ints(q.values, np.maximum(q.low, qtype.qmin), np.minimum(q.high, qtype.qmax))
    if np.any(zero):
        wide = zero.astype(np.int64)
        q = fits(eqn, Ints(q.values - wide, q.low - wide, q.high - wide))
    return Real([(q, scale.astype(np.float64))])


def _to_codes(eqn: Any, values: list[Any]) -> Ints:
    codes = store(*values, eqn.params["type"])
    return Ints(np.broadcast_to(codes.values, eqn.outvars[0].aval.shape), codes.low, codes.high)


_RULES: dict[str, Callable[[Any, list[Any]], Any]] = {
    "convert_element_type": _convert,
    "add": _add,
    "sub": _add,
    "mul": _multiply,
    "div": _multiply,
    "neg": _negate,
    "shift_right_arithmetic": _shift_right,
    "max": _clamp,
    "min": _clamp,
    "clamp": _clamp,
    "abs": _magnitude,
    "select_n": _select,
    **dict.fromkeys(_COMPARISONS, _compare),
    **dict.fromkeys(_LOGIC, _logic),
    "concatenate": _concatenate,
    "reduce_window_sum": _sum_of_windows,
    "cumsum": _sum_of_windows,
    "argmax": _search,
    "argmin": _search,
    "iota": _iota,
    "sort": _order,
    "top_k": _order,
    **dict.fromkeys(("dynamic_update_slice", "scatter", "scatter-max", "scatter-min"), _place),
    "scatter-add": _add_at_places,
    "reduce_sum": _reduce_sum,
    "pad": _pad,
    "dot_general": product,
    "conv_general_dilated": product,
    "qc_dequantize": _from_codes,
    "qc_quantize": _to_codes,
    **dict.fromkeys(("copy_p", "name", "stop_gradient"), lambda eqn, values: values[0]),
}
