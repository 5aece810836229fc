"""Sums of the codes of one operand over what a product contracts, laid out against the product's result.

dot [m, k] [k, n]        -> [m, 1]               sums of rows
conv NHWC, HWIO          -> [n, h', w', 1]       sums of windows; of a kernel [o]
"""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from qcompiler.ir import _compat


def contracted_sums(anchor: _compat.JaxprEqn, codes: Any, k: int) -> Any:
    """int32 sums of operand `k`, of the rank of the result, with size one where they are all the same.

    Args:
      anchor: `dot_general` or `conv_general_dilated`.
      codes: the operand's integers; a conv's image (`k` = 0) already padded and dilated.
      k: which operand.
    """
    if anchor.primitive.name == "dot_general":
        return _rows(anchor, codes, k)
    return _windows(anchor, codes) if k == 0 else _kernels(anchor, codes)


def _rows(anchor: _compat.JaxprEqn, codes: Any, k: int) -> Any:
    contract, batch = (dims[k] for dims in anchor.params["dimension_numbers"])
    rest = [d for d in range(codes.ndim) if d not in contract]
    free = [d for d in rest if d not in batch]
    sums = jnp.sum(codes, axis=tuple(contract), dtype=jnp.int32)
    sums = sums.transpose([rest.index(d) for d in (*batch, *free)])
    ones = (1,) * (anchor.outvars[0].aval.ndim - sums.ndim)
    before, after = ((), ones) if k == 0 else (ones, ())
    return sums.reshape(sums.shape[: len(batch)] + before + sums.shape[len(batch) :] + after)


def _kernels(anchor: _compat.JaxprEqn, codes: Any) -> Any:
    numbers = anchor.params["dimension_numbers"]
    sums = jnp.sum(codes, axis=numbers.rhs_spec[1:], dtype=jnp.int32)
    return sums.reshape([-1 if d == numbers.out_spec[1] else 1 for d in range(codes.ndim)])


def _windows(anchor: _compat.JaxprEqn, codes: Any) -> Any:
    """A window's sum is separable: over channels first, then along one spatial dimension after the other."""
    params, numbers = anchor.params, anchor.params["dimension_numbers"]
    kernel, groups = anchor.invars[1].aval.shape, params["feature_group_count"]
    channel = numbers.lhs_spec[1]
    shape = codes.shape[:channel] + (groups, codes.shape[channel] // groups) + codes.shape[channel + 1 :]
    sums = jnp.sum(codes.reshape(shape), axis=channel + 1, dtype=jnp.int32)
    steps = zip(
        numbers.lhs_spec[2:], numbers.rhs_spec[2:], params["window_strides"], params["rhs_dilation"], strict=True
    )
    for dim, kernel_dim, stride, spread in steps:
        size = kernel[kernel_dim]
        reach = (sums.shape[dim] - (size - 1) * spread - 1) // stride * stride + 1
        cuts = [lax.slice_in_dim(sums, j * spread, j * spread + reach, stride, dim) for j in range(size)]
        sums = functools.reduce(lax.add, cuts)
    sums = sums.transpose(numbers.lhs_spec)
    features = kernel[numbers.rhs_spec[0]] // groups
    if groups > 1 and features > 1:
        batch, _, *spatial = sums.shape
        spread_out = lax.broadcast_in_dim(
            sums, (batch, groups, features, *spatial), [d for d in range(len(spatial) + 3) if d != 2]
        )
        sums = spread_out.reshape(batch, groups * features, *spatial)
    return sums.transpose([int(d) for d in np.argsort(numbers.out_spec)])
