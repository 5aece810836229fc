"""Reading affine equations: what `a * x + b` an elementwise equation with one constant operand computes."""

from __future__ import annotations

from typing import Any

import numpy as np

from qcompiler.ir import _compat
from qcompiler.ir.constants import Constants


def affine_of(
    eqn: _compat.JaxprEqn, constants: Constants, spreads: bool = False
) -> tuple[Any, np.ndarray, np.ndarray] | None:
    """(x, a, b) such that the equation's result is a * x + b, in float64; None if it is nothing of the kind.

    `a` and `b` broadcast against the result; x has its shape, or with `spreads` may be repeated along dimensions.
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
    if (x.aval.shape != eqn.outvars[0].aval.shape and not spreads) or x.aval.dtype != eqn.outvars[0].aval.dtype:
        return None
    value = np.asarray(constants.value(held)).astype(np.float64)
    if name == "add":
        return x, one, value
    if name == "sub":
        return (x, one, -value) if x is left else (x, -one, value)
    if name == "mul":
        return x, value, zero
    return (x, one / value, zero) if x is left and np.all(value != 0) else None
