"""Shape changes and maxima: the result's elements are elements of the operand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from qcompiler.debug.reference import contractions
from qcompiler.debug.reference.values import Ints, known, whole
from qcompiler.errors import QuantizationError

VIEWS = frozenset(
    "reshape transpose squeeze expand_dims broadcast_in_dim slice rev copy reduce_max reduce_min reduce_window_max"
    " reduce_window_min cummax cummin gather dynamic_slice".split()
)


def view(eqn: Any, values: list[Any]) -> Any:
    """A view of integers or of a known array; further operands are indices."""
    x, *rest = values
    name, params, indices = eqn.primitive.name, eqn.params, [whole(v) for v in rest]
    if known(x):
        return move(name, params, x, indices)
    low, high = x.one_interval()
    moved = move(name, params, x.values, indices, np.iinfo(eqn.invars[0].aval.dtype))
    return Ints(moved, np.int64(low), np.int64(high))


def move(
    name: str, params: dict[str, Any], x: np.ndarray, indices: Sequence[np.ndarray] = (), info: Any = None
) -> np.ndarray:
    """The result of a view.

    Args:
      name, params: of the primitive.
      x: the operand.
      indices: the further operands.
      info: `np.iinfo` or `np.finfo` of the dtype that maxima over windows start from; None: that of `x`.
    """
    if name == "gather":
        return gather(x, *indices, params)
    if name == "dynamic_slice":
        sizes = params["slice_sizes"]
        starts = [min(max(int(i), 0), n - size) for i, n, size in zip(indices, x.shape, sizes, strict=True)]
        return x[tuple(slice(a, a + size) for a, size in zip(starts, sizes, strict=True))]
    if name == "reshape":
        if params.get("dimensions") is not None:
            x = x.transpose(params["dimensions"])
        return x.reshape(params["new_sizes"])
    if name == "transpose":
        return x.transpose(params["permutation"])
    if name == "squeeze":
        return np.squeeze(x, tuple(params["dimensions"]))
    if name == "expand_dims":
        return np.expand_dims(x, tuple(params["dimensions"]))
    if name == "broadcast_in_dim":
        shape = [1] * len(params["shape"])
        for dim, n in zip(params["broadcast_dimensions"], x.shape, strict=True):
            shape[dim] = n
        return np.broadcast_to(x.reshape(shape), params["shape"])
    if name == "slice":
        strides = params["strides"] or (1,) * x.ndim
        limits = zip(params["start_indices"], params["limit_indices"], strides, strict=True)
        return x[tuple(slice(*limit) for limit in limits)]
    if name == "rev":
        return np.flip(x, tuple(params["dimensions"]))
    if name == "copy":
        return x
    largest = name.endswith("max")
    choose = np.maximum if largest else np.minimum
    if name.startswith("cum"):
        axis = params["axis"]
        return (
            np.flip(choose.accumulate(np.flip(x, axis), axis), axis)
            if params["reverse"]
            else choose.accumulate(x, axis)
        )
    if name in ("reduce_max", "reduce_min"):
        return choose.reduce(x, axis=tuple(params["axes"]))
    if info is None:
        info = np.finfo(x.dtype) if x.dtype.kind == "f" else np.iinfo(x.dtype)
    return contractions.window(params, x, choose, info.min if largest else info.max)


def gather(x: np.ndarray, starts: np.ndarray, params: dict[str, Any]) -> np.ndarray:
    """`gather`: slices of `x` that begin where the last dimension of `starts` says.

    Raises:
      QuantizationError: a slice reaches outside of `x`, where the mode would fill with a number that is no code.
    """
    numbers, sizes = params["dimension_numbers"], params["slice_sizes"]
    batch = starts.shape[:-1]
    rank = len(batch)
    dropped = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    places = []
    for d, (n, size) in enumerate(zip(x.shape, sizes, strict=True)):
        first = np.zeros(batch, np.int64)
        if d in numbers.start_index_map:
            first = starts[..., numbers.start_index_map.index(d)].astype(np.int64)
        elif d in numbers.operand_batching_dims:
            along = numbers.start_indices_batching_dims[numbers.operand_batching_dims.index(d)]
            first = np.broadcast_to(np.arange(n).reshape([-1 if k == along else 1 for k in range(rank)]), batch)
        inside = np.clip(first, 0, n - size)
        if "FILL" in str(params["mode"]) and not np.array_equal(inside, first):
            raise QuantizationError("the reference has no rule for a gather outside of its operand")
        shape = [-1 if k == d else 1 for k in range(x.ndim)]
        places.append(inside.reshape(*batch, *(1,) * x.ndim) + np.arange(size).reshape(shape))
    found = x[tuple(np.broadcast_arrays(*places))]
    found = found.squeeze(tuple(rank + d for d in sorted(dropped)))
    offsets = numbers.offset_dims
    others = [d for d in range(found.ndim) if d not in offsets]
    order = [0] * found.ndim
    for k, d in enumerate((*others, *offsets)):
        order[d] = k
    return found.transpose(order)
