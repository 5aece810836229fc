"""How a positive factor per channel passes through each primitive: one rule per primitive.

    max(x / s, 0) = max(x, 0) / s        min(x / s, 6 / s) = min(x, 6) / s        x / s + y / s = (x + y) / s

A rule is given the walk and an equation of which some operand is an activation; it returns the groups of the result, or
None where the factor cannot pass. It may tie groups, and it notes constants that must be divided, too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from qcompiler.ir import _compat, classes
from qcompiler.passes._scale_groups import compressed, reshaped

if TYPE_CHECKING:
    from qcompiler.passes._channel_walk import Walk

Rule = Callable[["Walk", _compat.JaxprEqn], "np.ndarray | None"]
_Passing = Callable[["Walk", _compat.JaxprEqn, np.ndarray], "np.ndarray | None"]
RULES: dict[str, Rule] = {}


def _rule(*primitives: str) -> Callable[[Rule], Rule]:
    def register(rule: Rule) -> Rule:
        RULES.update(dict.fromkeys(primitives, rule))
        return rule

    return register


def _of_one(*primitives: str) -> Callable[[_Passing], _Passing]:
    """Registers a rule for what is computed of operand 0; it is given the groups of that."""

    def register(rule: _Passing) -> _Passing:
        def of_operand(walk: Walk, eqn: _compat.JaxprEqn) -> np.ndarray | None:
            groups = walk.at(eqn.invars[0])
            return None if groups is None else rule(walk, eqn, groups)

        RULES.update(dict.fromkeys(primitives, of_operand))
        return rule

    return register


@_of_one("copy", "copy_p", "name", "stop_gradient", "neg", "abs")
def _same(walk: Walk, eqn: _compat.JaxprEqn, groups: np.ndarray) -> np.ndarray | None:
    return groups


@_of_one("convert_element_type")
def _cast(walk: Walk, eqn: _compat.JaxprEqn, groups: np.ndarray) -> np.ndarray | None:
    return groups if classes.is_float(eqn.outvars[0]) else None


# Several values, or a value and a constant


@_rule("add", "sub", "max", "min")
def _joined(walk: Walk, eqn: _compat.JaxprEqn) -> np.ndarray | None:
    """Values that meet share their factor; a constant is divided by it."""
    return _shared(walk, eqn, range(2))


@_rule("lt", "le", "gt", "ge", "eq", "ne")
def _compared(walk: Walk, eqn: _compat.JaxprEqn) -> np.ndarray | None:
    """Which of two values is larger does not change when both are divided."""
    integers = any(walk.at(eqn.invars[k]) is None for k in walk.activations(eqn))
    return None if integers else _shared(walk, eqn, range(2))


@_rule("clamp")
def _clamped(walk: Walk, eqn: _compat.JaxprEqn) -> np.ndarray | None:
    """Bounds are divided; see `equalize` for how the equation is spelled then."""
    return _shared(walk, eqn, range(3)) if walk.activations(eqn) == [1] else None


@_rule("sign")
def _sign(walk: Walk, eqn: _compat.JaxprEqn) -> np.ndarray | None:
    return walk.groups.pinned(eqn.outvars[0].aval.ndim, "a sign has no scale")


@_rule("select_n")
def _selected(walk: Walk, eqn: _compat.JaxprEqn) -> np.ndarray | None:
    """Constants of other than 0 and infinity would need an element for each of the value's."""
    cases = range(1, len(eqn.invars))
    scaled = [walk.constants.uniform(eqn.invars[k]) for k in cases if eqn.invars[k] in walk.constants]
    if not all(n is not None and (n == 0 or np.isinf(n)) for n in scaled):
        return None
    return _shared(walk, eqn, cases)


def _shared(walk: Walk, eqn: _compat.JaxprEqn, positions: range) -> np.ndarray | None:
    """The groups of operands that have one factor."""
    values = [k for k in walk.activations(eqn) if k in positions]
    if not values or any(walk.at(eqn.invars[k]) is None for k in values):
        return None
    groups = walk.of[eqn.invars[values[0]]]
    for k in values[1:]:
        groups = walk.groups.tie(groups, walk.of[eqn.invars[k]])
    for k in positions:
        if k not in values:
            groups = walk.divided(eqn, k, groups)
    return groups


