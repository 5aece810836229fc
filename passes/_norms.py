"""Reading inference norms: the standard deviation behind a constant that was computed from one."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from qcompiler.ir import _compat, classes
from qcompiler.ir.constants import Constants
from qcompiler.ir.program import Program

#: Change where the elements of a constant lie, or how many bits hold them.
_SAME = classes.VIEW | classes.IDENTITY | {"convert_element_type"}


def deviation_of(program: Program, constants: Constants, var: Any) -> np.ndarray | None:
    """The standard deviation that a constant is computed from, of the constant's shape; None if there is none.

    It is `sqrt(v)` in `sqrt(v)`, `rsqrt(v)`, `v ** -0.5`, and in their products with and quotients of other constants.
    """
    eqn = program.producer.get(var)
    if eqn is None or var not in constants or not classes.is_float(var):
        return None
    name = eqn.primitive.name
    if name == "sqrt":
        return np.asarray(constants.value(var)).astype(np.float64)
    halves = name == "pow" and constants.uniform(eqn.invars[1]) == -0.5
    if name == "rsqrt" or halves:
        return 1.0 / np.asarray(constants.value(var)).astype(np.float64)
    found = [None if isinstance(v, _compat.Literal) else deviation_of(program, constants, v) for v in eqn.invars]
    if name in ("mul", "div") and sum(d is not None for d in found) == 1:
        return np.broadcast_to(next(d for d in found if d is not None), var.aval.shape)
    if name in _SAME and len(found) == 1 and found[0] is not None:
        with jax.ensure_compile_time_eval():
            (moved,) = _compat.bind(eqn, [jax.numpy.asarray(found[0], eqn.invars[0].aval.dtype)])
        return np.asarray(moved).astype(np.float64)
    return None
