"""Windows that slide over an array: where they stand, the views of it that they see, and sums over them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

#: Up to this many elements a window is summed at once, beyond it dimension by dimension.
AT_ONCE = 32
#: A longer run of elements is summed by doubling.
LONG_RUN = 8


def count(size: int, window: int, stride: int = 1, spread: int = 1) -> int:
    """How many windows stand in `size` elements; their own elements are `spread` apart."""
    return max(0, (size - (window - 1) * spread - 1) // stride + 1)


def views(
    x: Any, dims: Sequence[int], window: Sequence[int], strides: Sequence[int], spread: Sequence[int]
) -> Iterator[tuple[tuple[int, ...], Any]]:
    """`(offset in the window, strided slice of x that every window sees there)`, the last offset fastest.

    Args:
      x: array; must hold one window at least.
      dims: the dimensions of `x` that the window slides over; all other arguments are per entry of it.
      window: elements of the window.
      strides: from one window to the next.
      spread: from one element of a window to the next.
    """
    counts = [count(x.shape[d], *rest) for d, *rest in zip(dims, window, strides, spread, strict=True)]
    for offset in itertools.product(*map(range, window)):
        start, limit, step = [0] * x.ndim, list(x.shape), [1] * x.ndim
        for d, k, n, stride, apart in zip(dims, offset, counts, strides, spread, strict=True):
            start[d] = k * apart
            limit[d] = k * apart + (n - 1) * stride + 1
            step[d] = stride
        yield offset, lax.slice(x, start, limit, step)


def pad(x: Any, dims: Sequence[int], padding: Sequence[tuple[int, int]], holes: Sequence[int] | None = None) -> Any:
    """`x` with zeros around (a negative number crops) and, per dimension, `holes` - 1 zeros between its elements."""
    config = [(0, 0, 0)] * x.ndim
    for d, (low, high), hole in zip(dims, padding, holes or [1] * len(dims), strict=True):
        config[d] = (low, high, hole - 1)
    return x if all(c == (0, 0, 0) for c in config) else lax.pad(x, np.zeros((), x.dtype), config)


def window_sum(
    x: Any,
    window_dimensions: Sequence[int],
    window_strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    base_dilation: Sequence[int] | None = None,
    window_dilation: Sequence[int] | None = None,
) -> Any:
    """`lax.reduce_window` with `lax.add` and 0, of integers, as shifted additions. int32, exact modulo 2**32.

    XLA:CPU runs its own window loop for `reduce_window`, several times slower than additions of slices, which
    vectorize and fuse with what comes before and after.

    Args:
      x: integer array; narrow codes are widened as they are added.
      window_dimensions: elements of the window, one entry per dimension of `x`, as is everything below.
      window_strides: from one window to the next.
      padding: zeros before and behind.
      base_dilation: `n` puts n - 1 zeros between elements of `x`; none by default.
      window_dilation: from one element of a window to the next; 1 by default.
    """
    rank = x.ndim
    spread = list(window_dilation or [1] * rank)
    x = pad(x, range(rank), padding, base_dilation)
    counts = [count(*rest) for rest in zip(x.shape, window_dimensions, window_strides, spread, strict=True)]
    if 0 in counts:
        return lax.full(counts, 0, jnp.int32)
    dims = [d for d in range(rank) if window_dimensions[d] > 1 or window_strides[d] > 1]
    window, strides, apart = ([values[d] for d in dims] for values in (window_dimensions, window_strides, spread))
    # Windows that overlap read an element several times; without the barrier XLA may compute it as often.
    if any(k > s for k, s in zip(window, strides, strict=True)):
        x = lax.optimization_barrier(x)
    if int(np.prod(window)) <= AT_ONCE:
        return _added(view for _, view in views(x, dims, window, strides, apart))
    for d, k, stride, step in zip(dims, window, strides, apart, strict=True):
        x = _run_sum(x, d, k, stride, step)
    return x


def _run_sum(x: Any, dim: int, window: int, stride: int, spread: int) -> Any:
    """Sums of `window` elements along one dimension; long runs that overlap are made of runs of 2, 4, 8, ..."""
    if window == count(x.shape[dim], 1) and spread == 1:
        return lax.expand_dims(jnp.sum(x, dim, dtype=jnp.int32), (dim,))
    if window <= LONG_RUN or stride >= window:
        return lax.optimization_barrier(_added(view for _, view in views(x, [dim], [window], [stride], [spread])))
    total, start, runs = [], 0, _widen(x)
    for bit in range(window.bit_length()):
        if window >> bit & 1:
            stop = start + (count(x.shape[dim], window, stride, spread) - 1) * stride + 1
            total.append(lax.slice_in_dim(runs, start, stop, stride, dim))
            start += spread << bit
        if window >> (bit + 1):
            ((_, first), (_, second)) = views(runs, [dim], [2], [1], [spread << bit])
            runs = lax.optimization_barrier(lax.add_p.bind(first, second))
    return lax.optimization_barrier(_added(total))


def _added(parts: Any) -> Any:
    total = None
    for part in parts:
        total = _widen(part) if total is None else lax.add_p.bind(total, _widen(part))
    return total


def _widen(x: Any) -> Any:
    return lax.convert_element_type(x, jnp.int32)
