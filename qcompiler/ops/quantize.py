"""`quantize`, `dequantize`, their float-to-float pair `fake_quantize`, and `requantize` between two integer types.

Scale and zero point are operands, so that stacked, learned or batched ones work; the type is a parameter. Integer codes
have no tangent, so only the pair has a derivative: straight-through, 1 inside the representable range and 0 outside
(clipped STE, Bengio et al. 2013). `insert_qdq` places pairs; `fuse` takes them apart.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.interpreters import ad

from qcompiler.numerics import fixed_point
from qcompiler.numerics.types import QuantType
from qcompiler.ops._define import define


def _quantize(x: Any, scale: Any, zero_point: Any, *, type: QuantType) -> Any:
    return fixed_point.quantize(x, scale, zero_point, type)


def _dequantize(q: Any, scale: Any, zero_point: Any, *, type: QuantType) -> Any:
    del type
    return fixed_point.dequantize(q, scale, zero_point)


def _requantize(q: Any, s_in: Any, z_in: Any, s_out: Any, z_out: Any, *, in_type: QuantType, type: QuantType) -> Any:
    del in_type
    return fixed_point.quantize(fixed_point.dequantize(q, s_in, z_in), s_out, z_out, type)


quantize_p = define("qc_quantize", _quantize)
dequantize_p = define("qc_dequantize", _dequantize)
requantize_p = define("qc_requantize", _requantize)


def quantize(x: jax.Array, scale: Any, zero_point: Any, qtype: QuantType) -> jax.Array:
    """Real `x` to integer codes of `qtype`; see `numerics.fixed_point.quantize`.

    Args:
      x: float array.
      scale: float32, scalar, or of the rank of `x` with size one where it is shared.
      zero_point: int32, likewise.
      qtype: the type of the result.
    """
    return quantize_p.bind(x, scale, zero_point, type=qtype)


def dequantize(q: jax.Array, scale: Any, zero_point: Any, qtype: QuantType) -> jax.Array:
    """Integer codes to float32: (q - zero_point) * scale."""
    return dequantize_p.bind(q, scale, zero_point, type=qtype)


def requantize(q: Any, s_in: Any, z_in: Any, s_out: Any, z_out: Any, in_type: QuantType, qtype: QuantType) -> jax.Array:
    """Codes of `in_type` to codes of `qtype`; the value a backend computes by a fixed-point multiplier."""
    return requantize_p.bind(q, s_in, z_in, s_out, z_out, in_type=in_type, type=qtype)


def fake_quantize(x: jax.Array, scale: Any, zero_point: Any, qtype: QuantType) -> jax.Array:
    """dequantize(quantize(x)): float in, float out, straight-through derivative."""
    return fake_quantize_p.bind(x, scale, zero_point, type=qtype)


def _fake_quantize(x: Any, scale: Any, zero_point: Any, *, type: QuantType) -> Any:
    return fixed_point.dequantize(fixed_point.quantize(x, scale, zero_point, type), scale, zero_point).astype(x.dtype)


fake_quantize_p = define("qc_fake_quantize", _fake_quantize)


def _fake_quantize_jvp(primals: Any, tangents: Any, *, type: QuantType) -> Any:
    x, scale, zero_point = primals
    out = fake_quantize_p.bind(x, scale, zero_point, type=type)
    t = tangents[0]
    if isinstance(t, ad.Zero):
        return out, t
    # Half a step more at each end: what rounds to the last code is inside.
    low = ((type.qmin - zero_point).astype(jnp.float32) - np.float32(0.5)) * scale
    high = ((type.qmax - zero_point).astype(jnp.float32) + np.float32(0.5)) * scale
    inside = lax.bitwise_and(x >= low, x <= high)
    return out, jnp.where(inside, t, jnp.zeros_like(t))


ad.primitive_jvps[fake_quantize_p] = _fake_quantize_jvp
