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


def place(name: str, params: dict[str, Any], x: np.ndarray, updates: np.ndarray, indices: Sequence[Any]) -> np.ndarray:
    """`dynamic_update_slice`, or a scatter of the name: `x` with updates at places that indices say."""
    out = np.array(x)
    if name == "dynamic_update_slice":
        starts = [min(max(int(i), 0), n - size) for i, n, size in zip(indices, x.shape, updates.shape, strict=True)]
        out[tuple(slice(a, a + size) for a, size in zip(starts, updates.shape, strict=True))] = updates
        return out
    numbers, (places,) = params["dimension_numbers"], indices
    window = numbers.update_window_dims
    whole = {*numbers.inserted_window_dims, *numbers.operand_batching_dims}
    sizes = iter(updates.shape[d] for d in window)
    sizes = [1 if d in whole else next(sizes) for d in range(x.ndim)]
    found, inside = _places(
        x.shape,
        places,
        sizes,
        numbers.scatter_dims_to_operand_dims,
        numbers.operand_batching_dims,
        numbers.scatter_indices_batching_dims,
    )
    if "CLIP" in str(params["mode"]):
        inside = np.ones_like(inside)
    # Batches of updates first, then their windows, dimensions of size one among them.
    order = [d for d in range(updates.ndim) if d not in window]
    values = updates.transpose([*order, *window]).reshape(*places.shape[:-1], *sizes)
    combine = {"scatter-add": np.add, "scatter-max": np.maximum, "scatter-min": np.minimum}.get(name)
    kept = np.broadcast_to(inside.reshape(*inside.shape, *(1,) * x.ndim), values.shape)
    where = tuple(w[kept] for w in np.broadcast_arrays(*found, values)[:-1])
    if combine is None:
        out[where] = values[kept]
    else:
        combine.at(out, where, values[kept])
    return out


def _places(
    shape: Sequence[int],
    starts: np.ndarray,
    sizes: Sequence[int],
    mapped: Sequence[int],
    batching: Sequence[int],
    starts_batching: Sequence[int],
) -> tuple[list[np.ndarray], np.ndarray]:
    """The elements of windows of an operand, clamped into it, and which windows lay inside before.

    Returns:
      Per dimension the indices, all of shape `(*starts.shape[:-1], *sizes)` once broadcast; `bool[starts.shape[:-1]]`.
    """
    batch = starts.shape[:-1]
    inside, places = np.ones(batch, bool), []
    for d, (n, size) in enumerate(zip(shape, sizes, strict=True)):
        first = np.zeros(batch, np.int64)
        if d in mapped:
            first = starts[..., mapped.index(d)].astype(np.int64)
        elif d in batching:
            along = starts_batching[batching.index(d)]
            first = np.broadcast_to(np.arange(n).reshape([-1 if k == along else 1 for k in range(len(batch))]), batch)
        clamped = np.clip(first, 0, n - size)
        inside &= clamped == first
        window = [-1 if k == d else 1 for k in range(len(shape))]
        places.append(clamped.reshape(*batch, *(1,) * len(shape)) + np.arange(size).reshape(window))
    return places, inside


def gather(x: np.ndarray, starts: np.ndarray, params: dict[str, Any]) -> np.ndarray:
    """`gather`: slices of `x` that begin where the last dimension of `starts` says; filled where the mode says so."""
    numbers, sizes = params["dimension_numbers"], params["slice_sizes"]
    rank = starts.ndim - 1
    dropped = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    batching = (numbers.operand_batching_dims, numbers.start_indices_batching_dims)
    places, inside = _places(x.shape, starts, sizes, numbers.start_index_map, *batching)
    found = x[tuple(np.broadcast_arrays(*places))]
    if "FILL" in str(params["mode"]):
        fill = params["fill_value"]
        fill = np.nan if fill is None and x.dtype.kind == "f" else fill
        if fill is None and not inside.all():
            raise QuantizationError("the reference has no rule for a gather outside of its operand")
        fill = np.asarray(0 if fill is None else fill, x.dtype)
        found = np.where(inside.reshape(*inside.shape, *(1,) * x.ndim), found, fill)
    found = found.squeeze(tuple(rank + d for d in sorted(dropped)))
    offsets = numbers.offset_dims
    others = [d for d in range(found.ndim) if d not in offsets]
    order = [0] * found.ndim
    for k, d in enumerate((*others, *offsets)):
        order[d] = k
    return found.transpose(order)
