"""Primitives that `simplify` spells in terms of fewer others, so that every later pass knows only those.

a, b = split x        ->      a = slice x; b = slice x
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax import lax

from qcompiler.ir import _compat, classes, replay, scatters
from qcompiler.ir.constants import Constants


def canonical(eqn: _compat.JaxprEqn, values: Sequence[Any], constants: Constants) -> Sequence[Any] | None:
    """The results of an equation by other primitives; None if it is canonical already.

    Args:
      eqn: the equation.
      values: its operands, traced; numbers are NumPy scalars.
      constants: what is known before any input.
    """
    form = FORMS.get(eqn.primitive.name)
    return None if form is None else form(eqn, values, constants)


def _split(eqn: _compat.JaxprEqn, values: Sequence[Any], constants: Constants) -> list[Any]:
    axis, ends = eqn.params["axis"], np.cumsum([0, *eqn.params["sizes"]])
    return [lax.slice_in_dim(values[0], int(a), int(b), axis=axis) for a, b in itertools.pairwise(ends)]


def _unstack(eqn: _compat.JaxprEqn, values: Sequence[Any], constants: Constants) -> list[Any]:
    axis = eqn.params["axis"]
    return [lax.squeeze(lax.slice_in_dim(values[0], k, k + 1, axis=axis), (axis,)) for k in range(len(eqn.outvars))]


def _stack(eqn: _compat.JaxprEqn, values: Sequence[Any], constants: Constants) -> list[Any]:
    axis = eqn.params["axis"]
    return [lax.concatenate([lax.expand_dims(x, (axis,)) for x in values], axis)]


def _tile(eqn: _compat.JaxprEqn, values: Sequence[Any], constants: Constants) -> list[Any]:
    shape = eqn.invars[0].aval.shape
    apart = [n for pair in zip(eqn.params["reps"], shape, strict=True) for n in pair]
    spread = lax.broadcast_in_dim(values[0], apart, range(1, 2 * len(shape), 2))
    return [lax.reshape(spread, eqn.outvars[0].aval.shape)]


def _dynamic_slice(eqn: _compat.JaxprEqn, values: Sequence[Any], constants: Constants) -> list[Any] | None:
    """At a known place; the start is clamped, as the primitive does."""
    starts = _numbers(eqn.invars[1:], constants)
    if starts is None:
        return None
    sizes, shape = eqn.params["slice_sizes"], eqn.invars[0].aval.shape
    starts = [min(max(s, 0), n - size) for s, n, size in zip(starts, shape, sizes, strict=True)]
    return [lax.slice(values[0], starts, [s + size for s, size in zip(starts, sizes, strict=True)])]


def _dynamic_update_slice(eqn: _compat.JaxprEqn, values: Sequence[Any], constants: Constants) -> list[Any] | None:
    """At a known place."""
    starts = _numbers(eqn.invars[2:], constants)
    if starts is None:
        return None
    shape, sizes = eqn.invars[0].aval.shape, eqn.invars[1].aval.shape
    return [_place(values[0], values[1], [min(max(s, 0), n - k) for s, n, k in zip(starts, shape, sizes, strict=True)])]


def _place(whole: Any, part: Any, starts: Sequence[int]) -> Any:
    """What lies around a part, concatenated with it dimension by dimension."""
    shape, sizes, out = whole.shape, part.shape, part
    for axis in reversed(range(len(shape))):
        # Dimensions behind `axis` are whole already, those before it still as narrow as the part.
        around = whole
        for d in range(axis):
            around = lax.slice_in_dim(around, starts[d], starts[d] + sizes[d], axis=d)
        before = lax.slice_in_dim(around, 0, starts[axis], axis=axis)
        after = lax.slice_in_dim(around, starts[axis] + sizes[axis], shape[axis], axis=axis)
        parts = [x for x in (before, out, after) if x.shape[axis]]
        out = lax.concatenate(parts, axis) if len(parts) > 1 else out
    return out


def _scatter(eqn: _compat.JaxprEqn, values: Sequence[Any], constants: Constants) -> list[Any] | None:
    """Of updates that land in one box at a known place, in their order."""
    if eqn.invars[1] not in constants or not eqn.invars[2].aval.size:
        return None
    shape, sizes = eqn.invars[0].aval.shape, eqn.invars[2].aval.shape
    numbers = np.arange(1, math.prod(sizes) + 1, dtype=np.int32).reshape(sizes)
    with jax.ensure_compile_time_eval():
        dims, mode = eqn.params["dimension_numbers"], eqn.params["mode"]
        at = np.asarray(constants.value(eqn.invars[1]))
        landed = np.asarray(lax.scatter_add(np.zeros(shape, np.int32), at, numbers, dims, mode=mode))
    places = np.nonzero(landed)
    if not np.any(landed):
        return None
    starts = [int(p.min()) for p in places]
    box = [int(p.max()) + 1 - start for p, start in zip(places, starts, strict=True)]
    inside = landed[tuple(slice(start, start + n) for start, n in zip(starts, box, strict=True))]
    if inside.size != numbers.size or not np.array_equal(inside.ravel(), numbers.ravel()):
        return None
    part = lax.reshape(values[2], box)
    if eqn.primitive.name == "scatter":
        return [_place(values[0], part, starts)]
    config = [(start, n - start - k, 0) for start, n, k in zip(starts, shape, box, strict=True)]
    return [lax.add(values[0], lax.pad(part, np.zeros((), part.dtype)[()], config))]


def _patches(eqn: _compat.JaxprEqn, values: Sequence[Any], constants: Constants) -> list[Any] | None:
    """A conv whose kernel picks one element per feature, as `conv_general_dilated_patches` has it, by slices."""
    params, numbers = eqn.params, eqn.params["dimension_numbers"]
    picks = eqn.invars[1]
    if picks not in constants or params["batch_group_count"] != 1 or math.prod(picks.aval.shape) > _MOST_PICKED:
        return None
    kernel = np.asarray(constants.value(picks))
    kernel = kernel.transpose(numbers.rhs_spec)  # features, depth, window
    features, depth, *window = kernel.shape
    flat = kernel.reshape(features, -1)
    if not (np.all((flat == 0) | (flat == 1)) and np.all(flat.sum(axis=1) == 1)) or flat.shape[1] == 1:
        return None
    chosen = flat.argmax(axis=1)
    group = np.arange(features) // (features // params["feature_group_count"])
    channel, place = chosen // math.prod(window) + group * depth, chosen % math.prod(window)
    image = lax.transpose(values[0], (numbers.lhs_spec[0], *numbers.lhs_spec[2:], numbers.lhs_spec[1]))
    holes = zip(params["padding"], params["lhs_dilation"], strict=True)
    image = lax.pad(
        image, np.zeros((), image.dtype)[()], [(0, 0, 0), *((*map(int, p), int(h) - 1) for p, h in holes), (0, 0, 0)]
    )
    size = [eqn.outvars[0].aval.shape[d] for d in numbers.out_spec[2:]]
    strides, spread = params["window_strides"], params["rhs_dilation"]
    parts = []
    for at in np.ndindex(*window):
        start = [a * d for a, d in zip(at, spread, strict=True)]
        stop = [a + (n - 1) * s + 1 for a, n, s in zip(start, size, strides, strict=True)]
        limits = (image.shape[0], *stop, image.shape[-1])
        parts.append(lax.slice(image, (0, *start, 0), limits, (1, *strides, 1)))
    channels, count = image.shape[-1], math.prod(window)
    stacked = lax.concatenate(parts, image.ndim - 1) if count > 1 else parts[0]
    order = place * channels + channel
    if np.array_equal(order, np.arange(count * channels).reshape(count, channels).T.reshape(-1)):
        apart = lax.reshape(stacked, (*stacked.shape[:-1], count, channels))
        out = lax.reshape(lax.transpose(apart, (*range(image.ndim - 1), image.ndim, image.ndim - 1)), stacked.shape)
    elif np.array_equal(order, np.arange(count * channels)):
        out = stacked
    else:
        return None
    back = np.argsort((numbers.out_spec[0], *numbers.out_spec[2:], numbers.out_spec[1]))
    return [lax.transpose(out, tuple(map(int, back)))]


def _conv(eqn: _compat.JaxprEqn, values: Sequence[Any], constants: Constants) -> list[Any] | None:
    """Groups of the batch as groups of features; patches as slices."""
    params, numbers, count = eqn.params, eqn.params["dimension_numbers"], eqn.params["batch_group_count"]
    if count == 1:
        return _patches(eqn, values, constants)
    image, (batch, channel) = values[0], numbers.lhs_spec[:2]
    shape = image.shape
    apart = lax.reshape(image, (*shape[:batch], count, shape[batch] // count, *shape[batch + 1 :]))
    at = channel + (channel > batch)
    order = [d for d in range(apart.ndim) if d != batch]
    order.insert(order.index(at), batch)
    sizes = [n // count if d == batch else n * count if d == channel else n for d, n in enumerate(shape)]
    image = lax.reshape(lax.transpose(apart, order), sizes)
    return [eqn.primitive.bind(image, values[1], **{**params, "batch_group_count": 1, "feature_group_count": count})]


#: A kernel with more elements is no selection of patches that anyone writes, and not worth computing to see.
_MOST_PICKED = 1 << 20


def _sum_at_places(eqn: _compat.JaxprEqn, values: Sequence[Any], constants: Constants) -> list[Any] | None:
    """A scatter-add as a sum with one onto zeros, which is linear in the updates alone."""
    box = _scatter(eqn, values, constants)
    if box is not None or constants.uniform(eqn.invars[0]) == 0 or not classes.is_float(eqn.outvars[0]):
        return box
    zeros = lax.broadcast(np.zeros((), eqn.outvars[0].aval.dtype)[()], eqn.outvars[0].aval.shape)
    return [lax.add(values[0], eqn.primitive.bind(zeros, *values[1:], **eqn.params))]


def _product_at_places(eqn: _compat.JaxprEqn, values: Sequence[Any], constants: Constants) -> list[Any] | None:
    """A scatter-mul as a product with factors that stand among ones, where no two land at one element."""
    if scatters.most_at_one_place(eqn) > 1 or not classes.is_float(eqn.outvars[0]):
        return None
    ones = lax.broadcast(np.ones((), eqn.outvars[0].aval.dtype)[()], eqn.outvars[0].aval.shape)
    dims, chosen = eqn.params["dimension_numbers"], {k: eqn.params[k] for k in ("unique_indices", "mode")}
    return [lax.mul(values[0], lax.scatter(ones, values[1], values[2], dims, **chosen))]


def _ragged_dot(eqn: _compat.JaxprEqn, values: Sequence[Any], constants: Constants) -> list[Any] | None:
    """Rows times the matrix of their group, as rows times every matrix, of which the group's is taken; else 0."""
    x, matrices, sizes = values[:3]
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    rows_by_group = lax.RaggedDotDimensionNumbers((((1,), (1,)), ((), ())), (0,), (0,))
    if numbers != rows_by_group or eqn.params.get("group_offset") is not None:
        return None
    count, features = x.shape[0], matrices.shape[2]
    kept = {k: eqn.params[k] for k in ("precision", "preferred_element_type")}
    every = lax.dot_general(x, matrices, numbers.dot_dimension_numbers, **kept)
    ends = lax.broadcast_in_dim(lax.cumsum(sizes), (count, len(sizes)), (1,))
    behind = lax.ge(lax.broadcasted_iota(sizes.dtype, ends.shape, 0), ends)
    group = lax.reduce_sum(lax.convert_element_type(behind, np.int32), (1,))
    dims = lax.GatherDimensionNumbers((1,), (1,), (1,), (0,), (0,))
    fill = {"mode": lax.GatherScatterMode.FILL_OR_DROP, "fill_value": 0}
    return [lax.gather(every, lax.expand_dims(group, (1,)), dims, (1, 1, features), **fill)]


