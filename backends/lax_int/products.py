"""Dots and convs on int8 with an int32 result, in the form that XLA runs fast. Every form gives the same integers.

XLA:CPU hands s8·s8→s32 dots with M, N >= 2 and 2-D NHWC/HWIO convs with more than 16 channels to its kernel library;
all else falls to loops tens of times slower (conditions: XLA's `ynn_support.cc`). So other ranks and layouts are
brought to NHWC, 1×1 convs become dots, small channel counts and kernels larger than the map become im2col and a dot,
and matrix-vector products get a second row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from qcompiler.ir import contraction

#: A conv with no more input and output channels than this leaves the kernel library.
FEW_CHANNELS = 16


def through_int8(
    multiply: Callable[[Any, Any], Any], operands: Sequence[Any], intervals: Sequence[tuple[Any, Any]]
) -> Any:
    """A bilinear product of integers whose intervals are at most 256 wide, by products of int8 alone.

    With a = a' + c, c the middle of its interval: a·b = a'·b' + c_a (1·b') + c_b (a'·1) + c_a c_b (1·1), exact in
    int32. Zero padding pads a', b' and 1 alike, so that it stays zero padding.
    """
    narrow, middles = [], []
    for x, (low, high) in zip(operands, intervals, strict=True):
        if x.dtype == jnp.int8 or high - low > 255:
            narrow.append(x)
            middles.append(0)
            continue
        middle = 0 if -128 <= low and high <= 127 else int(low) + 128
        narrow.append(lax.convert_element_type(x - np.int32(middle) if middle else x, jnp.int8))
        middles.append(middle)
    if any(x.dtype != jnp.int8 for x in narrow):
        return multiply(*operands)
    ones = [lax.full_like(x, 1) for x in narrow]
    out = multiply(*narrow)
    if middles[0]:
        out = out + np.int32(middles[0]) * multiply(ones[0], narrow[1])
    if middles[1]:
        out = out + np.int32(middles[1]) * multiply(narrow[0], ones[1])
    if middles[0] and middles[1]:
        out = out + np.int32(middles[0] * middles[1]) * multiply(*ones)
    return out


def dot(lhs: Any, rhs: Any, dimension_numbers: Any) -> Any:
    """`lax.dot_general` of integers, int32 result."""
    (contract, _), (batch, _) = dimension_numbers
    rows = int(np.prod([n for d, n in enumerate(lhs.shape) if d not in contract and d not in batch]))
    if lhs.dtype == rhs.dtype == jnp.int8 and rows == 1 and len(lhs.shape) > len(contract) + len(batch):
        free = next(d for d in range(lhs.ndim) if d not in contract and d not in batch)
        out = lax.dot_general(
            lax.concatenate([lhs, lhs], free), rhs, dimension_numbers, preferred_element_type=jnp.int32
        )
        return lax.slice_in_dim(out, 0, 1, axis=len(batch) + [d for d in _free(lhs, contract, batch)].index(free))
    return lax.dot_general(lhs, rhs, dimension_numbers, preferred_element_type=jnp.int32)


def _free(x: Any, contract: Any, batch: Any) -> list[int]:
    return [d for d in range(x.ndim) if d not in contract and d not in batch]


def conv(image: Any, kernel: Any, params: dict[str, Any]) -> Any:
    """`lax.conv_general_dilated` of integers with the parameters of an equation, int32 result."""
    numbers = params["dimension_numbers"]
    spatial = len(numbers.lhs_spec) - 2
    if image.dtype != jnp.int8 or params["batch_group_count"] != 1 or spatial > 2 or spatial == 0:
        return contraction.integer_product("conv_general_dilated", params, image, kernel)
    # To NHWC, HWIO; a 1-D conv gets a height of one.
    image = lax.transpose(image, (numbers.lhs_spec[0], *numbers.lhs_spec[2:], numbers.lhs_spec[1]))
    kernel = lax.transpose(kernel, (*numbers.rhs_spec[2:], numbers.rhs_spec[1], numbers.rhs_spec[0]))
    strides, padding, holes, spread = (
        list(params[k]) for k in ("window_strides", "padding", "lhs_dilation", "rhs_dilation")
    )
    if spatial == 1:
        image, kernel = lax.expand_dims(image, (1,)), lax.expand_dims(kernel, (0,))
        strides, padding, holes, spread = [1, *strides], [(0, 0), *padding], [1, *holes], [1, *spread]
    config = [(0, 0, 0), *((lo, hi, h - 1) for (lo, hi), h in zip(padding, holes, strict=True)), (0, 0, 0)]
    groups = params["feature_group_count"]
    if any(c != (0, 0, 0) for c in config) and (
        any(h != 1 for h in holes) or _wants_patches(image, kernel, config, groups)
    ):
        image = lax.pad(image, np.int8(0), config)
        padding = [(0, 0), (0, 0)]
    out = _conv_nhwc(image, kernel, strides, padding, spread, groups)
    if spatial == 1:
        out = lax.squeeze(out, (1,))
    # Back from N, spatial, C.
    order = np.argsort((numbers.out_spec[0], *numbers.out_spec[2:], numbers.out_spec[1]))
    return lax.transpose(out, tuple(int(k) for k in order))


def _wants_patches(image: Any, kernel: Any, config: list[Any], groups: int) -> bool:
    """Whether a conv leaves the kernel library, so that im2col and a dot are faster, or all that compiles."""
    height, width, depth, features = kernel.shape
    if groups != 1:
        return False
    larger = any(
        k > n + lo + hi or (k > n and (lo or hi))
        for k, n, (lo, hi, _) in zip((height, width), image.shape[1:3], config[1:3], strict=True)
    )
    return larger or max(depth, features) <= FEW_CHANNELS or depth < 8


def _conv_nhwc(image: Any, kernel: Any, strides: Any, padding: Any, spread: Any, groups: int) -> Any:
    height, width, depth, features = kernel.shape
    unpadded = all(tuple(p) == (0, 0) for p in padding)
    if groups == 1 and unpadded and (height, width) == (1, 1):
        if tuple(strides) != (1, 1):
            limits = image.shape
            image = lax.slice(image, (0, 0, 0, 0), limits, (1, *strides, 1))
        return dot(image, lax.reshape(kernel, (depth, features)), (((3,), (0,)), ((), ())))
    config = [(0, 0, 0), *((*p, 0) for p in padding), (0, 0, 0)]
    if unpadded and _wants_patches(image, kernel, config, groups):
        patches = _patches(image, (height, width), strides, spread)
        return dot(patches, lax.reshape(kernel, (height * width * depth, features)), (((3,), (0,)), ((), ())))
    return lax.conv_general_dilated(
        image,
        kernel,
        window_strides=strides,
        padding=padding,
        rhs_dilation=spread,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
        preferred_element_type=jnp.int32,
    )


def _patches(image: Any, window: tuple[int, int], strides: Any, spread: Any) -> Any:
    """im2col: [N, H, W, C] to [N, H', W', window * C], the order of a flattened HWIO kernel."""
    _, height, width, _ = image.shape
    out_h = (height - (window[0] - 1) * spread[0] - 1) // strides[0] + 1
    out_w = (width - (window[1] - 1) * spread[1] - 1) // strides[1] + 1
    parts = []
    for i in range(window[0]):
        for j in range(window[1]):
            top, left = i * spread[0], j * spread[1]
            bottom, right = top + (out_h - 1) * strides[0] + 1, left + (out_w - 1) * strides[1] + 1
            parts.append(
                lax.slice(image, (0, top, left, 0), (image.shape[0], bottom, right, image.shape[3]), (1, *strides, 1))
            )
    return lax.concatenate(parts, 3) if len(parts) > 1 else parts[0]
