"""Dots and convs: how the dimensions of an operand lie in the result, and what one element of the result costs."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from qcompiler.ir import _compat


def weight_dims(eqn: _compat.JaxprEqn, weight: int) -> dict[int, int]:
    """Dimension of the result -> dimension of the weight operand it comes from, for a dot or conv.

    Args:
      eqn: `dot_general` or `conv_general_dilated`.
      weight: position of the weight operand, 0 or 1 (1 for a conv).
    """
    if eqn.primitive.name == "conv_general_dilated":
        numbers = eqn.params["dimension_numbers"]
        return {numbers.out_spec[1]: numbers.rhs_spec[0]}
    (lhs_contract, rhs_contract), (lhs_batch, rhs_batch) = eqn.params["dimension_numbers"]
    contract, batch = ((lhs_contract, lhs_batch), (rhs_contract, rhs_batch))[weight]
    free = [d for d in range(eqn.invars[weight].aval.ndim) if d not in contract and d not in batch]
    other = eqn.invars[1 - weight].aval.ndim
    start = len(batch) if weight == 0 else len(batch) + other - len(contract) - len(batch)
    return {k: d for k, d in enumerate(batch)} | {start + k: d for k, d in enumerate(free)}


def on_weight(array: np.ndarray, eqn: _compat.JaxprEqn, weight: int) -> np.ndarray | None:
    """An array that broadcasts against the result, laid out to multiply the weight instead; None if it cannot."""
    rank = eqn.outvars[0].aval.ndim
    array = np.asarray(array)
    array = array.reshape((1,) * (rank - array.ndim) + array.shape)
    dims = weight_dims(eqn, weight)
    if any(n > 1 and k not in dims for k, n in enumerate(array.shape)):
        return None
    shape = [1] * eqn.invars[weight].aval.ndim
    for k, d in dims.items():
        shape[d] = array.shape[k]
    order = [k for _, k in sorted((d, k) for k, d in dims.items())]
    rest = [k for k in range(rank) if k not in dims]
    return array.transpose(*rest, *order).reshape(shape)


def from_operand(array: np.ndarray, eqn: _compat.JaxprEqn, weight: int) -> np.ndarray | None:
    """An array that broadcasts against the other operand, laid out to multiply the weight instead; None if it cannot.

    It can where it varies only along dimensions that the weight shares: contracted ones, a dot's batch dimensions, and
    the channels of a conv (in groups: each output channel meets those of its own group).
    """
    rank = eqn.invars[1 - weight].aval.ndim
    array = np.asarray(array)
    array = array.reshape((1,) * (rank - array.ndim) + array.shape)
    if eqn.primitive.name == "conv_general_dilated":
        numbers, kernel = eqn.params["dimension_numbers"], eqn.invars[1].aval
        channel, (features, depth) = numbers.lhs_spec[1], numbers.rhs_spec[:2]
        if eqn.params["batch_group_count"] != 1 or any(n > 1 for k, n in enumerate(array.shape) if k != channel):
            return None
        groups = eqn.params["feature_group_count"]
        own = np.broadcast_to(array.reshape(-1), eqn.invars[0].aval.shape[channel : channel + 1]).reshape(groups, -1)
        own = np.repeat(own, kernel.shape[features] // groups, axis=0)
        shape = [1] * kernel.ndim
        shape[features], shape[depth] = own.shape
        return (own if features < depth else own.T).reshape(shape)
    contract, batch = eqn.params["dimension_numbers"]
    shared = dict(zip((*contract[1 - weight], *batch[1 - weight]), (*contract[weight], *batch[weight]), strict=True))
    if any(n > 1 and k not in shared for k, n in enumerate(array.shape)):
        return None
    shape = [1] * eqn.invars[weight].aval.ndim
    for k, d in shared.items():
        shape[d] = array.shape[k]
    rest = [k for k in range(rank) if k not in shared]
    return array.transpose(*rest, *sorted(shared, key=shared.__getitem__)).reshape(shape)


def channel_dims(anchor: _compat.JaxprEqn, weight: int) -> tuple[int, ...]:
    """Dimensions of the weight that reach the result, each with scales of its own when quantized per channel."""
    return tuple(sorted(weight_dims(anchor, weight).values()))


def contracted_dims(anchor: _compat.JaxprEqn, weight: int) -> tuple[int, ...]:
    """Dimensions of the weight that a dot or conv sums over: input channels of a conv first, others from the last."""
    kept = channel_dims(anchor, weight)
    dims = [d for d in reversed(range(anchor.invars[weight].aval.ndim)) if d not in kept]
    if anchor.primitive.name == "conv_general_dilated":
        depth = anchor.params["dimension_numbers"].rhs_spec[1]
        dims = [depth, *(d for d in dims if d != depth)]
    return tuple(dims)


def on_result(array: np.ndarray, anchor: _compat.JaxprEqn, weight: int) -> np.ndarray:
    """An array over the weight's channel dimensions (others of size one), laid out to broadcast against the result."""
    if array.ndim == 0:
        return array
    dims = weight_dims(anchor, weight)
    shape = [array.shape[dims[k]] if k in dims else 1 for k in range(anchor.outvars[0].aval.ndim)]
    order = [dims[k] for k in sorted(dims)]
    rest = [d for d in range(array.ndim) if d not in order]
    return array.transpose(*rest, *order).reshape(shape)


def pads(eqn: _compat.JaxprEqn) -> bool:
    """Whether zeros stand beside or between the elements that a conv reads; False for a dot."""
    if eqn.primitive.name != "conv_general_dilated":
        return False
    return any(map(any, eqn.params["padding"])) or any(n > 1 for n in eqn.params["lhs_dilation"])


def depth(eqn: _compat.JaxprEqn) -> int:
    """The number of products behind one element of the result."""
    kernel = eqn.invars[1].aval.shape
    if eqn.primitive.name == "conv_general_dilated":
        return int(np.prod(kernel)) // kernel[eqn.params["dimension_numbers"].rhs_spec[0]]
    (contract, _), _ = eqn.params["dimension_numbers"]
    return int(np.prod([eqn.invars[0].aval.shape[d] for d in contract]))


def integer_product(primitive: str, params: dict[str, Any], lhs: Any, rhs: Any) -> Any:
    """The dot or conv with an equation's parameters on integers, int32 result."""
    if primitive == "dot_general":
        return lax.dot_general(lhs, rhs, params["dimension_numbers"], preferred_element_type=jnp.int32)
    names = ("window_strides", "padding", "lhs_dilation", "rhs_dilation", "dimension_numbers")
    names += ("feature_group_count", "batch_group_count")
    chosen = {name: params[name] for name in names}
    return lax.conv_general_dilated(lhs, rhs, **chosen, preferred_element_type=jnp.int32)
