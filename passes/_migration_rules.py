"""How a factor per channel passes through each primitive: what a mark on some values of an equation demands of others.

    y = a + b       all three have the same factor
    y = a * b       y has that of a or that of b
    y = max(a, 0)   the same, whatever the factor; a > 0 is as it was
    y = x @ W       along the contracted dimension W has the reciprocal of x's factor; along the others y has it
    reshape, ...    labels move as elements do

A rule gives alternatives, the better first: it is better for a factor to end in constants soon. What has no rule passes
no factor: what is not positively homogeneous.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from qcompiler.ir import _compat, classes
from qcompiler.passes._migration_factors import RESULT, Choice, Demand, Mark, Rules, Spread
from qcompiler.passes._scale_groups import reshaped

_Alternatives = Sequence[Choice]
_NONE: _Alternatives = ()


def _given(*demands: Demand) -> Choice:
    return lambda branch: demands


def _marked(spread: Spread, eqn: _compat.JaxprEqn, positions: Sequence[int]) -> dict[int, Mark]:
    found = {k: spread.mark_of(eqn, k) for k in positions}
    return {k: mark for k, mark in found.items() if mark is not None}


def _any_factor(spread: Spread, atom: Any) -> bool:
    """Whether a constant is the same after any positive factor: zero and infinities."""
    number = spread.constants.uniform(atom)
    return number is not None and (number == 0 or np.isinf(number))


# Element by element


def _alike(first: int) -> Callable[[Spread, _compat.JaxprEqn], _Alternatives]:
    """Operands from `first` on and the result have one factor: sums, extremes, choices, magnitudes, copies."""

    def rule(spread: Spread, eqn: _compat.JaxprEqn) -> _Alternatives:
        positions = [k for k in range(first, len(eqn.invars)) if not _any_factor(spread, eqn.invars[k])]
        found = _marked(spread, eqn, [RESULT, *positions])
        if not found:
            # The mark is on what is no number of the result, such as a condition.
            return _NONE
        mark = next(iter(found.values()))
        return [_given(*((k, mark.labels, mark.power) for k in (RESULT, *positions)))]

    return rule


def _compared(spread: Spread, eqn: _compat.JaxprEqn) -> _Alternatives:
    """What is compared has one factor, and the result none."""
    positions = [k for k in (0, 1) if not _any_factor(spread, eqn.invars[k])]
    mark = next(iter(_marked(spread, eqn, positions).values()))
    return [_given(*((k, mark.labels, mark.power) for k in positions))]


def _product(signs: tuple[int, int]) -> Callable[[Spread, _compat.JaxprEqn], _Alternatives]:
    """The result's factor comes from one operand; a sign of -1 for what is divided by."""

    def rule(spread: Spread, eqn: _compat.JaxprEqn) -> _Alternatives:
        if eqn.invars[0] is eqn.invars[1]:
            return _NONE
        result, found = spread.mark_of(eqn, RESULT), _marked(spread, eqn, (0, 1))
        if len(found) == 2:
            # One takes back what the other has.
            mark = found[0]
            return _NONE if result else [_given((1, mark.labels, -mark.power * signs[0] * signs[1]))]
        if found:
            ((k, mark),) = found.items()
            passed = _given((RESULT, mark.labels, mark.power * signs[k]))
            other, wide = eqn.invars[1 - k], [d for d, n in enumerate(mark.labels.shape) if n > 1]
            if result or other not in spread.constants or not _has(other, wide):
                return [passed]
            return [passed, _given((1 - k, mark.labels, -mark.power * signs[0] * signs[1]))]
        assert result is not None
        wide = [d for d, n in enumerate(result.labels.shape) if n > 1]
        ranked = {k: _reluctance(spread, eqn.invars[k], wide) for k in (0, 1)}
        options = sorted((k for k in ranked if ranked[k] is not None), key=ranked.__getitem__)
        return [_given((k, result.labels, result.power * signs[k])) for k in options]

    return rule


def _has(atom: Any, wide: Sequence[int]) -> bool:
    """Whether a value has an element of its own for each position along these dimensions."""
    return atom.aval.ndim > max(wide, default=0) and all(atom.aval.shape[d] > 1 for d in wide)


def _reluctance(spread: Spread, atom: Any, wide: Sequence[int]) -> int | None:
    """Of the factors of a product, which rather gets the mark of the result; the least first, None if it must not.

    A gain per channel is made for it. A value computed with the channels is next, and tables of positions and channels
    come last. A number would have to become a constant per channel, as in the midst of an activation function, whose
    table would then be one per channel.
    """
    if not _has(atom, wide):
        return None
    if atom not in spread.constants:
        return 1
    return 0 if all(n == 1 for d, n in enumerate(atom.aval.shape) if d not in wide) else 2


# Views


