"""Shape changes and maxima: the result's elements are elements of the operand."""

from __future__ import annotations

from typing import Any

import numpy as np

from qcompiler.debug.reference import contractions
from qcompiler.debug.reference.values import Ints, known

VIEWS = frozenset(
    "reshape transpose squeeze expand_dims broadcast_in_dim slice rev copy reduce_max reduce_min reduce_window_max"
    " reduce_window_min cummax cummin".split()
)


def view(eqn: Any, x: Any) -> Any:
    name, params = eqn.primitive.name, eqn.params
    if known(x):
        return move(name, params, x, None)
    low, high = x.one_interval()
    moved = move(name, params, x.values, np.iinfo(eqn.invars[0].aval.dtype))
    return Ints(moved, np.int64(low), np.int64(high))


def move(name: str, params: dict[str, Any], x: np.ndarray, info: Any) -> np.ndarray:
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
    return contractions.window(params, x, choose, info.min if largest else info.max)