def _sort(eqn: _compat.JaxprEqn, values: Sequence[Any], constants: Constants) -> list[Any] | None:
    """Several operands as the order of the keys, one stable sort for each from the last on, and gathers in it."""
    axis = eqn.params["dimension"]
    if len(values) == 1 or not any(map(classes.is_float, eqn.invars)):
        return None
    shape = eqn.outvars[0].aval.shape
    places, order = lax.broadcasted_iota(np.int32, shape, axis), None
    for key in reversed(values[: eqn.params["num_keys"]]):
        ordered = key if order is None else _along(key, order, axis)
        _, found = lax.sort((ordered, places), dimension=axis, is_stable=True, num_keys=1)
        order = found if order is None else _along(order, found, axis)
    counts = np.broadcast_to(np.arange(shape[axis]).reshape([-1 if d == axis else 1 for d in range(len(shape))]), shape)

    def ordered(v: Any, value: Any) -> Any:
        is_places = classes.is_integer(v) and v in constants and np.array_equal(constants.value(v), counts)
        return lax.convert_element_type(order, v.aval.dtype) if is_places else _along(value, order, axis)

    return [ordered(v, value) for v, value in zip(eqn.invars, values, strict=True)]


def _top_k(eqn: _compat.JaxprEqn, values: Sequence[Any], constants: Constants) -> list[Any] | None:
    """The places alone, and what stands there."""
    if not classes.is_float(eqn.invars[0]):
        return None
    _, places = eqn.primitive.bind(*values, **eqn.params)
    return [_along(values[0], places, eqn.params.get("axis", values[0].ndim - 1)), places]


