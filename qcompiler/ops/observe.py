"""`observe`: the identity, marking a value whose range calibration wants to know.

Run as part of a program it does nothing; `passes.observe` reads the values at these marks.
"""

from __future__ import annotations

from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

observe_p = Primitive("qc_observe")


def observe(x: jax.Array, id: str) -> jax.Array:
    """Marks `x` as the value `id`; returns it unchanged."""
    return observe_p.bind(x, id=id)


def _batch(args: Any, dims: Any, *, id: str) -> Any:
    return observe_p.bind(*args, id=id), dims[0]


def _jvp(primals: Any, tangents: Any, *, id: str) -> Any:
    return observe_p.bind(*primals, id=id), tangents[0]


observe_p.def_impl(lambda x, *, id: x)
observe_p.def_abstract_eval(lambda x, *, id: x)
mlir.register_lowering(observe_p, mlir.lower_fun(lambda x, *, id: x, multiple_results=False))
batching.primitive_batchers[observe_p] = _batch
ad.primitive_jvps[observe_p] = _jvp
