"""How a rotation of the channels passes through each primitive: what a mark on some values demands of others.

    y = a + b           all three are rotated; a constant among them is
    y = x * r           one number r per row: both are rotated
    y = x * g           a gain per channel: y is x, and the products that read it have the gain in their weights
    y = x @ W           along the contracted dimension W is rotated; along the others y or W is
    sum(x * x)          over the channels, is the same after any rotation
    reshape, ...        the channels stay whole

A rule is given the stream and an equation that makes or reads a value of it; it raises `Refused` where no rotation can
pass.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from qcompiler.ir import _compat, contraction, identity
from qcompiler.passes import _affine
from qcompiler.passes._rotation import Mark, Refused, Stream

Rule = Callable[[Stream, _compat.JaxprEqn], None]
#: dimension(equation, dimension of the operand or result) -> the channels' dimension on the other side, or None.
_Moved = Callable[[_compat.JaxprEqn, int], "int | None"]


def _refuse(eqn: _compat.JaxprEqn, why: str) -> Refused:
    return Refused(f"{identity.describe(eqn)} {why}")


# Sums and choices


def _alike(first: int) -> Rule:
    """Operands from `first` on and the result are rotated alike; constants among them are."""

    def rule(stream: Stream, eqn: _compat.JaxprEqn) -> None:
        operands = eqn.invars[first:]
        marks = [m for v in (*operands, eqn.outvars[0]) if (m := stream.mark_of(v)) is not None]
        if not marks:
            raise _refuse(eqn, "is decided by it")
        mark = marks[0]
        if any(not stream.is_of_rows(v, mark.dim) for v in eqn.invars[:first]):
            raise _refuse(eqn, "chooses channel by channel")
        held = [v for v in operands if v in stream.constants and not _is_zero(stream, v)]
        if held and (mark.centred or not mark.plain):
            _shifted(stream, eqn, mark)
            return
        if eqn.primitive.name == "sub" and _subtracts_rows(stream, eqn, mark):
            return
        if mark.shift is not None:
            raise _refuse(eqn, "adds to a norm's result")
        for position, atom in enumerate(eqn.invars):
            if position < first or _is_zero(stream, atom):
                continue
            if atom in stream.constants:
                stream.write(eqn, position, mark.dim, mark)
            else:
                stream.demand(atom, mark)
        stream.demand(eqn.outvars[0], mark)

    return rule


def _is_zero(stream: Stream, atom: Any) -> bool:
    number = stream.constants.uniform(atom)
    return number is not None and number == 0


def _shifted(stream: Stream, eqn: _compat.JaxprEqn, mark: Mark) -> None:
    """A norm's shift: its readers take it up."""
    x, *rest = eqn.invars
    if eqn.primitive.name == "add" and x in stream.constants:
        x, rest = rest[0], [x]
    sums = eqn.primitive.name in ("add", "sub") and stream.mark_of(x) is not None
    if not sums or x.aval.shape != eqn.outvars[0].aval.shape:
        raise _refuse(eqn, "reads a norm's result beside a constant")
    value = stream.along(rest[0], mark)
    if value is None and (number := stream.constants.uniform(rest[0])) is not None:
        value = np.full(stream.channels, float(number))
    if value is None:
        raise _refuse(eqn, "adds a constant that varies from row to row to a norm's result")
    shift = (mark.shift if mark.shift is not None else 0.0) + (value if eqn.primitive.name == "add" else -value)
    gain = mark.gain if mark.gain is not None else np.ones(stream.channels)
    stream.drop(eqn, 0 if x is eqn.invars[0] else 1)
    stream.demand(eqn.outvars[0], dataclasses.replace(mark, gain=gain, shift=shift))


def _subtracts_rows(stream: Stream, eqn: _compat.JaxprEqn, mark: Mark) -> bool:
    """Whether a number per row is subtracted; it must be the mean over the channels, or nothing is rotated."""
    x, row = eqn.invars
    if row in stream.constants or x in stream.constants or not stream.is_of_rows(row, mark.dim):
        return False
    stream.demand(x, dataclasses.replace(mark, centred=False))
    stream.subtracted[id(eqn)] = eqn, x
    stream.demand(eqn.outvars[0], dataclasses.replace(mark, centred=True))
    return True


def _concatenate(stream: Stream, eqn: _compat.JaxprEqn) -> None:
    marks = [m for v in (*eqn.invars, eqn.outvars[0]) if (m := stream.mark_of(v)) is not None]
    if marks[0].dim == eqn.params["dimension"]:
        raise _refuse(eqn, "joins other channels to it")
    _alike(0)(stream, eqn)