def _view(
    forth: Callable[[Spread, _compat.JaxprEqn, np.ndarray], np.ndarray],
    back: Callable[[Spread, _compat.JaxprEqn, np.ndarray], np.ndarray],
) -> Callable[[Spread, _compat.JaxprEqn], _Alternatives]:
    """A rearrangement of one operand: how labels of the operand are those of the result, and the other way."""

    def rule(spread: Spread, eqn: _compat.JaxprEqn) -> _Alternatives:
        operand, result = spread.mark_of(eqn, 0), spread.mark_of(eqn, RESULT)
        if operand is not None:
            return [lambda branch: [(RESULT, forth(branch, eqn, operand.labels), operand.power)]]
        if result is None:
            return _NONE
        return [lambda branch: [(0, back(branch, eqn, result.labels), result.power)]]

    return rule


def _reshape_forth(spread: Spread, eqn: _compat.JaxprEqn, labels: np.ndarray) -> np.ndarray:
    return reshaped(labels, eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape)


def _reshape_back(spread: Spread, eqn: _compat.JaxprEqn, labels: np.ndarray) -> np.ndarray:
    return reshaped(labels, eqn.outvars[0].aval.shape, eqn.invars[0].aval.shape)


def _transpose_forth(spread: Spread, eqn: _compat.JaxprEqn, labels: np.ndarray) -> np.ndarray:
    return labels.transpose(eqn.params["permutation"])


def _transpose_back(spread: Spread, eqn: _compat.JaxprEqn, labels: np.ndarray) -> np.ndarray:
    return labels.transpose(np.argsort(eqn.params["permutation"]))


def _broadcast_forth(spread: Spread, eqn: _compat.JaxprEqn, labels: np.ndarray) -> np.ndarray:
    shape = [1] * eqn.outvars[0].aval.ndim
    for size, d in zip(labels.shape, eqn.params["broadcast_dimensions"], strict=True):
        shape[d] = size
    return labels.reshape(shape)


def _broadcast_back(spread: Spread, eqn: _compat.JaxprEqn, labels: np.ndarray) -> np.ndarray:
    kept = {int(d): n for d, n in zip(eqn.params["broadcast_dimensions"], eqn.invars[0].aval.shape, strict=True)}
    repeated = [d for d, n in enumerate(labels.shape) if n > 1 and kept.get(d, 1) == 1]
    labels = spread.tied(labels, repeated)
    return labels.reshape([labels.shape[d] for d in kept])


def _slices(eqn: _compat.JaxprEqn) -> list[slice]:
    params = eqn.params
    strides = params["strides"] or (1,) * len(params["start_indices"])
    return [slice(*s) for s in zip(params["start_indices"], params["limit_indices"], strides, strict=True)]


def _slice_forth(spread: Spread, eqn: _compat.JaxprEqn, labels: np.ndarray) -> np.ndarray:
    return labels[tuple(s if n > 1 else slice(None) for s, n in zip(_slices(eqn), labels.shape, strict=True))]


def _slice_back(spread: Spread, eqn: _compat.JaxprEqn, labels: np.ndarray) -> np.ndarray:
    shape = eqn.invars[0].aval.shape
    # What a part does not vary along, the whole does not either.
    whole = spread.fresh([n if size > 1 else 1 for n, size in zip(shape, labels.shape, strict=True)])
    whole[tuple(s if n > 1 else slice(None) for s, n in zip(_slices(eqn), whole.shape, strict=True))] = labels
    return whole


def _summed_forth(spread: Spread, eqn: _compat.JaxprEqn, labels: np.ndarray) -> np.ndarray:
    axes = [int(a) for a in eqn.params["axes"]]
    return spread.tied(labels, axes).squeeze(tuple(axes))


def _summed_back(spread: Spread, eqn: _compat.JaxprEqn, labels: np.ndarray) -> np.ndarray:
    return np.expand_dims(labels, tuple(int(a) for a in eqn.params["axes"]))


def _concatenate(spread: Spread, eqn: _compat.JaxprEqn) -> _Alternatives:
    """Each operand has the labels of its place in the result."""
    axis, positions = eqn.params["dimension"], range(len(eqn.invars))
    found, result = _marked(spread, eqn, positions), spread.mark_of(eqn, RESULT)
    mark = result or next(iter(found.values()))
    sizes = [v.aval.shape[axis] for v in eqn.invars]
    starts = np.cumsum([0, *sizes])
    labels = mark.labels
    if result is None and labels.shape[axis] > 1:
        parts = []
        for k, size in enumerate(sizes):
            shape = [size if d == axis else n for d, n in enumerate(labels.shape)]
            parts.append(np.broadcast_to(found[k].labels, shape) if k in found else spread.fresh(shape))
        labels = np.concatenate(parts, axis)
    demands = [(RESULT, labels, mark.power)]
    for k, start in enumerate(starts[:-1]):
        own = np.take(labels, range(start, starts[k + 1]), axis) if labels.shape[axis] > 1 else labels
        if not _any_factor(spread, eqn.invars[k]):
            demands.append((k, own, mark.power))
    return [_given(*demands)]


