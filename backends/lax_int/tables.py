"""A region that computes any function of one stored value: evaluated now for every code, looked up at run time."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qcompiler.backends.lax_int.values import Int
from qcompiler.errors import QuantizationError
from qcompiler.ir import _compat, identity
from qcompiler.numerics.types import QuantType


def lower_table(context: Any, body: Any, operands: list[Any]) -> list[Int]:
    """The results of a table region.

    Args:
      context: `rules.Context`.
      body: dequantize, then elementwise equations with numbers, then a quantize per result.
      operands: values of the body's arguments; exactly one is `Int`: the index.
    """
    jaxpr = _compat.open_jaxpr(body)
    entry = next(e for e in jaxpr.eqns if e.primitive.name == "qc_dequantize")
    index_type: QuantType = entry.params["type"]
    codes = np.arange(index_type.qmin, index_type.qmax + 1, dtype=index_type.dtype)
    index = next(v for v in operands if isinstance(v, Int))
    env: dict[Any, Any] = {
        var: codes if isinstance(value, Int) else value.value for var, value in zip(jaxpr.invars, operands, strict=True)
    }
    with jax.ensure_compile_time_eval():
        for eqn in jaxpr.eqns:
            env[eqn.outvars[0]] = _pointwise(eqn, [_read(env, v) for v in eqn.invars], codes.shape)
    position = lax.sub_p.bind(lax.convert_element_type(index.x, jnp.int32), np.int32(index_type.qmin))
    results = []
    for k, var in enumerate(jaxpr.outvars):
        table = np.asarray(env[var])
        held = context.weight(context.name(f"table/{k}"), table)
        low, high = np.int64(table.min()), np.int64(table.max())
        results.append(Int(_look_up(held, position), low, high))
    return results


def _look_up(table: Any, position: Any) -> Any:
    numbers = lax.GatherDimensionNumbers(offset_dims=(), collapsed_slice_dims=(0,), start_index_map=(0,))
    return lax.gather(
        table, lax.expand_dims(position, (position.ndim,)), numbers, (1,), mode=lax.GatherScatterMode.PROMISE_IN_BOUNDS
    )


def _read(env: dict[Any, Any], atom: Any) -> Any:
    return atom.val if isinstance(atom, _compat.Literal) else env[atom]


def _pointwise(eqn: _compat.JaxprEqn, values: list[Any], shape: tuple[int, ...]) -> Any:
    """An elementwise equation on all codes at once; numbers may be broadcast or reshaped on the way."""
    if all(np.ndim(v) == 0 or np.size(v) == 1 for v in values):
        number = jnp.reshape(jnp.asarray(values[0]), ())
        if eqn.primitive.name in ("broadcast_in_dim", "reshape", "squeeze", "expand_dims"):
            return number
        values = [jnp.reshape(jnp.asarray(v), ()) for v in values]
        return _compat.bind(eqn, values)[0]
    spread = [
        jnp.broadcast_to(jnp.reshape(jnp.asarray(v), ()) if np.size(v) == 1 else jnp.asarray(v), shape) for v in values
    ]
    if eqn.primitive.name in ("broadcast_in_dim", "reshape"):
        raise QuantizationError(f"{identity.describe(eqn)} changes the shape inside a table region")
    return _compat.bind(eqn, spread)[0]
