"""Depthwise convs as shifted multiply-adds: one product per element of the kernel, all in one vectorized loop.

    out[..., y, x, c] = sum_ij image[..., y + i, x + j, c] * kernel[i, j, c]

XLA:CPU takes a depthwise conv as a dot of its own per pixel and channel, tens of times slower. The loop works in any
layout; XLA fuses what follows (bias, rescale, clamp) into it. A product of two int8 needs 16 bits, so as many products
as the kernel's values prove are first added in int16, where a vector holds twice as many as in int32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from qcompiler.backends.lax_int import windows

#: Products in one fused loop. Beyond some hundreds XLA compiles and runs it slowly.
LOOP = 64


def conv(
    image: Any,
    kernel: Any,
    dims: Sequence[int],
    channel: int,
    strides: Sequence[int],
    spread: Sequence[int],
    held: np.ndarray | None = None,
) -> Any:
    """Depthwise conv without padding, int32.

    Args:
      image: int8, any layout.
      kernel: int8, [*window, features]; features are a multiple of the image's channels, feature f reads channel
        f // multiplier.
      dims: spatial dimensions of the image, in the order of the window's.
      channel: dimension of the channels; in the result, of the features.
      strides: per spatial dimension, as is `spread`, the dilation of the kernel.
      held: the kernel's values, if known.
    """
    window, features = kernel.shape[:-1], kernel.shape[-1]
    multiplier = features // image.shape[channel]
    if multiplier > 1:
        shape = list(image.shape)
        shape.insert(channel + 1, multiplier)
        kept = [d for d in range(len(shape)) if d != channel + 1]
        image = lax.broadcast_in_dim(image, shape, kept)
        image = lax.reshape(image, [features if d == channel else n for d, n in enumerate(image.shape) if d in kept])
    # Or XLA may compute the image anew for every element of the kernel.
    image = lax.optimization_barrier(image)
    views = [view for _, view in windows.views(image, dims, window, strides, spread)]
    taps = lax.reshape(kernel, (len(views), features))
    groups = int16_groups(len(views), None if held is None else np.asarray(held).reshape(len(views), features))
    total, size = None, 0
    for group in groups:
        part = None
        for k in group:
            weights = lax.convert_element_type(lax.index_in_dim(taps, k, keepdims=False), jnp.int16)
            weights = lax.broadcast_in_dim(weights, views[k].shape, (channel,))
            product = lax.mul(lax.convert_element_type(views[k], jnp.int16), weights)
            part = product if part is None else lax.add_p.bind(part, product)
        part = lax.convert_element_type(part, jnp.int32)
        total = part if total is None else lax.add_p.bind(total, part)
        size += len(group)
        if size >= LOOP:
            total, size = lax.optimization_barrier(total), 0
    return total


def int16_groups(taps: int, held: np.ndarray | None) -> list[list[int]]:
    """Parts of `range(taps)` whose sums of products with any int8 fit int16, for every channel.

    Args:
      taps: elements of the kernel.
      held: their values, [taps, channels], in int8; None if not known: then only single products are sure to fit.
    """
    if held is None:
        return [[k] for k in range(taps)]
    positive, negative = np.maximum(held, 0).astype(np.int64), np.maximum(-held.astype(np.int64), 0)
    groups: list[tuple[list[int], np.ndarray, np.ndarray]] = []
    # First fit, in order of the largest weight.
    for k in np.argsort(-np.maximum(positive, negative).max(axis=1, initial=0), kind="stable"):
        for members, above, below in groups:
            more_above, more_below = above + positive[k], below + negative[k]
            highest, lowest = 127 * more_above + 128 * more_below, 128 * more_above + 127 * more_below
            if highest.max(initial=0) <= 32767 and lowest.max(initial=0) <= 32768:
                members.append(int(k))
                above += positive[k]
                below += negative[k]
                break
        else:
            groups.append(([int(k)], positive[k].copy(), negative[k].copy()))
    return [sorted(members) for members, _, _ in groups]
