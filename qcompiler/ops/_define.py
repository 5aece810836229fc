"""How an elementwise primitive of ours gets its rules from one JAX function of its operands."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir


def define(name: str, fun: Callable[..., Any]) -> Primitive:
    """A primitive `name` whose value is `fun(*operands, **params)`, with a shape rule, eager and lowering rules.

    `fun` is elementwise in operand 0; the other operands are numbers, or have its rank and broadcast to it.
    """
    primitive = Primitive(name)

    def abstract(*avals: Any, **params: Any) -> Any:
        out = jax.eval_shape(functools.partial(fun, **params), *(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in avals))
        return jax.core.ShapedArray(out.shape, out.dtype)

    primitive.def_abstract_eval(abstract)
    # Compiled per shape as a whole: one small program in place of one per step of `fun`.
    primitive.def_impl(lambda *args, **params: _compiled(fun, tuple(params.items()))(*args))
    mlir.register_lowering(primitive, mlir.lower_fun(fun, multiple_results=False))

    def batch(args: Any, dims: Any, **params: Any) -> Any:
        rank = max(jnp.ndim(a) - (d is not None) for a, d in zip(args, dims, strict=True))
        aligned = [_batched_first(a, d, rank) for a, d in zip(args, dims, strict=True)]
        if dims[0] is None:
            size = next(a.shape[d] for a, d in zip(args, dims, strict=True) if d is not None)
            aligned[0] = jnp.broadcast_to(args[0], (size, *jnp.shape(args[0])))
        return primitive.bind(*aligned, **_shift_axes(params)), 0

    batching.primitive_batchers[primitive] = batch
    return primitive


@functools.cache
def _compiled(fun: Callable[..., Any], params: tuple[tuple[str, Any], ...]) -> Callable[..., Any]:
    return jax.jit(functools.partial(fun, **dict(params)))


def _batched_first(x: Any, dim: Any, rank: int) -> Any:
    """The batch dimension comes first, of size one where there is none, then `rank` others; unmapped numbers stay."""
    if dim is None:
        return x[None] if jnp.ndim(x) else x
    x = jnp.moveaxis(x, dim, 0)
    return x.reshape(x.shape[0], *(1,) * (rank - x.ndim + 1), *x.shape[1:])


def _shift_axes(params: dict[str, Any]) -> dict[str, Any]:
    """Types name dimensions; a leading batch dimension moves them by one."""
    return {k: v.batched() if hasattr(v, "batched") else v for k, v in params.items()}
