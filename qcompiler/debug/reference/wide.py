"""Regions of general arithmetic, in float64: what software floating point must be near, within one step of the result.

This is no specification bit for bit: `numerics.soft_float` has 30 bits, float64 has 53, and they round apart where a
result lies next to the middle of two codes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qcompiler.ir import _compat, classes


def wide(
    body: Any, operands: Sequence[Any], disturb: Callable[[Any, np.ndarray], np.ndarray] | None = None
) -> list[np.ndarray]:
    """The results of a body, its codes from floor(x / scale + 1/2).

    Args:
      body: open jaxpr of a fused region.
      operands: one array per operand.
      disturb: `(equation, its real result) -> what to go on with`.
    """
    env: dict[Any, Any] = dict(zip(body.invars, map(np.asarray, operands), strict=True))
    with jax.enable_x64(True):
        for eqn in body.eqns:
            values = [np.asarray(v.val, v.aval.dtype) if isinstance(v, _compat.Literal) else env[v] for v in eqn.invars]
            result = np.asarray(_apply(eqn, values))
            env[eqn.outvars[0]] = disturb(eqn, result) if disturb and classes.is_float(eqn.outvars[0]) else result
        return [np.asarray(env[v]) for v in body.outvars]


def _apply(eqn: Any, values: list[np.ndarray]) -> Any:
    name = eqn.primitive.name
    if name == "qc_dequantize":
        q, scale, zero = values
        return (q.astype(np.int64) - zero) * scale.astype(np.float64)
    if name == "qc_quantize":
        x, scale, zero = values
        qtype = eqn.params["type"]
        with np.errstate(over="ignore"):
            steps = np.floor(np.nan_to_num(x) / scale.astype(np.float64) + 0.5)
        codes = np.clip(steps, -(2.0**30), 2.0**30).astype(np.int64) + zero
        return np.broadcast_to(np.clip(codes, qtype.qmin, qtype.qmax), eqn.outvars[0].aval.shape).astype(qtype.dtype)
    if classes.is_float_cast(eqn):
        return values[0]
    pairs = zip(eqn.invars, values, strict=True)
    reals = [jnp.asarray(v, np.float64 if classes.is_float(atom) else None) for atom, v in pairs]
    params = eqn.params
    if name == "convert_element_type" and classes.is_float(eqn.outvars[0]):
        params = {**params, "new_dtype": np.dtype(np.float64)}
    return eqn.primitive.bind(*reals, **params)
