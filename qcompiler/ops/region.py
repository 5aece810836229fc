"""`region`: a part of a program that becomes one integer op, carried as one equation.

    y = region[id=block1/conv1/conv_general_dilated#0 kind=conv]{ conv x w; add bias; max 0 } x w b

Evaluating the body is the meaning of the equation at every stage: float before `fuse`, integers to integers after it.
A backend replaces the whole equation by its own integers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from qcompiler.ir import _compat, replay

region_p = Primitive("qc_region")
region_p.multiple_results = True


def region(
    fun: Callable[..., Sequence[Any]], *operands: Any, id: str, kind: str, roles: tuple[str, ...]
) -> list[jax.Array]:
    """One region equation with body `fun(*operands) -> results`.

    Args:
      fun: traced at the operands' shapes; must not close over arrays.
      *operands: what the body reads.
      id: the region's value id.
      kind: `dot`, `conv`, `reduce`, `linear`, `table` or `view`; see `passes.partition`.
      roles: what each operand is to the region; same length as `operands`.
    """
    avals = [jax.ShapeDtypeStruct(jax.typeof(x).shape, jax.typeof(x).dtype) for x in operands]
    body = jax.make_jaxpr(lambda *args: list(fun(*args)))(*avals)
    if _compat.consts_of(body):
        raise AssertionError(f"the body of region {id} closes over an array")
    return region_p.bind(*operands, id=id, kind=kind, roles=roles, body=body)


def _call(*args: Any, body: Any, **_: Any) -> list[Any]:
    return jax.core.eval_jaxpr(_compat.open_jaxpr(body), _compat.consts_of(body), *args)


def _impl(*args: Any, body: Any, **_: Any) -> list[Any]:
    return replay.evaluate(body, args, keep_source=False)


def _abstract(*avals: Any, body: Any, **_: Any) -> list[Any]:
    return [v.aval for v in _compat.open_jaxpr(body).outvars]


def _batch(args: Any, dims: Any, *, body: Any, **params: Any) -> Any:
    def mapped(*operands: Any) -> list[Any]:
        return jax.vmap(lambda *xs: _call(*xs, body=body), in_axes=tuple(dims), out_axes=0)(*operands)

    avals = [jax.ShapeDtypeStruct(jax.typeof(x).shape, jax.typeof(x).dtype) for x in args]
    batched = jax.make_jaxpr(mapped)(*avals)
    outs = region_p.bind(*args, body=batched, **params)
    return outs, [0] * len(outs)


def _jvp(primals: Any, tangents: Any, *, body: Any, **_: Any) -> Any:
    tangents = [ad.instantiate_zeros(t) for t in tangents]
    return jax.jvp(lambda *xs: _call(*xs, body=body), tuple(primals), tuple(tangents))


region_p.def_impl(_impl)
region_p.def_abstract_eval(_abstract)
mlir.register_lowering(region_p, mlir.lower_fun(_call, multiple_results=True))
batching.primitive_batchers[region_p] = _batch
ad.primitive_jvps[region_p] = _jvp
