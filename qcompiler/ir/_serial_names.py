"""What a file can name: the tables of primitives, classes and dtypes behind `serialize`, read by both directions."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from qcompiler.ir import _compat

#: Filled by `serialize.register_primitives`.
PRIMITIVES: dict[str, _compat.Primitive] = {}
#: Filled by `serialize.register_classes`.
CLASSES: dict[str, type] = {}
DTYPES = {
    np.dtype(getattr(jnp, name)).name: np.dtype(getattr(jnp, name))
    for name in (
        "bool_ int2 int4 int8 int16 int32 int64 uint2 uint4 uint8 uint16 uint32 uint64 float16 float32 float64 bfloat16"
        " float4_e2m1fn float8_e3m4 float8_e4m3 float8_e4m3b11fnuz float8_e4m3fn float8_e4m3fnuz float8_e5m2"
        " float8_e5m2fnuz float8_e8m0fnu complex64 complex128"
    ).split()
    if hasattr(jnp, name)
}
#: Public in `jax.lax`, but not (in every version) among `jax.extend.core.primitives`.
_LAX_ONLY = ("split_p", "mulhi_p", "tile_p", "optimization_barrier_p", "clz_p", "log2_p")


@functools.cache
def _library_primitives() -> dict[str, _compat.Primitive]:
    extra = (getattr(lax, name) for name in _LAX_ONLY if hasattr(lax, name))
    return _compat.primitives_by_name() | {p.name: p for p in extra}


def primitive(name: str) -> _compat.Primitive | None:
    """The primitive of that name: a registered one, else JAX's own."""
    return PRIMITIVES.get(name) or _library_primitives().get(name)


def fields(cls: Any) -> list[str]:
    """The fields of a dataclass or named tuple that its constructor takes."""
    if hasattr(cls, "_fields"):
        return list(cls._fields)
    return [f.name for f in dataclasses.fields(cls) if f.init]
