"""Tables: the body of a region at every code of its index, JAX evaluating op by op, then looked up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from qcompiler.debug.reference.contract import dequantize, quantize
from qcompiler.debug.reference.values import KNOWN_ROLES, read
from qcompiler.ir import _compat


def table(eqn: Any, body: Any, operands: Sequence[Any]) -> list[np.ndarray]:
    """The body at every code of the index, JAX evaluating op by op, then looked up."""
    index_at = next(k for k, role in enumerate(eqn.params["roles"]) if role not in KNOWN_ROLES)
    entry = next(e for e in body.eqns if e.primitive.name == "qc_dequantize")
    qtype = entry.params["type"]
    codes = np.arange(qtype.qmin, qtype.qmax + 1).astype(qtype.dtype)
    env = {v: codes if k == index_at else np.asarray(operands[k]) for k, v in enumerate(body.invars)}
    for inner in body.eqns:
        values = [read(env, v) for v in inner.invars]
        env[inner.outvars[0]] = _at_codes(inner, values, codes.shape)
    position = np.asarray(operands[index_at]).astype(np.int64) - qtype.qmin
    return [np.asarray(env[v])[position].astype(o.aval.dtype) for v, o in zip(body.outvars, eqn.outvars, strict=True)]


def _at_codes(eqn: Any, values: list[Any], shape: tuple[int, ...]) -> Any:
    name = eqn.primitive.name
    values = [np.asarray(v).reshape(()) if np.size(v) == 1 else np.asarray(v) for v in values]
    if name == "qc_quantize":
        return quantize(*values, eqn.params["type"])
    if name == "qc_dequantize":
        return dequantize(*values)
    if name in ("broadcast_in_dim", "reshape", "squeeze", "expand_dims"):
        return values[0]
    if any(v.ndim for v in values):
        values = [np.broadcast_to(v, shape) for v in values]
    return np.asarray(_compat.bind(eqn, values)[0])