def _approx_top_k(eqn: _compat.JaxprEqn, values: Sequence[Any], constants: Constants) -> list[Any] | None:
    """The exact ones: they are at least as good."""
    params, axis = eqn.params, eqn.params["reduction_dimension"] % eqn.invars[0].aval.ndim
    if not params["aggregate_to_topk"] or not classes.is_float(eqn.invars[0]):
        return None
    x = values[0] if params["is_max_k"] else lax.neg(values[0])
    last = [*(d for d in range(x.ndim) if d != axis), axis]
    _, places = lax.top_k(lax.transpose(x, last), params["k"])
    places = lax.transpose(places, [int(d) for d in np.argsort(last)])
    return [_along(values[0], places, axis), places]


def _along(x: Any, places: Any, axis: int) -> Any:
    """Elements of `x` along a dimension, from places inside of it, one per element of the result."""
    others = tuple(d for d in range(x.ndim) if d != axis)
    numbers = lax.GatherDimensionNumbers(
        offset_dims=(),
        collapsed_slice_dims=(axis,),
        start_index_map=(axis,),
        operand_batching_dims=others,
        start_indices_batching_dims=others,
    )
    starts = lax.expand_dims(places, (places.ndim,))
    return lax.gather(x, starts, numbers, (1,) * x.ndim, mode=lax.GatherScatterMode.CLIP)


