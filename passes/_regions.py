"""Reading region equations: their anchor, their roles, and how a weight's dimensions lie in the result."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from qcompiler import ops
from qcompiler.ir import _compat, classes
from qcompiler.passes import _affine


def is_region(eqn: _compat.JaxprEqn) -> bool:
    """Whether the equation is a region."""
    return eqn.primitive is ops.region_p


def anchor_of(eqn: _compat.JaxprEqn) -> _compat.JaxprEqn | None:
    """The product or sum in the body of a region, or None."""
    body = _compat.open_jaxpr(eqn.params["body"])
    if eqn.params["kind"] not in ("dot", "conv", "reduce"):
        return None
    return next((e for e in body.eqns if e.primitive.name in classes.ANCHOR), None)


def operand_index(eqn: _compat.JaxprEqn, atom: Any) -> int | None:
    """The operand of the region that a variable of its body is, or None."""
    invars = _compat.invars_of(eqn.params["body"])
    return next((k for k, v in enumerate(invars) if v is atom), None)


def weight_position(eqn: _compat.JaxprEqn) -> int | None:
    """Which operand (0 or 1) of the anchor is the constant weight; None if there is none."""
    anchor = anchor_of(eqn)
    if anchor is None or anchor.primitive.name not in classes.PRODUCT:
        return None
    for position in (1, 0):
        k = operand_index(eqn, anchor.invars[position])
        if k is not None and eqn.params["roles"][k] == "weight":
            return position
    return None


def channel_dims(anchor: _compat.JaxprEqn, weight: int) -> tuple[int, ...]:
    """Dimensions of the weight that reach the result, each with scales of its own when quantized per channel."""
    return tuple(sorted(_affine.weight_dims(anchor, weight).values()))


def on_result(array: np.ndarray, anchor: _compat.JaxprEqn, weight: int) -> np.ndarray:
    """An array over the weight's channel dimensions (others of size one), laid out to broadcast against the result."""
    if array.ndim == 0:
        return array
    dims = _affine.weight_dims(anchor, weight)
    shape = [array.shape[dims[k]] if k in dims else 1 for k in range(anchor.outvars[0].aval.ndim)]
    order = [dims[k] for k in sorted(dims)]
    rest = [d for d in range(array.ndim) if d not in order]
    return array.transpose(*rest, *order).reshape(shape)


def accumulator_scale(eqn: _compat.JaxprEqn, scales: dict[int, np.ndarray]) -> np.ndarray:
    """Scale of the int32 accumulator of a region's product or sum, float32, broadcastable to its result.

    Args:
      eqn: a region with an anchor.
      scales: operand of the region -> its scale.
    """
    anchor, position = anchor_of(eqn), weight_position(eqn)
    product = np.float32(1)
    for k, atom in enumerate(anchor.invars):
        scale = np.asarray(scales[operand_index(eqn, atom)])
        product = product * (on_result(scale, anchor, k) if k == position else scale)
    return np.asarray(product, np.float32)


def integer_product(eqn: _compat.JaxprEqn, lhs: Any, rhs: Any, **changes: Any) -> Any:
    """The dot or conv of an equation on integers, int32 result; `changes` override parameters of a conv."""
    params = {**eqn.params, **changes}
    if eqn.primitive.name == "dot_general":
        return lax.dot_general(lhs, rhs, params["dimension_numbers"], preferred_element_type=jnp.int32)
    return lax.conv_general_dilated(
        lhs,
        rhs,
        window_strides=params["window_strides"],
        padding=params["padding"],
        lhs_dilation=params["lhs_dilation"],
        rhs_dilation=params["rhs_dilation"],
        dimension_numbers=params["dimension_numbers"],
        feature_group_count=params["feature_group_count"],
        batch_group_count=params["batch_group_count"],
        preferred_element_type=jnp.int32,
    )
