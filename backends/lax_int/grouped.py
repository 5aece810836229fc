"""Grouped convs as a few convs of one group each: neighbouring groups join, with zeros where they do not meet.

A group alone has too few channels to keep the machine busy, and each conv costs its slices and a copy. So groups join
until an output needs `DEPTH` products. (int8 convs with groups give wrong values on CUDA, openxla/xla#49123, and are
slow on the CPU.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from qcompiler.backends.lax_int import dense

#: Products per output, zeros among them, up to which groups join.
DEPTH = 640


def conv(image: Any, kernel: Any, groups: int, strides: Sequence[int], spread: Sequence[int]) -> Any:
    """Grouped conv without padding, int32, [N, *windows, O].

    Args:
      image: int8, [N, *spatial, groups * C].
      kernel: int8, [*window, C, O]; the first O / groups features belong to the first group.
      groups: number of groups.
      strides: per spatial dimension, as is `spread`, the dilation of the kernel.
    """
    if groups == 1:
        return dense.conv(image, kernel, strides, spread)
    *window, depth, features = kernel.shape
    most = max(1, DEPTH // (int(np.prod(window)) * depth))
    blocks = -(-groups // most)
    size, last = -(-groups // blocks), image.ndim - 1
    parts = []
    for start in range(0, groups, size):
        stop = min(groups, start + size)
        own = lax.slice_in_dim(image, start * depth, stop * depth, axis=last)
        weights = lax.slice_in_dim(
            kernel, start * (features // groups), stop * (features // groups), axis=kernel.ndim - 1
        )
        parts.append(dense.conv(own, _joined(weights, stop - start), strides, spread))
    return lax.concatenate(parts, last)


def _joined(kernel: Any, groups: int) -> Any:
    """The kernel of one group that does what `groups` groups do: [*window, groups * C, O], zeros off the diagonal."""
    if groups == 1:
        return kernel
    *window, depth, features = kernel.shape
    rank, shape = len(window), (*window, groups, depth, groups, features // groups)
    kept = [d for d in range(rank + 4) if d != rank]
    blocks = lax.broadcast_in_dim(lax.reshape(kernel, [shape[d] for d in kept]), shape, kept)
    same = lax.eq(*(lax.broadcasted_iota(jnp.int32, shape, rank + d) for d in (0, 2)))
    blocks = lax.select(same, blocks, lax.full_like(blocks, 0))
    return lax.reshape(blocks, (*window, groups * depth, features))