@_rule("mul")
def _multiplied(walk: Walk, eqn: _compat.JaxprEqn) -> np.ndarray | None:
    """A value's factor passes, if what it is multiplied by has none."""
    values = [walk.at(eqn.invars[k]) for k in walk.activations(eqn)]
    if any(groups is None for groups in values):
        return None
    free = [groups for groups in values if not walk.groups.is_pinned(groups).all()]
    return None if len(free) > 1 else (free or values)[0]


@_rule("div")
def _divided(walk: Walk, eqn: _compat.JaxprEqn) -> np.ndarray | None:
    """The factor of what is divided passes, if what it is divided by has none."""
    groups, by = map(walk.at, eqn.invars)
    constant = eqn.invars[1] in walk.constants
    return groups if constant or (by is not None and walk.groups.is_pinned(by).all()) else None


# Where elements lie


@_of_one("reshape")
def _reshape(walk: Walk, eqn: _compat.JaxprEqn, groups: np.ndarray) -> np.ndarray | None:
    if eqn.params.get("dimensions") is not None:
        return None
    return compressed(reshaped(groups, eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape))


@_of_one("squeeze")
def _squeeze(walk: Walk, eqn: _compat.JaxprEqn, groups: np.ndarray) -> np.ndarray:
    return groups.squeeze(tuple(eqn.params["dimensions"]))


@_of_one("expand_dims")
def _expand_dims(walk: Walk, eqn: _compat.JaxprEqn, groups: np.ndarray) -> np.ndarray:
    return np.expand_dims(groups, tuple(eqn.params["dimensions"]))


@_of_one("transpose")
def _transpose(walk: Walk, eqn: _compat.JaxprEqn, groups: np.ndarray) -> np.ndarray:
    return groups.transpose(eqn.params["permutation"])


@_of_one("broadcast_in_dim")
def _broadcast(walk: Walk, eqn: _compat.JaxprEqn, groups: np.ndarray) -> np.ndarray:
    shape = [1] * eqn.outvars[0].aval.ndim
    for d, n in zip(eqn.params["broadcast_dimensions"], groups.shape, strict=True):
        shape[d] = n
    return groups.reshape(shape)


@_of_one("rev")
def _reversed(walk: Walk, eqn: _compat.JaxprEqn, groups: np.ndarray) -> np.ndarray:
    return np.flip(groups, tuple(eqn.params["dimensions"]))


@_of_one("slice")
def _slice(walk: Walk, eqn: _compat.JaxprEqn, groups: np.ndarray) -> np.ndarray:
    params = eqn.params
    strides = params["strides"] or (1,) * groups.ndim
    ranges = map(slice, params["start_indices"], params["limit_indices"], strides)
    return compressed(groups[tuple(r if n > 1 else slice(None) for r, n in zip(ranges, groups.shape, strict=True))])


@_of_one("dynamic_slice")
def _dynamic_slice(walk: Walk, eqn: _compat.JaxprEqn, groups: np.ndarray) -> np.ndarray:
    return walk.groups.tie_along(groups, _changed(eqn.invars[0], eqn.outvars[0]))


@_rule("dynamic_update_slice")
def _dynamic_update_slice(walk: Walk, eqn: _compat.JaxprEqn) -> np.ndarray | None:
    """What is replaced and what replaces it share a factor that is the same along the dimensions of the place."""
    dims, found = _changed(*eqn.invars[:2]), []
    for atom in eqn.invars[:2]:
        if (groups := walk.at(atom)) is not None:
            found.append(walk.groups.tie_along(groups, dims))
        elif walk.constants.uniform(atom) != 0:
            return None
    return found[0] if len(found) == 1 else walk.groups.tie(*found)


