"""Jaxprs in NumPy, one equation at a time in the dtypes they state: the simulation that integers are compared with.

    reference.simulate(region, operands)               # the body of a region: float32 between its codes
    reference.evaluate_floats(jaxpr, args)             # any jaxpr, without compiling anything

float32 sums and products round as IEEE says, without the fused multiply-adds of a compiler; contractions are summed in
an order of their own, and transcendental functions are NumPy's, so that floats agree with JAX's to rounding only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from qcompiler.debug.reference import contractions
from qcompiler.debug.reference.contract import dequantize, quantize
from qcompiler.debug.reference.values import read
from qcompiler.debug.reference.views import VIEWS, move
from qcompiler.ir import _compat


def simulate(eqn: Any, operands: Sequence[Any]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The body of one region on its operands.

    Args:
      eqn: the region equation.
      operands: one array per operand, codes and weights alike.

    Returns:
      (results, the accumulators that the body turns into reals).
    """
    accumulators: list[np.ndarray] = []

    def watch(inner: Any, values: list[Any]) -> None:
        if inner.primitive.name == "qc_dequantize" and inner.params["type"].bits == 32:
            accumulators.append(values[0])

    return evaluate_floats(eqn.params["body"], operands, watch), accumulators


def evaluate_floats(
    jaxpr: Any, args: Sequence[Any], watch: Callable[[Any, list[Any]], None] | None = None
) -> list[np.ndarray]:
    """The results of a jaxpr.

    Args:
      jaxpr: open or closed.
      args: one array per argument.
      watch: called with every equation and the values it reads.
    """
    body = _compat.open_jaxpr(jaxpr)
    env: dict[Any, Any] = dict(zip(_compat.constvars_of(jaxpr), map(np.asarray, _compat.consts_of(jaxpr)), strict=True))
    env.update(zip(_compat.invars_of(jaxpr), map(np.asarray, args), strict=True))
    with np.errstate(all="ignore"):
        for eqn in body.eqns:
            values = [read(env, v) for v in eqn.invars]
            if watch is not None:
                watch(eqn, values)
            env.update(zip(eqn.outvars, _results(eqn, values, watch), strict=True))
    return [read(env, v) for v in body.outvars]


def _results(eqn: Any, values: list[Any], watch: Any) -> list[np.ndarray]:
    called = eqn.params.get(_compat.CALL_JAXPR_PARAM.get(eqn.primitive, ""))
    if eqn.primitive.name == "qc_region":
        called = eqn.params["body"]
    if called is not None:
        return evaluate_floats(called, values, watch)
    name = eqn.primitive.name
    if name in VIEWS:
        found = move(name, eqn.params, values[0], values[1:])
    elif name in _ELEMENTWISE:
        found = _ELEMENTWISE[name](*values)
    elif name in _RULES:
        found = _RULES[name](eqn.params, *values)
    else:
        # What has no rule here is JAX's, which compiles it.
        return [np.asarray(r) for r in _compat.bind(eqn, values)]
    found = found if isinstance(found, list) else [found]
    return [np.asarray(r).astype(v.aval.dtype, copy=False) for r, v in zip(found, eqn.outvars, strict=True)]


def _divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Of integers towards zero."""
    return a / b if a.dtype.kind == "f" else np.trunc(a / b)


def _round(params: dict[str, Any], x: np.ndarray) -> np.ndarray:
    to_even = int(params["rounding_method"]) == 1
    return np.rint(x) if to_even else np.trunc(x + np.copysign(np.asarray(0.5, x.dtype), x))


def _select(which: np.ndarray, *cases: np.ndarray) -> np.ndarray:
    return np.choose(np.broadcast_to(which, cases[0].shape).astype(np.int64), cases)


def _reduce(choose: Any) -> Callable[..., np.ndarray]:
    return lambda params, x: choose(x, axis=tuple(params["axes"]))


def _cumulative(choose: Any) -> Callable[..., np.ndarray]:
    def apply(params: dict[str, Any], x: np.ndarray) -> np.ndarray:
        x = np.flip(x, params["axis"]) if params["reverse"] else x
        found = choose(x, axis=params["axis"])
        return np.flip(found, params["axis"]) if params["reverse"] else found

    return apply


def _split(params: dict[str, Any], x: np.ndarray) -> list[np.ndarray]:
    return np.split(x, np.cumsum(params["sizes"])[:-1], axis=params["axis"])


_erf = np.vectorize(math.erf, otypes=[np.float64])
_erfc = np.vectorize(math.erfc, otypes=[np.float64])

_ELEMENTWISE: dict[str, Callable[..., Any]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": _divide,
    "rem": np.fmod,
    "neg": np.negative,
    "max": np.maximum,
    "min": np.minimum,
    "clamp": lambda low, x, high: np.minimum(np.maximum(x, low), high),
    "abs": np.abs,
    "sign": np.sign,
    "square": np.square,
    "exp": np.exp,
    "exp2": np.exp2,
    "expm1": np.expm1,
    "log": np.log,
    "log1p": np.log1p,
    "tanh": np.tanh,
    "sin": np.sin,
    "cos": np.cos,
    "logistic": lambda x: 1 / (1 + np.exp(-x)),
    "erf": lambda x: _erf(x) if x.size else x,
    "erfc": lambda x: _erfc(x) if x.size else x,
    "sqrt": np.sqrt,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "cbrt": np.cbrt,
    "pow": np.power,
    "floor": np.floor,
    "ceil": np.ceil,
    "is_finite": np.isfinite,
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "not": np.invert,
    "select_n": _select,
    "copy_p": lambda x: x,
    "stop_gradient": lambda x: x,
}

#: rule(parameters, *values) -> the result, or the results
_RULES: dict[str, Callable[..., Any]] = {
    "convert_element_type": lambda params, x: x.astype(params["new_dtype"]),
    "name": lambda params, x: x,
    "integer_pow": lambda params, x: np.power(x, np.asarray(params["y"], x.dtype)),
    "round": _round,
    "pad": lambda params, x, fill: contractions.spread_and_pad(x, params["padding_config"], fill),
    "concatenate": lambda params, *xs: np.concatenate(xs, axis=params["dimension"]),
    "split": _split,
    "iota": lambda params: np.broadcast_to(
        np.arange(params["shape"][params["dimension"]], dtype=params["dtype"]).reshape(
            [-1 if d == params["dimension"] else 1 for d in range(len(params["shape"]))]
        ),
        params["shape"],
    ),
    "dot_general": lambda params, a, b: contractions.dot(a, b, params),
    "conv_general_dilated": lambda params, image, kernel: contractions.conv(image, kernel, params),
    "reduce_sum": _reduce(np.sum),
    "reduce_prod": _reduce(np.prod),
    "reduce_and": _reduce(np.all),
    "reduce_or": _reduce(np.any),
    "cumsum": _cumulative(np.cumsum),
    "argmax": lambda params, x: np.argmax(x, params["axes"][0]),
    "argmin": lambda params, x: np.argmin(x, params["axes"][0]),
    "reduce_window_sum": lambda params, x: contractions.window(params, x, np.add, 0),
    "qc_quantize": lambda params, x, scale, zero: quantize(x, scale, zero, params["type"]),
    "qc_dequantize": lambda params, q, scale, zero: dequantize(q, scale, zero),
    "qc_observe": lambda params, x: x,
}