def _select(eqn: _compat.JaxprEqn, values: Sequence[Any], constants: Constants) -> list[Any] | None:
    """The case that is known to be chosen everywhere."""
    which = constants.uniform(eqn.invars[0])
    case = None if which is None else values[1 + int(which)]
    return None if case is None or isinstance(case, np.generic) else [case]


def _pow(eqn: _compat.JaxprEqn, values: Sequence[Any], constants: Constants) -> list[Any] | None:
    """Exponents that are integers as reals."""
    if not classes.is_integer(eqn.invars[1]):
        return None
    return [lax.pow(values[0], lax.convert_element_type(values[1], eqn.invars[0].aval.dtype))]


def _in_total_order(eqn: _compat.JaxprEqn, values: Sequence[Any], constants: Constants) -> list[Any]:
    """Comparisons that also order NaN and the two zeros, neither of which integers have."""
    return [{"lt_to": lax.lt, "le_to": lax.le}[eqn.primitive.name](*values)]


def _reduce(eqn: _compat.JaxprEqn, values: Sequence[Any], constants: Constants) -> list[Any] | None:
    """A reduction by one known function, as the primitive of that function."""
    function = _function_of(eqn)
    known = len(values) == 2 and function in _REDUCTIONS and constants.uniform(eqn.invars[1]) is not None
    if not known:
        return None
    reduce, combine = _REDUCTIONS[function]
    return [combine(reduce(values[0], tuple(eqn.params["dimensions"])), values[1])]