@_of_one("gather")
def _gather(walk: Walk, eqn: _compat.JaxprEqn, groups: np.ndarray) -> np.ndarray | None:
    """The factor passes along the dimensions that are taken whole."""
    operand, dims, sizes = eqn.invars[0], eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    if eqn.params.get("fill_value") not in (None, 0):
        return None
    gone = {*dims.collapsed_slice_dims, *dims.operand_batching_dims}
    whole = [d for d in range(groups.ndim) if d not in gone and sizes[d] == operand.aval.shape[d]]
    groups = walk.groups.tie_along(groups, [d for d in range(groups.ndim) if d not in whole])
    shape = [1] * eqn.outvars[0].aval.ndim
    for d, out in zip([d for d in range(groups.ndim) if d not in gone], dims.offset_dims, strict=True):
        shape[out] = groups.shape[d]
    return groups.reshape(shape)


@_of_one("pad")
def _pad(walk: Walk, eqn: _compat.JaxprEqn, groups: np.ndarray) -> np.ndarray | None:
    """Zeros between or beside elements have any factor."""
    fill = walk.constants.uniform(eqn.invars[1])
    if fill is None or not (fill == 0 or np.isinf(fill)):
        return None
    shape = eqn.outvars[0].aval.shape
    for axis, (low, _, between) in enumerate(eqn.params["padding_config"]):
        if groups.shape[axis] == 1:
            continue
        out = walk.groups.new([n if d != axis else shape[axis] for d, n in enumerate(groups.shape)])
        places = low + np.arange(groups.shape[axis]) * (between + 1)
        kept = (places >= 0) & (places < shape[axis])
        index: list[Any] = [slice(None)] * groups.ndim
        index[axis] = places[kept]
        out[tuple(index)] = groups.compress(kept, axis=axis)
        groups = out
    return groups


@_rule("concatenate")
def _concatenate(walk: Walk, eqn: _compat.JaxprEqn) -> np.ndarray | None:
    axis, parts = eqn.params["dimension"], []
    for atom in eqn.invars:
        if (groups := walk.at(atom)) is not None:
            parts.append(groups)
        elif walk.constants.uniform(atom) == 0:
            parts.append(walk.groups.new([atom.aval.shape[axis] if d == axis else 1 for d in range(atom.aval.ndim)]))
        else:
            parts.append(walk.groups.pinned(atom.aval.ndim, "beside a constant"))
    shape = [max(p.shape[d] for p in parts) for d in range(parts[0].ndim)]
    wide = []
    for atom, part in zip(eqn.invars, parts, strict=True):
        shape[axis] = atom.aval.shape[axis]
        wide.append(np.broadcast_to(part, shape))
    return compressed(np.concatenate(wide, axis=axis))


# Many elements together


@_of_one("reduce_sum", "reduce_max", "reduce_min")
def _reduced(walk: Walk, eqn: _compat.JaxprEqn, groups: np.ndarray) -> np.ndarray | None:
    axes = tuple(eqn.params["axes"])
    return walk.groups.tie_along(groups, axes).squeeze(axes)


@_of_one("argmax", "argmin")
def _found(walk: Walk, eqn: _compat.JaxprEqn, groups: np.ndarray) -> np.ndarray | None:
    return _reduced(walk, eqn, groups)


@_of_one("reduce_window_sum", "reduce_window_max", "reduce_window_min")
def _windows(walk: Walk, eqn: _compat.JaxprEqn, groups: np.ndarray) -> np.ndarray:
    return walk.groups.tie_along(groups, _changed(eqn.invars[0], eqn.outvars[0], eqn))


@_of_one("cumsum", "cummax", "cummin")
def _cumulated(walk: Walk, eqn: _compat.JaxprEqn, groups: np.ndarray) -> np.ndarray:
    return walk.groups.tie_along(groups, [eqn.params["axis"]])


@_of_one("sort")
def _sorted(walk: Walk, eqn: _compat.JaxprEqn, groups: np.ndarray) -> np.ndarray:
    return walk.groups.tie_along(groups, [eqn.params["dimension"]])


def _changed(before: Any, after: Any, eqn: _compat.JaxprEqn | None = None) -> list[int]:
    """Dimensions that are of other sizes, or that windows of an equation span or step over."""
    dims = {d for d, sizes in enumerate(zip(before.aval.shape, after.aval.shape, strict=True)) if len(set(sizes)) > 1}
    for key in () if eqn is None else ("window_dimensions", "window_strides", "base_dilation", "window_dilation"):
        dims |= {d for d, n in enumerate(eqn.params[key]) if n > 1}
    return sorted(dims)