def _pad(stream: Stream, eqn: _compat.JaxprEqn) -> None:
    mark = stream.mark_of(eqn.invars[0]) or stream.mark_of(eqn.outvars[0])
    if mark is None or mark.shift is not None or not _is_zero(stream, eqn.invars[1]):
        raise _refuse(eqn, "pads it with a number")
    if any(eqn.params["padding_config"][mark.dim]):
        raise _refuse(eqn, "adds channels")
    if eqn.invars[0] in stream.constants:
        stream.write(eqn, 0, mark.dim, mark)
    else:
        stream.demand(eqn.invars[0], mark)
    stream.demand(eqn.outvars[0], mark)


# Products, element by element


def _product(stream: Stream, eqn: _compat.JaxprEqn) -> None:
    x, other = eqn.invars
    if x is other:
        _square(stream, eqn)
        return
    if stream.mark_of(other) is not None and stream.mark_of(x) is not None:
        raise _refuse(eqn, "multiplies its values with one another")
    position = _carrier(stream, eqn)
    x, other = eqn.invars[position], eqn.invars[1 - position]
    mark = stream.mark_of(x) or stream.mark_of(eqn.outvars[0])
    assert mark is not None
    if x in stream.constants or (eqn.primitive.name == "div" and position == 1):
        raise _refuse(eqn, "is no product of its channels by one number")
    if stream.is_of_rows(other, mark.dim):
        stream.demand(x, mark)
        stream.demand(eqn.outvars[0], _scaled(stream, eqn, mark, other))
        return
    if stream.mark_of(x) is None:
        raise _refuse(eqn, "scales each of its channels by a factor of its own")
    _gained(stream, eqn, position, mark)


def _carrier(stream: Stream, eqn: _compat.JaxprEqn) -> int:
    """The operand that has the channels."""
    marked = [k for k in (0, 1) if stream.mark_of(eqn.invars[k]) is not None]
    if not marked:
        mark = stream.mark_of(eqn.outvars[0])
        assert mark is not None
        marked = [k for k in (0, 1) if not stream.is_of_rows(eqn.invars[k], mark.dim)]
    if len(marked) != 1:
        raise _refuse(eqn, "scales each of its channels by a factor of its own")
    return marked[0]


def _scaled(stream: Stream, eqn: _compat.JaxprEqn, mark: Mark, by: Any) -> Mark:
    """The mark behind a factor per row, by which a shift is multiplied, too."""
    if mark.shift is None:
        return mark
    number = stream.constants.uniform(by)
    if number is None:
        raise _refuse(eqn, "scales the rows of a norm's result")
    factor = 1.0 / float(number) if eqn.primitive.name == "div" else float(number)
    return dataclasses.replace(mark, shift=mark.shift * factor)


def _gained(stream: Stream, eqn: _compat.JaxprEqn, position: int, mark: Mark) -> None:
    """A gain per channel, by itself or multiplied into a number per row: its readers take it up."""
    x, other = eqn.invars[position], eqn.invars[1 - position]
    divides = eqn.primitive.name == "div"
    of_row = None
    if other in stream.constants:
        gain = stream.along(other, mark)
    else:
        of_row = None if mark.shift is not None else stream.row_gain(other, mark)
        gain = None if of_row is None else of_row[2]
    if gain is None or x.aval.shape != eqn.outvars[0].aval.shape:
        raise _refuse(eqn, "scales each of its channels by a factor of its own")
    if divides:
        if not np.all(gain):
            raise _refuse(eqn, "divides by zero")
        gain = 1.0 / gain
    if of_row is None:
        stream.drop(eqn, position)
    else:
        stream.drop(of_row[0], of_row[1])
    whole = gain if mark.gain is None else mark.gain * gain
    shift = None if mark.shift is None else mark.shift * gain
    stream.demand(eqn.outvars[0], dataclasses.replace(mark, gain=whole, shift=shift))


