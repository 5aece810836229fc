"""The integers of one region, equation by equation."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from qcompiler.debug.reference import contractions
from qcompiler.debug.reference.products import product
from qcompiler.debug.reference.sums import store
from qcompiler.debug.reference.tables import table
from qcompiler.debug.reference.values import KNOWN_ROLES, Ints, Real, bounds, fits, known, read, whole
from qcompiler.debug.reference.views import VIEWS, view
from qcompiler.errors import QuantizationError
from qcompiler.ir import _compat


def region(eqn: Any, operands: Sequence[Any]) -> list[np.ndarray]:
    """The results of one fused region.

    Args:
      eqn: the region equation.
      operands: one array per operand, the codes of activations and the weights alike.
    """
    body = _compat.open_jaxpr(eqn.params["body"])
    if eqn.params["kind"] == "table":
        return table(eqn, body, operands)
    env: dict[Any, Any] = {}
    for var, role, operand in zip(body.invars, eqn.params["roles"], operands, strict=True):
        array = np.asarray(operand)
        if role in KNOWN_ROLES:
            env[var] = array
        else:
            info = np.iinfo(array.dtype)
            env[var] = Ints(array.astype(np.int64), np.int64(info.min), np.int64(info.max))
    for inner in body.eqns:
        values = [read(env, v) for v in inner.invars]
        env[inner.outvars[0]] = apply(inner, values)
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
        return view(eqn, values[0])
    if name not in _RULES:
        raise QuantizationError(f"the reference has no rule for {name}")
    return _RULES[name](eqn, values)


def _convert(eqn: Any, values: list[Any]) -> Any:
    x, dtype = values[0], eqn.params["new_dtype"]
    if known(x):
        return x.astype(dtype)
    if isinstance(x, Real) or np.dtype(dtype).kind != "i":
        return x
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
    if isinstance(b, Real):
        b = b.times(np.float64(-1)) if subtract else b
        return a.plus(b) if isinstance(a, Real) else b.plus_number(a.astype(np.float64))
    return a.plus_number(-b.astype(np.float64) if subtract else b.astype(np.float64))


def _multiply(eqn: Any, values: list[Any]) -> Any:
    a, b = values
    if known(a, b):
        return a / b if eqn.primitive.name == "div" else a * b
    if isinstance(a, Ints) or isinstance(b, Ints):
        ends = np.broadcast_arrays(*(x * y for x in bounds(a) for y in bounds(b)))
        return fits(eqn, Ints(whole(a) * whole(b), np.minimum.reduce(ends), np.maximum.reduce(ends)))
    real, number = (a, b) if isinstance(a, Real) else (b, a)
    number = number.astype(np.float64)
    return real.times(1 / number if eqn.primitive.name == "div" else number)


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
    if name == "clamp":
        least, real, most = values
    else:
        real, bound = values if isinstance(values[0], Real) else values[::-1]
        least, most = (bound, None) if name == "max" else (None, bound)
    low, high = real.low, real.high
    if least is not None:
        low, high = np.maximum(low, least.astype(np.float64)), np.maximum(high, least.astype(np.float64))
    if most is not None:
        low, high = np.minimum(low, most.astype(np.float64)), np.minimum(high, most.astype(np.float64))
    return Real(real.terms, real.constant, low, high)


def _reduce_sum(eqn: Any, values: list[Any]) -> Any:
    axes = tuple(eqn.params["axes"])
    if known(values[0]):
        return values[0].sum(axis=axes, dtype=values[0].dtype)
    count = math.prod(values[0].values.shape[d] for d in axes)
    low, high = values[0].one_interval()
    return fits(eqn, Ints(values[0].values.sum(axis=axes), np.int64(low * count), np.int64(high * count)))


def _pad(eqn: Any, values: list[Any]) -> Any:
    x, fill = values
    low, high = x.one_interval()
    number = int(fill)
    padded = contractions.spread_and_pad(x.values, eqn.params["padding_config"], number)
    return Ints(padded, np.int64(min(low, number)), np.int64(max(high, number)))


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
    return store(*values, eqn.params["type"])


_RULES: dict[str, Callable[[Any, list[Any]], Any]] = {
    "convert_element_type": _convert,
    "add": _add,
    "sub": _add,
    "mul": _multiply,
    "div": _multiply,
    "neg": _negate,
    "shift_right_arithmetic": _shift_right,
    "and": _low_bits,
    "max": _clamp,
    "min": _clamp,
    "clamp": _clamp,
    "reduce_sum": _reduce_sum,
    "pad": _pad,
    "dot_general": product,
    "conv_general_dilated": product,
    "qc_dequantize": _from_codes,
    "qc_quantize": _to_codes,
    **dict.fromkeys(("copy_p", "name", "stop_gradient"), lambda eqn, values: values[0]),
}
