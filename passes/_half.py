"""Regions that are computed in another float dtype than the model's: cast in, cast out, weights stored in it.

y = region{ conv x w; add b } x w b     ->     y = region{ f32(add (conv bf16(x) w) b) } x bf16(w) bf16(b)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qcompiler import ops
from qcompiler.errors import RecipeError
from qcompiler.ir import _compat, classes, replay
from qcompiler.ir.constants import Constants
from qcompiler.ir.program import Builder, Program, rewrite

#: Parameters of primitives that name the dtype of a result.
_DTYPES = ("new_dtype", "dtype", "preferred_element_type")


def computed_in(program: Program, dtypes: Mapping[str, str]) -> Program:
    """The program with some regions computed in other floats.

    Args:
      program: partitioned.
      dtypes: region id -> `float32`, `bfloat16` or `float16`.

    Raises:
      RecipeError: a weight, or a value that calibration saw, is beyond the largest number of its dtype.
    """
    if not dtypes:
        return program
    constants = Constants(program)

    def rule(builder: Builder, eqn: _compat.JaxprEqn, values: list[Any]) -> Sequence[Any] | None:
        dtype = dtypes.get(eqn.params.get("id", "")) if eqn.primitive is ops.region_p else None
        if dtype is None:
            return None
        _check_fits(program, constants, eqn, dtype)
        operands = [
            builder.weight(f"{program.ids[v]}:{dtype}", np.asarray(constants.value(v)).astype(jnp.dtype(dtype)))
            if v in constants and classes.is_float(v)
            else x
            for v, x in zip(eqn.invars, values, strict=True)
        ]
        kept = {k: eqn.params[k] for k in ("id", "kind", "roles")}
        return ops.region(lambda *args: _in_dtype(eqn, args, jnp.dtype(dtype)), *operands, **kept)

    return rewrite(program, rule, stage=program.stage)


def _in_dtype(eqn: _compat.JaxprEqn, args: Sequence[Any], dtype: Any) -> list[Any]:
    """The body with every real number in a dtype; its results in their own."""
    body = _compat.open_jaxpr(eqn.params["body"])

    def rule(inner: _compat.JaxprEqn, values: list[Any]) -> list[Any]:
        if any(True for _ in _compat.sub_jaxprs(inner)):
            # What has a body of its own says the dtypes in it: its numbers go in and out as they were.
            as_they_were = [_cast(_array(x, v), v.aval.dtype) for x, v in zip(values, inner.invars, strict=True)]
            return [_cast(x, dtype) for x in _compat.bind(inner, as_they_were)]
        params = {k: dtype for k in _DTYPES if _is_float(inner.params.get(k))}
        operands = [_cast(_array(x, v), dtype) for x, v in zip(values, inner.invars, strict=True)]
        results = inner.primitive.bind(*operands, **{**inner.params, **params})
        return list(results) if inner.primitive.multiple_results else [results]

    results = replay.evaluate(eqn.params["body"], [_cast(x, dtype) for x in args], rule)
    return [_cast(x, v.aval.dtype) for x, v in zip(results, body.outvars, strict=True)]


def _is_float(dtype: Any) -> bool:
    return dtype is not None and jax.dtypes.issubdtype(dtype, np.floating)


def _array(x: Any, atom: Any) -> Any:
    """A value, a literal's in the dtype that the literal has."""
    return jnp.asarray(x, atom.aval.dtype) if isinstance(atom, _compat.Literal) else x


def _cast(x: Any, dtype: Any) -> Any:
    """A real number in a dtype; anything else as it is."""
    return x.astype(dtype) if _is_float(jax.typeof(x).dtype) else x


def _check_fits(program: Program, constants: Constants, eqn: _compat.JaxprEqn, dtype: str) -> None:
    largest = float(jnp.finfo(jnp.dtype(dtype)).max)
    for var in (*eqn.invars, *eqn.outvars):
        if not isinstance(var, _compat.Var) or not classes.is_float(var):
            continue
        if var in constants:
            array = np.abs(np.asarray(constants.value(var), np.float64))
            seen = float(array[np.isfinite(array)].max(initial=0.0))
        else:
            stats = program.stats.get(program.ids[var])
            seen = max(-stats.min, stats.max) if stats is not None and stats.count else 0.0
        if seen > largest:
            raise RecipeError(
                f"{eqn.params['id']}: {program.ids[var]} reaches {seen:.3g}, and the largest {dtype} is {largest:.3g}; "
                "keep the layer in bfloat16 or float32"
            )