def _square(stream: Stream, eqn: _compat.JaxprEqn) -> None:
    """A square, which must be summed over the channels."""
    x = eqn.invars[0]
    mark = stream.mark_of(x)
    if mark is None or not mark.plain or eqn.params.get("y", 2) != 2:
        raise _refuse(eqn, "is no square of its channels")
    todo: list[tuple[Any, float]] = [(eqn.outvars[0], 1.0)]
    while todo:
        var, times = todo.pop()
        if any(v is var for v in stream.program.outvars):
            raise _refuse(eqn, "makes squares that are a result")
        for user, _ in stream.program.users.get(var, ()):
            name, step = user.primitive.name, _affine.affine_of(user, stream.constants)
            if name == "reduce_sum" and mark.dim in user.params["axes"]:
                if not mark.centred:
                    # Beside the channels, rows may be summed as well; such a sum is no variance of one row.
                    alone = len(user.params["axes"]) == 1
                    stream.squares[user.outvars[0]] = x, times if alone else math.nan
            elif name in ("convert_element_type", "copy"):
                todo.append((user.outvars[0], times))
            elif step is not None and step[1].size == 1 and not np.any(step[2]):
                todo.append((user.outvars[0], times * step[1].item()))
            else:
                raise _refuse(user, "reads the squares of single channels")


# Views


def _view(forth: _Moved, back: _Moved) -> Rule:
    """A rearrangement of operand 0, or of elements of it, in which the channels stay whole and in order."""

    def rule(stream: Stream, eqn: _compat.JaxprEqn) -> None:
        x, out = eqn.invars[0], eqn.outvars[0]
        mark, made = stream.mark_of(x), stream.mark_of(out)
        side = mark or made
        assert side is not None
        dim = forth(eqn, side.dim) if mark is not None else back(eqn, side.dim)
        if dim is None:
            raise _refuse(eqn, "takes its channels apart")
        if mark is not None:
            stream.demand(out, mark.moved(dim))
        elif x in stream.constants:
            stream.write(eqn, 0, dim, side)
        else:
            stream.demand(x, side.moved(dim))

    return rule


def _stays(eqn: _compat.JaxprEqn, dim: int) -> int | None:
    return dim


def _reshaped(eqn: _compat.JaxprEqn, dim: int, forward: bool) -> int | None:
    shapes = (eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape)
    old, new = shapes if forward else shapes[::-1]
    before = math.prod(old[:dim])
    return next((d for d, n in enumerate(new) if n == old[dim] and math.prod(new[:d]) == before), None)


def _squeezed(eqn: _compat.JaxprEqn, dim: int, forward: bool) -> int | None:
    left = [d for d in range(eqn.invars[0].aval.ndim) if d not in eqn.params["dimensions"]]
    return left.index(dim) if forward else left[dim]


def _broadcast_back(eqn: _compat.JaxprEqn, dim: int) -> int | None:
    dims = eqn.params["broadcast_dimensions"]
    return dims.index(dim) if dim in dims else None


def _sliced(eqn: _compat.JaxprEqn, dim: int) -> int | None:
    return dim if eqn.outvars[0].aval.shape[dim] == eqn.invars[0].aval.shape[dim] else None


def _gathered(eqn: _compat.JaxprEqn, dim: int, forward: bool) -> int | None:
    """Whole channels at places that indices say; what stands for places outside must be zeros, or NaN."""
    numbers, operand = eqn.params["dimension_numbers"], eqn.invars[0].aval
    gone = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
    kept = [d for d in range(operand.ndim) if d not in gone]
    pairs = dict(zip(kept, numbers.offset_dims, strict=True))
    source = dim if forward else {o: d for d, o in pairs.items()}.get(dim)
    if source not in pairs or eqn.params["slice_sizes"][source] != operand.shape[source]:
        return None
    fill = eqn.params["fill_value"]
    if fill is not None and fill != 0 and not np.isnan(fill):
        return None
    return pairs[source] if forward else source


# Sums over rows, or over the channels


def _sum(stream: Stream, eqn: _compat.JaxprEqn) -> None:
    (x,), axes = eqn.invars, eqn.params["axes"]
    mark, made = stream.mark_of(x), stream.mark_of(eqn.outvars[0])
    kept = [d for d in range(x.aval.ndim) if d not in axes]
    if mark is None:
        assert made is not None
        stream.demand(x, made.moved(kept[made.dim]))
    elif mark.dim in axes:
        if len(axes) > 1 or not mark.plain or mark.centred or made is not None:
            raise _refuse(eqn, "sums its channels")
        stream.sums[eqn.outvars[0]] = x
    else:
        count = math.prod(x.aval.shape[d] for d in axes)
        shift = None if mark.shift is None else mark.shift * count
        stream.demand(eqn.outvars[0], dataclasses.replace(mark, dim=kept.index(mark.dim), shift=shift))


# Contractions


