"""Softmax, layer norm and erf as ONNX names them, found in a float program.

    exp(s - m) / sum(exp(s - m))                      ->  Softmax(s)
    (x - mean(x)) * (rsqrt(var(x) + eps) * scale)     ->  LayerNormalization(x, scale, epsilon=eps)

A jaxpr spells them out; the peers' quantizers know them as single ops and leave them alone. Spelled out, every sum and
product in them would be given 8 bits, and the peers would be compared with a model that no exporter hands to them.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from qcompiler.ir import Program, _compat

#: Equations that hand on their operand's values, in another shape.
_SHAPE_ONLY = ("reshape", "broadcast_in_dim", "expand_dims", "squeeze", "stop_gradient", "copy")


@dataclasses.dataclass(frozen=True)
class LayerNorm:
    """`(x - mean) / sqrt(var + epsilon)` over the last axis of `x`, to be multiplied by the atom `scale`."""

    x: Any
    scale: Any
    epsilon: float


def _made_by(program: Program, atom: Any, *names: str) -> Any:
    """The equation that makes an atom if it is one of these primitives, else None."""
    eqn = None if isinstance(atom, _compat.Literal) else program.producer.get(atom)
    return eqn if eqn is not None and eqn.primitive.name in names else None


def _through_shapes(program: Program, atom: Any) -> Any:
    """What an atom's values come from, behind reshapes and broadcasts."""
    while (eqn := _made_by(program, atom, *_SHAPE_ONLY)) is not None:
        atom = eqn.invars[0]
    return atom


def _number(atom: Any) -> float | None:
    """The value of a scalar literal."""
    return float(atom.val) if isinstance(atom, _compat.Literal) and np.ndim(atom.val) == 0 else None


def softmax_of(program: Program, quotient: Any) -> tuple[Any, int] | None:
    """The scores and the axis if a division is the last equation of a softmax.

    What was subtracted from the scores, their maximum usually, need only be the same along the axis: it cancels.
    """
    numerator, below = quotient.invars
    total = _made_by(program, _through_shapes(program, below), "reduce_sum")
    exponential = _made_by(program, numerator, "exp")
    if total is None or exponential is None or total.invars[0] is not numerator or len(total.params["axes"]) != 1:
        return None
    (axis,) = map(int, total.params["axes"])
    rank = len(numerator.aval.shape)
    expected = tuple(1 if a == axis else n for a, n in enumerate(numerator.aval.shape))
    if tuple(below.aval.shape) != expected:
        return None
    difference = _made_by(program, exponential.invars[0], "sub")
    if difference is None:
        return exponential.invars[0], axis
    scores, shift = difference.invars
    constant = len(shift.aval.shape) in (0, rank) and (not shift.aval.shape or shift.aval.shape[axis] == 1)
    return (scores, axis) if constant and scores.aval.shape == numerator.aval.shape else (exponential.invars[0], axis)


def _mean_of(program: Program, atom: Any) -> Any:
    """What an atom is the mean of over its last axis, or None."""
    quotient = _made_by(program, _through_shapes(program, atom), "div", "mul")
    if quotient is None:
        return None
    total = _made_by(program, quotient.invars[0], "reduce_sum")
    factor = _number(quotient.invars[1])
    if total is None or factor is None:
        return None
    x = total.invars[0]
    count = x.aval.shape[-1]
    wanted = count if quotient.primitive.name == "div" else 1 / count
    last = tuple(map(int, total.params["axes"])) == (len(x.aval.shape) - 1,)
    return x if last and np.isclose(factor, wanted, rtol=1e-6) else None


def _is_variance_of(program: Program, atom: Any, x: Any) -> bool:
    """Whether an atom is `mean(x**2) - mean(x)**2`, or that but no less than 0, over the last axis of `x`."""
    atom = _through_shapes(program, atom)
    if (bound := _made_by(program, atom, "max")) is not None:
        low, high = bound.invars if _number(bound.invars[0]) == 0 else bound.invars[::-1]
        if _number(low) != 0:
            return False
        atom = _through_shapes(program, high)
    difference = _made_by(program, atom, "sub")
    if difference is None:
        return False
    squares = _made_by(program, _mean_of(program, difference.invars[0]), "square")
    of_mean = _made_by(program, difference.invars[1], "square")
    return (
        squares is not None
        and of_mean is not None
        and squares.invars[0] is x
        and _mean_of(program, of_mean.invars[0]) is x
    )


def layer_norm_of(program: Program, product: Any) -> LayerNorm | None:
    """The parts if a product is the last equation of a layer norm but for its bias."""
    for centred, factor in (product.invars, product.invars[::-1]):
        difference, scaled = _made_by(program, centred, "sub"), _made_by(program, factor, "mul")
        if difference is None or scaled is None:
            continue
        x, mean = difference.invars
        if _mean_of(program, mean) is not x:
            continue
        for inverse, scale in (scaled.invars, scaled.invars[::-1]):
            root = _made_by(program, inverse, "rsqrt")
            total = None if root is None else _made_by(program, root.invars[0], "add")
            if total is None:
                continue
            variance, epsilon = total.invars
            if _number(epsilon) is not None and _is_variance_of(program, variance, x):
                return LayerNorm(x, scale, _number(epsilon))
    return None