def _reduce_window(eqn: _compat.JaxprEqn, values: Sequence[Any], constants: Constants) -> list[Any] | None:
    """A reduction over windows by any function, as that function of strided slices."""
    params = eqn.params
    if len(values) != 2 or math.prod(params["window_dimensions"]) > _MOST_SLICES:
        return None
    (x, start), body = values, params["jaxpr"]
    edges = zip(params["padding"], params["base_dilation"], strict=True)
    x = lax.pad(x, start, [(int(low), int(high), int(d) - 1) for (low, high), d in edges])
    strides, shape = params["window_strides"], eqn.outvars[0].aval.shape
    out = lax.broadcast(start, shape)
    for at in np.ndindex(*params["window_dimensions"]):
        first = [a * d for a, d in zip(at, params["window_dilation"], strict=True)]
        limit = [a + (n - 1) * s + 1 for a, n, s in zip(first, shape, strides, strict=True)]
        part = lax.slice(x, first, limit, strides)
        (out,) = replay.evaluate(body, (out, part))
    return [out]


def _function_of(eqn: _compat.JaxprEqn) -> str | None:
    """The primitive that alone a reduction's function binds, or None."""
    body = _compat.open_jaxpr(eqn.params["jaxpr"])
    if len(body.eqns) != 1 or body.eqns[0].outvars != body.outvars or set(body.eqns[0].invars) != set(body.invars):
        return None
    return body.eqns[0].primitive.name


#: Windows with more elements are no reduction that anyone writes as one.
_MOST_SLICES = 64

#: Primitive -> its reduction along dimensions, and itself.
_REDUCTIONS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "add": (lax.reduce_sum, lax.add),
    "mul": (lax.reduce_prod, lax.mul),
    "max": (lax.reduce_max, lax.max),
    "min": (lax.reduce_min, lax.min),
    "and": (lax.reduce_and, lax.bitwise_and),
    "or": (lax.reduce_or, lax.bitwise_or),
}


def _gather(eqn: _compat.JaxprEqn, values: Sequence[Any], constants: Constants) -> list[Any] | None:
    """At known places inside the operand nothing is filled in; NaN, which integers lack, is no parameter then."""
    params = eqn.params
    operand, places = eqn.invars
    if operand in constants or places not in constants or params["mode"] != lax.GatherScatterMode.FILL_OR_DROP:
        return None
    dims = params["dimension_numbers"].start_index_map
    last = [operand.aval.shape[d] - params["slice_sizes"][d] for d in dims]
    index = np.asarray(constants.value(places))
    if np.any(index < 0) or np.any(index > np.asarray(last)):
        return None
    return [eqn.primitive.bind(*values, **{**params, "mode": lax.GatherScatterMode.CLIP, "fill_value": None})]


def _numbers(variables: Sequence[Any], constants: Constants) -> list[int] | None:
    return [int(constants.value(v)) for v in variables] if all(v in constants for v in variables) else None


#: Primitive -> the function that spells it by others.
FORMS: dict[str, Callable[..., Sequence[Any] | None]] = {
    "split": _split,
    "unstack": _unstack,
    "stack": _stack,
    "tile": _tile,
    "dynamic_slice": _dynamic_slice,
    "dynamic_update_slice": _dynamic_update_slice,
    "scatter": _scatter,
    "scatter-add": _sum_at_places,
    "scatter-mul": _product_at_places,
    "ragged_dot_general": _ragged_dot,
    "sort": _sort,
    "top_k": _top_k,
    "approx_top_k": _approx_top_k,
    "select_n": _select,
    "pow": _pow,
    "lt_to": _in_total_order,
    "le_to": _in_total_order,
    "reduce": _reduce,
    "reduce_window": _reduce_window,
    "gather": _gather,
    "conv_general_dilated": _conv,
}