def _dot(stream: Stream, eqn: _compat.JaxprEqn) -> None:
    contract, batch = eqn.params["dimension_numbers"]
    made = stream.mark_of(eqn.outvars[0])
    for k in (0, 1):
        mark = stream.mark_of(eqn.invars[k])
        if mark is not None and mark.dim in contract[k]:
            if made is not None and made.dim in contraction.weight_dims(eqn, k):
                raise _refuse(eqn, "makes its channels from rows of it")
            dim = contract[1 - k][contract[k].index(mark.dim)]
            _contracted(stream, eqn, 1 - k, dim, mark)
        elif mark is not None:
            _mixed(stream, eqn, k, mark)
        elif made is not None:
            dim = contraction.weight_dims(eqn, k).get(made.dim)
            if dim is None:
                continue
            if dim in batch[k]:
                raise _refuse(eqn, "computes each of its channels apart")
            if eqn.invars[k] in stream.constants:
                stream.write(eqn, k, dim, made)
            else:
                stream.demand(eqn.invars[k], made.moved(dim))


def _contracted(stream: Stream, eqn: _compat.JaxprEqn, position: int, dim: int, mark: Mark) -> None:
    """The channels are summed over: the other operand is rotated likewise, so that their product stays."""
    other = eqn.invars[position]
    if other in stream.constants:
        stream.read(eqn, position, dim, mark)
        return
    if not mark.plain:
        raise _refuse(eqn, "reads a norm's gain, and no weight")
    if not mark.centred:
        stream.uncentred[id(eqn)] = eqn
    stream.demand(other, mark.moved(dim))


def _mixed(stream: Stream, eqn: _compat.JaxprEqn, position: int, mark: Mark) -> None:
    """Rows are summed over: the result has the channels."""
    if mark.dim in eqn.params["dimension_numbers"][1][position]:
        raise _refuse(eqn, "computes each of its channels apart")
    if mark.shift is not None:
        raise _refuse(eqn, "sums the rows of a norm's result")
    dims = {d: r for r, d in contraction.weight_dims(eqn, position).items()}
    stream.demand(eqn.outvars[0], mark.moved(dims[mark.dim]))


def _conv(stream: Stream, eqn: _compat.JaxprEqn) -> None:
    numbers = eqn.params["dimension_numbers"]
    mark, made = stream.mark_of(eqn.invars[0]), stream.mark_of(eqn.outvars[0])
    if eqn.params["feature_group_count"] != 1 or eqn.params["batch_group_count"] != 1:
        raise _refuse(eqn, "computes groups of its channels apart")
    if eqn.invars[1] not in stream.constants:
        raise _refuse(eqn, "has a kernel that inputs reach")
    if mark is not None:
        if mark.dim != numbers.lhs_spec[1] or (mark.shift is not None and contraction.pads(eqn)):
            raise _refuse(eqn, "reads a norm's shift beside padding, or rows as channels")
        stream.read(eqn, 1, numbers.rhs_spec[1], mark)
    if made is not None:
        if made.dim != numbers.out_spec[1]:
            raise _refuse(eqn, "makes its channels from neighbouring ones")
        stream.write(eqn, 1, numbers.rhs_spec[0], made)


def _both(moved: Callable[[_compat.JaxprEqn, int, bool], int | None]) -> Rule:
    return _view(lambda eqn, dim: moved(eqn, dim, True), lambda eqn, dim: moved(eqn, dim, False))


RULES: dict[str, Rule] = {
    **dict.fromkeys(("add", "sub", "neg", "add_any"), _alike(0)),
    "select_n": _alike(1),
    "concatenate": _concatenate,
    "pad": _pad,
    **dict.fromkeys(("mul", "div"), _product),
    **dict.fromkeys(("square", "integer_pow"), _square),
    **dict.fromkeys(("copy", "copy_p", "name", "stop_gradient", "convert_element_type"), _view(_stays, _stays)),
    **dict.fromkeys(("slice", "dynamic_slice"), _view(_sliced, _sliced)),
    "reshape": _both(_reshaped),
    "squeeze": _both(_squeezed),
    "gather": _both(_gathered),
    "transpose": _view(
        lambda eqn, dim: eqn.params["permutation"].index(dim), lambda eqn, dim: eqn.params["permutation"][dim]
    ),
    "broadcast_in_dim": _view(lambda eqn, dim: eqn.params["broadcast_dimensions"][dim], _broadcast_back),
    "reduce_sum": _sum,
    "dot_general": _dot,
    "conv_general_dilated": _conv,
}
