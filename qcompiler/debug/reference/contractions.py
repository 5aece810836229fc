"""Dots, convolutions and windows of NumPy arrays by the parameters of JAX's equations; exact on integers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from qcompiler.errors import QuantizationError


def multiply(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """`np.matmul`; of integers in int64, through float64 where that is exact, since NumPy has no fast integer one."""
    if a.dtype.kind == "f":
        return np.matmul(a, b)
    a, b = a.astype(np.int64), b.astype(np.int64)
    largest = [int(np.abs(x).max(initial=0)) for x in (a, b)]
    if largest[0] * largest[1] * a.shape[-1] < 2**53:
        return np.matmul(a.astype(np.float64), b.astype(np.float64)).astype(np.int64)
    return np.matmul(a, b)


def dot(lhs: np.ndarray, rhs: np.ndarray, params: dict[str, Any]) -> np.ndarray:
    """`dot_general`; integers give int64, floats the dtype of the operands."""
    (lhs_contract, rhs_contract), (lhs_batch, rhs_batch) = params["dimension_numbers"]
    sides = []
    for x, contract, batch, last in ((lhs, lhs_contract, lhs_batch, True), (rhs, rhs_contract, rhs_batch, False)):
        free = [d for d in range(x.ndim) if d not in contract and d not in batch]
        groups, rows, depth = ([x.shape[d] for d in dims] for dims in (batch, free, contract))
        flat = x.transpose(*batch, *(free if last else contract), *(contract if last else free))
        inner = (math.prod(rows), math.prod(depth)) if last else (math.prod(depth), math.prod(rows))
        sides.append((flat.reshape(math.prod(groups), *inner), groups, rows))
    (a, groups, rows), (b, _, columns) = sides
    return multiply(a, b).reshape(*groups, *rows, *columns)


def conv(image: np.ndarray, kernel: np.ndarray, params: dict[str, Any]) -> np.ndarray:
    """`conv_general_dilated`: one product with the patches under the kernel; integers give int64."""
    numbers = params["dimension_numbers"]
    if params["batch_group_count"] != 1:
        raise QuantizationError("the reference has no rule for a convolution with batch groups")
    image, kernel = image.transpose(numbers.lhs_spec), kernel.transpose(numbers.rhs_spec)
    holes = [(lo, hi, d - 1) for (lo, hi), d in zip(params["padding"], params["lhs_dilation"], strict=True)]
    image = spread_and_pad(image, [(0, 0, 0), (0, 0, 0), *holes], 0)
    groups, features, window = params["feature_group_count"], kernel.shape[0], kernel.shape[2:]
    size, cuts = _windows(image.shape[2:], window, params["window_strides"], params["rhs_dilation"])
    image = image.reshape(image.shape[0], groups, -1, *image.shape[2:])
    patches = np.stack([image[(..., *cut)] for cut in cuts], axis=3)
    patches = patches.reshape(*image.shape[:2], -1, math.prod(size))
    kernel = kernel.reshape(groups, features // groups, patches.shape[2])
    out = multiply(kernel, patches).reshape(image.shape[0], features, *size)
    return out.transpose(np.argsort(numbers.out_spec))


def window(params: dict[str, Any], x: np.ndarray, choose: Callable[..., np.ndarray], neutral: Any) -> np.ndarray:
    """`reduce_window` with a function of two arrays and its neutral number, which pads."""
    holes = [(lo, hi, d - 1) for (lo, hi), d in zip(params["padding"], params["base_dilation"], strict=True)]
    x = spread_and_pad(x, holes, neutral)
    size, cuts = _windows(x.shape, params["window_dimensions"], params["window_strides"], params["window_dilation"])
    out = np.full(size, neutral, x.dtype)
    for cut in cuts:
        out = choose(out, x[cut])
    return out


def _windows(
    shape: Sequence[int], window: Sequence[int], strides: Sequence[int], spread: Sequence[int]
) -> tuple[list[int], Iterator[tuple[slice, ...]]]:
    """The number of places of a window along each dimension, and per position in it the elements there."""
    reach = [(k - 1) * d + 1 for k, d in zip(window, spread, strict=True)]
    size = [max(0, (n - r) // s + 1) for n, r, s in zip(shape, reach, strides, strict=True)]

    def cuts() -> Iterator[tuple[slice, ...]]:
        for position in itertools.product(*map(range, window)):
            starts = [p * d for p, d in zip(position, spread, strict=True)]
            ends = [a + (n - 1) * s + 1 if n else a for a, n, s in zip(starts, size, strides, strict=True)]
            yield tuple(map(slice, starts, ends, strides))

    return size, cuts()


def spread_and_pad(x: np.ndarray, config: Sequence[tuple[int, int, int]], fill: Any) -> np.ndarray:
    """Padding per dimension as (low, high, interior); negative padding cuts off."""
    for axis, (low, high, interior) in enumerate(config):
        if low == high == interior == 0:
            continue
        n = x.shape[axis]
        spread = n + max(0, n - 1) * interior
        shape = list(x.shape)
        shape[axis] = max(0, spread + low + high)
        out = np.full(shape, fill, x.dtype)
        target = low + (interior + 1) * np.arange(n)
        inside = (target >= 0) & (target < shape[axis])
        np.moveaxis(out, axis, 0)[target[inside]] = np.moveaxis(x, axis, 0)[inside]
        x = out
    return x