# Products that contract


def _dims_in_result(eqn: _compat.JaxprEqn) -> tuple[dict[int, int], dict[int, int]]:
    """Per operand of a dot: its dimension -> that of the result, for those that are not contracted."""
    contract, batch = eqn.params["dimension_numbers"]
    start, found = len(batch[0]), []
    for k in (0, 1):
        free = [d for d in range(eqn.invars[k].aval.ndim) if d not in contract[k] and d not in batch[k]]
        found.append({d: n for n, d in enumerate(batch[k])} | {d: start + n for n, d in enumerate(free)})
        start += len(free)
    return found[0], found[1]


def _moved(labels: np.ndarray, dims: dict[int, int], rank: int) -> np.ndarray:
    """Labels of a value of another rank, in which dimension d is `dims[d]`; size 1 along its other dimensions."""
    order = sorted(dims, key=dims.__getitem__)
    shape = [1] * rank
    for d in order:
        shape[dims[d]] = labels.shape[d]
    rest = [d for d in range(labels.ndim) if d not in dims]
    return labels.transpose(*rest, *order).reshape(shape)


def contracted_labels(eqn: _compat.JaxprEqn, position: int, labels: np.ndarray) -> bool:
    """Whether labels of an operand of a dot vary along a dimension that it contracts."""
    return any(labels.shape[d] > 1 for d in eqn.params["dimension_numbers"][0][position])


def _dot(spread: Spread, eqn: _compat.JaxprEqn) -> _Alternatives:
    contract, batch = eqn.params["dimension_numbers"]
    if eqn.invars[0] is eqn.invars[1]:
        return _NONE
    result, found = spread.mark_of(eqn, RESULT), _marked(spread, eqn, (0, 1))
    inside = {k: contracted_labels(eqn, k, mark.labels) for k, mark in found.items()}
    if len(set(inside.values())) > 1 or (any(inside.values()) and result is not None):
        return _NONE
    maps = _dims_in_result(eqn)
    if any(inside.values()):
        k, mark = next(iter(found.items()))
        shared = dict(zip((*contract[k], *batch[k]), (*contract[1 - k], *batch[1 - k]), strict=True))

        def across(branch: Spread) -> Sequence[Demand]:
            own = branch.tied(mark.labels, [d for d, n in enumerate(mark.labels.shape) if n > 1 and d not in shared])
            other = _moved(own, shared, eqn.invars[1 - k].aval.ndim)
            return [(k, own, mark.power), (1 - k, other, -mark.power)]

        return [across]
    rank = eqn.outvars[0].aval.ndim
    if len(found) > 1:
        return _NONE
    if found:
        ((k, mark),) = found.items()
        return [_given((RESULT, _moved(mark.labels, maps[k], rank), mark.power))]
    assert result is not None
    wide = {d for d, n in enumerate(result.labels.shape) if n > 1}

    def back(k: int) -> Choice:
        def choice(branch: Spread) -> Sequence[Demand]:
            own = branch.tied(result.labels, sorted(wide - set(maps[k].values())))
            return [(k, _moved(own, {n: d for d, n in maps[k].items()}, eqn.invars[k].aval.ndim), result.power)]

        return choice

    options = [k for k in (0, 1) if wide & set(maps[k].values())]
    return [back(k) for k in sorted(options, key=lambda k: eqn.invars[k] not in spread.constants)]


_SHAPED = _view(_reshape_forth, _reshape_back)
_SUMMED = _view(_summed_forth, _summed_back)


#: Primitive -> its rule.
RULES: Rules = {
    "add": _alike(0),
    "sub": _alike(0),
    "neg": _alike(0),
    "abs": _alike(0),
    "max": _alike(0),
    "min": _alike(0),
    "clamp": _alike(0),
    **dict.fromkeys(classes.COMPARE, _compared),
    "select_n": _alike(1),
    "convert_element_type": _alike(0),
    "copy": _alike(0),
    "copy_p": _alike(0),
    "name": _alike(0),
    "stop_gradient": _alike(0),
    "mul": _product((1, 1)),
    "div": _product((1, -1)),
    "reshape": _SHAPED,
    "squeeze": _SHAPED,
    "expand_dims": _SHAPED,
    "transpose": _view(_transpose_forth, _transpose_back),
    "broadcast_in_dim": _view(_broadcast_forth, _broadcast_back),
    "slice": _view(_slice_forth, _slice_back),
    "reduce_sum": _SUMMED,
    "reduce_max": _SUMMED,
    "reduce_min": _SUMMED,
    "concatenate": _concatenate,
    "dot_general": _dot,
}
