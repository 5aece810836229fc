"""Dots and convs on int8 with an int32 result, in the form that XLA runs fast. Every form gives the same integers.

The form follows from shapes alone:

    depthwise                     shifted multiply-adds                          `depthwise`
    groups                        convs of neighbouring groups together          `grouped`
    dilated image (transposed)    an ordinary conv per phase of the result       `transposed`
    all else                      a dot, im2col, or a conv of the right shape    `dense`
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qcompiler.backends.lax_int import depthwise, grouped, transposed, windows
from qcompiler.backends.lax_int.dots import dot as dot
from qcompiler.ir import contraction


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


def conv(image: Any, kernel: Any, params: dict[str, Any], held: np.ndarray | None = None) -> Any:
    """`lax.conv_general_dilated` of integers with the parameters of an equation, int32 result.

    Args:
      image: as the equation has it; int8 for the fast forms.
      kernel: likewise.
      params: the equation's.
      held: the kernel's values, if known; they let sums of products stay in 16 bits where they fit.
    """
    plain = lambda *operands: contraction.integer_product("conv_general_dilated", params, *operands)
    result = jax.eval_shape(plain, image, kernel)
    if image.dtype != jnp.int8 or kernel.dtype != jnp.int8 or params["batch_group_count"] != 1:
        return plain(image, kernel)
    if math.prod(result.shape) == 0:
        return lax.full(result.shape, 0, jnp.int32)
    numbers, groups = params["dimension_numbers"], params["feature_group_count"]
    strides, padding, holes, spread = (
        [*params[name]] for name in ("window_strides", "padding", "lhs_dilation", "rhs_dilation")
    )
    layout, last = numbers.lhs_spec, image.ndim - 1
    order = (*numbers.rhs_spec[2:], numbers.rhs_spec[1], numbers.rhs_spec[0])
    kernel, held = lax.transpose(kernel, order), None if held is None else np.transpose(held, order)
    by_channel = kernel.shape[-2] == 1 and (groups > 1 or kernel.shape[-1] == 1)
    if not by_channel:
        layout = (0, last, *range(1, last))
        image = _relaid(image, numbers.lhs_spec, layout)
    dims, channel = layout[2:], layout[1]

    def multiply(image: Any, kernel: Any, held: Any, strides: Sequence[int], spread: Sequence[int]) -> Any:
        if by_channel:
            kernel = lax.squeeze(kernel, (kernel.ndim - 2,))
            return depthwise.conv(image, kernel, dims, channel, strides, spread, held)
        return grouped.conv(image, kernel, groups, strides, spread)

    if any(hole != 1 for hole in holes):
        sizes = [image.shape[d] for d in dims]
        axes = [transposed.axis(*a) for a in zip(sizes, kernel.shape, strides, padding, holes, spread, strict=False)]
        joint = groups == 1 and not by_channel
        out = transposed.conv(image, kernel, held, dims, channel, axes, multiply, joint)
    else:
        out = multiply(windows.pad(image, dims, padding), kernel, held, strides, spread)
    return _relaid(out, layout, numbers.out_spec)


def _relaid(x: Any, layout: Sequence[int], wanted: Sequence[int]) -> Any:
    """From one layout to another; each lists the dimensions that hold batch, channels and the spatial ones."""
    order = [0] * x.ndim
    for source, target in zip(layout, wanted, strict=True):
        order[target] = source
    return x if order == list(range(x.ndim)) else lax.transpose(x, order)
