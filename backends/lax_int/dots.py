"""Dots of int8 with an int32 result, with the two rows and columns for which XLA:CPU calls its kernel library."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax


def dot(lhs: Any, rhs: Any, dimension_numbers: Any) -> Any:
    """`lax.dot_general` of integers, int32 result.

    A matrix-vector product of int8 would be computed on int32 copies of its operands; a row or column of zeros makes it
    a product of matrices.
    """
    contract, batch = dimension_numbers
    free = [_free(x, *used) for x, used in zip((lhs, rhs), zip(contract, batch, strict=True), strict=True)]
    padded = [lhs, rhs]
    if lhs.dtype == rhs.dtype == jnp.int8:
        padded = [_two(x, dims) for x, dims in zip(padded, free, strict=True)]
    out = lax.dot_general(*padded, dimension_numbers, preferred_element_type=jnp.int32)
    wanted = [lhs.shape[d] for d in batch[0]] + [
        x.shape[d] for x, dims in zip((lhs, rhs), free, strict=True) for d in dims
    ]
    return out if list(out.shape) == wanted else lax.slice(out, [0] * len(wanted), wanted)


def _two(x: Any, free: Sequence[int]) -> Any:
    """`x` with a second row of zeros if its free dimensions are there and all of size one."""
    if not free or any(x.shape[d] != 1 for d in free):
        return x
    config = [(0, int(d == free[-1]), 0) for d in range(x.ndim)]
    return lax.pad(x, jnp.zeros((), x.dtype), config)


def _free(x: Any, contract: Sequence[int], batch: Sequence[int]) -> list[int]:
    return [d for d in range(x.ndim) if d not in contract and d not in batch]
