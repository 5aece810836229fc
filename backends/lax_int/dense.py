"""Convs of one group, channels last, without padding, by rule in the form that XLA:CPU runs fast. int8 in, int32 out.

Its kernel library takes 2-D NHWC/HWIO convs with more than 16 input or output channels; all else falls to loops tens of
times slower, or does not compile. A dot it takes always. So:

    window of one element                   a dot
    more than two dimensions                the front ones move into the channels (their window) and the batch
    few channels, with strides              space to depth: a block of `stride` pixels becomes a pixel of more channels
    few products per output                 im2col and a dot
    few channels                            the window's width moves into the channels, im2col in one dimension
    no more than 16 channels in and out     more output channels, of zeros
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from qcompiler.backends.lax_int import dots, windows

#: With no more input and output channels than this a conv leaves the kernel library.
LIBRARY_CHANNELS = 16
#: With more features than LIBRARY_CHANNELS a conv stays in it whatever its input channels are.
ENOUGH_FEATURES = 32
#: With fewer channels than this the library's own im2col copies runs too short to be fast.
FEW_CHANNELS = 16
#: Fewer channels than this are rearranged where a stride allows it.
SPACE_TO_DEPTH_CHANNELS = 8
#: Products per output up to which im2col costs less than a conv.
SHORT_DEPTH = 96


def conv(image: Any, kernel: Any, strides: Sequence[int], spread: Sequence[int]) -> Any:
    """Conv without padding, int32, [N, *windows, O].

    Args:
      image: int8, [N, *spatial, C]; any number of spatial dimensions; holds one window at least.
      kernel: int8, [*window, C, O].
      strides: per spatial dimension, as is `spread`, the dilation of the kernel.
    """
    spatial = kernel.ndim - 2
    window, (depth, features) = kernel.shape[:-2], kernel.shape[-2:]
    dims = range(1, spatial + 1)
    if all(k == 1 for k in window):
        ((_, pixels),) = windows.views(image, dims, window, strides, spread)
        return dots.dot(pixels, lax.reshape(kernel, (depth, features)), (((spatial + 1,), (0,)), ((), ())))
    if spatial == 1:
        out = conv(lax.expand_dims(image, (1,)), lax.expand_dims(kernel, (0,)), (1, *strides), (1, *spread))
        return lax.squeeze(out, (1,))
    if spatial > 2:
        folded, kernel = _fold_into_channels(image, kernel, 0, strides, spread)
        batch, front = folded.shape[:2]
        out = conv(lax.collapse(folded, 0, 2), lax.squeeze(kernel, (0,)), strides[1:], spread[1:])
        return lax.reshape(out, (batch, front, *out.shape[1:]))
    if _gains_from_space_to_depth(kernel, strides, spread):
        return conv(*_space_to_depth(image, kernel, strides), (1, 1), (1, 1))
    if int(np.prod(window)) * depth <= SHORT_DEPTH:
        return _im2col(image, kernel, strides, spread)
    if depth < FEW_CHANNELS and window[1] > 1:
        folded, kernel = _fold_into_channels(image, kernel, 1, strides, spread)
        return conv(folded, kernel, (strides[0], 1), (spread[0], 1))
    if max(depth, features) <= LIBRARY_CHANNELS:
        kernel = windows.pad(kernel, (3,), ((0, ENOUGH_FEATURES - features),))
    # The barrier keeps XLA from moving zero padding back into the conv, where it leaves the library if the kernel is
    # larger than the map or the result is, or (jax 0.12) does not compile.
    out = lax.conv_general_dilated(
        lax.optimization_barrier(image),
        kernel,
        window_strides=strides,
        padding=((0, 0), (0, 0)),
        rhs_dilation=spread,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        preferred_element_type=jnp.int32,
    )
    return lax.slice_in_dim(out, 0, features, axis=3)


def _im2col(image: Any, kernel: Any, strides: Sequence[int], spread: Sequence[int]) -> Any:
    *window, depth, features = kernel.shape
    patches = lax.concatenate([view for _, view in windows.views(image, (1, 2), window, strides, spread)], 3)
    matrix = lax.reshape(kernel, (int(np.prod(window)) * depth, features))
    return dots.dot(patches, matrix, (((3,), (0,)), ((), ())))


def _fold_into_channels(
    image: Any, kernel: Any, axis: int, strides: Sequence[int], spread: Sequence[int]
) -> tuple[Any, Any]:
    """im2col in spatial dimension `axis` alone: image and kernel of a conv whose window there is one element."""
    size, depth, features = kernel.shape[axis], *kernel.shape[-2:]
    views = windows.views(image, (axis + 1,), (size,), (strides[axis],), (spread[axis],))
    image = lax.concatenate([view for _, view in views], image.ndim - 1)
    rest = [d for d in range(kernel.ndim - 2) if d != axis]
    kernel = lax.transpose(kernel, (*rest, axis, kernel.ndim - 2, kernel.ndim - 1))
    kernel = lax.reshape(kernel, (*kernel.shape[: len(rest)], size * depth, features))
    return image, lax.expand_dims(kernel, (axis,))


def _gains_from_space_to_depth(kernel: Any, strides: Sequence[int], spread: Sequence[int]) -> bool:
    height, width, depth, _ = kernel.shape
    overlaps = all(k > s for k, s in zip((height, width), strides, strict=True))
    return depth < SPACE_TO_DEPTH_CHANNELS and tuple(spread) == (1, 1) and max(strides) > 1 and overlaps


def _space_to_depth(image: Any, kernel: Any, strides: Sequence[int]) -> tuple[Any, Any]:
    """Image and kernel of a conv without strides: blocks of `strides` pixels are pixels, the kernel's end is zeros."""
    counts = [windows.count(n, k, s) for n, k, s in zip(image.shape[1:3], kernel.shape, strides, strict=False)]
    blocks = [-(-k // s) for k, s in zip(kernel.shape, strides, strict=False)]
    sizes = [(n + b - 1) * s for n, b, s in zip(counts, blocks, strides, strict=True)]
    image = windows.pad(image, (1, 2), [(0, size - n) for size, n in zip(sizes, image.shape[1:3], strict=True)])
    kernel = windows.pad(
        kernel, (0, 1), [(0, b * s - k) for b, s, k in zip(blocks, strides, kernel.shape, strict=False)]
    )
    return _blocks(image, 1, strides), _blocks(kernel, 0, strides)


def _blocks(x: Any, start: int, strides: Sequence[int]) -> Any:
    """Two dimensions from `start` in blocks, the pixels of a block laid out in the dimension behind them."""
    before, (height, width, depth), after = x.shape[:start], x.shape[start : start + 3], x.shape[start + 3 :]
    split = (*before, height // strides[0], strides[0], width // strides[1], strides[1], depth, *after)
    order = [*range(start), *(start + k for k in (0, 2, 1, 3, 4)), *range(start + 5, len(split))]
    x = lax.transpose(lax.reshape(x, split), order)
    return lax.reshape(x, (*before, height // strides[0], width // strides[1], strides[0] * strides[1] * depth, *after))
