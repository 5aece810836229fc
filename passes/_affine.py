"""Reading affine equations: what `a * x + b` an elementwise equation with one constant operand computes."""

from __future__ import annotations

from typing import Any

import numpy as np

from qcompiler.ir import _compat
from qcompiler.ir.constants import Constants


def affine_of(eqn: _compat.JaxprEqn, constants: Constants) -> tuple[Any, np.ndarray, np.ndarray] | None:
    """(x, a, b) such that the equation's result is a * x + b, in float64; None if it is nothing of the kind.

    `a` and `b` broadcast against the result.
    """
    name = eqn.primitive.name
    one, zero = np.float64(1), np.float64(0)
    if name == "neg" and eqn.invars[0] not in constants:
        return eqn.invars[0], -one, zero
    if name not in ("add", "sub", "mul", "div") or len(eqn.invars) != 2:
        return None
    left, right = eqn.invars
    if (left in constants) == (right in constants):
        return None
    x, held = (right, left) if left in constants else (left, right)
    if x.aval.shape != eqn.outvars[0].aval.shape or x.aval.dtype != eqn.outvars[0].aval.dtype:
        return None
    value = np.asarray(constants.value(held)).astype(np.float64)
    if name == "add":
        return x, one, value
    if name == "sub":
        return (x, one, -value) if x is left else (x, -one, value)
    if name == "mul":
        return x, value, zero
    return (x, one / value, zero) if x is left and np.all(value != 0) else None


def weight_dims(eqn: _compat.JaxprEqn, weight: int) -> dict[int, int]:
    """Dimension of the result -> dimension of the weight operand it comes from, for a dot or conv.

    Args:
      eqn: `dot_general` or `conv_general_dilated`.
      weight: position of the weight operand, 0 or 1 (1 for a conv).
    """
    if eqn.primitive.name == "conv_general_dilated":
        numbers = eqn.params["dimension_numbers"]
        return {numbers.out_spec[1]: numbers.rhs_spec[0]}
    (lhs_contract, rhs_contract), (lhs_batch, rhs_batch) = eqn.params["dimension_numbers"]
    contract, batch = ((lhs_contract, lhs_batch), (rhs_contract, rhs_batch))[weight]
    free = [d for d in range(eqn.invars[weight].aval.ndim) if d not in contract and d not in batch]
    other = eqn.invars[1 - weight].aval.ndim
    start = len(batch) if weight == 0 else len(batch) + other - len(contract) - len(batch)
    return {k: d for k, d in enumerate(batch)} | {start + k: d for k, d in enumerate(free)}


def on_weight(array: np.ndarray, eqn: _compat.JaxprEqn, weight: int) -> np.ndarray | None:
    """An array that broadcasts against the result, laid out to multiply the weight instead; None if it cannot."""
    rank = eqn.outvars[0].aval.ndim
    array = np.asarray(array)
    array = array.reshape((1,) * (rank - array.ndim) + array.shape)
    dims = weight_dims(eqn, weight)
    if any(n > 1 and k not in dims for k, n in enumerate(array.shape)):
        return None
    shape = [1] * eqn.invars[weight].aval.ndim
    for k, d in dims.items():
        shape[d] = array.shape[k]
    order = [k for _, k in sorted((d, k) for k, d in dims.items())]
    rest = [k for k in range(rank) if k not in dims]
    return array.transpose(*rest, *order).reshape(shape)
