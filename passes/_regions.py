"""Reading region equations: their anchor, their roles, and how a weight's dimensions lie in the result."""

from __future__ import annotations

from typing import Any

import numpy as np

from qcompiler import ops
from qcompiler.ir import _compat, classes, contraction
from qcompiler.ir.program import Program


def is_region(eqn: _compat.JaxprEqn) -> bool:
    """Whether the equation is a region."""
    return eqn.primitive is ops.region_p


#: What an operand of an anchor is to its region.
ANCHORED = frozenset({"activation", "weight", "reduced", "factor"})


#: Kinds whose result is elements of what they read, so that all of it is in one encoding.
REARRANGING = frozenset({"view", "concat"})


def anchor_of(eqn: _compat.JaxprEqn) -> _compat.JaxprEqn | None:
    """The product or sum in the body of a region before `fuse`, or None."""
    body = _compat.open_jaxpr(eqn.params["body"])
    known = {v for v, role in zip(body.invars, eqn.params["roles"], strict=True) if role in ANCHORED}
    return next((e for e in body.eqns if e.invars and all(_is_in(v, known) for v in anchored(e))), None)


def behind_views(program: Program, var: Any) -> Any:
    """The value that a value is a view of, or it itself."""
    while (made := program.producer.get(var)) is not None and made.params.get("kind") == "view":
        var = made.invars[0]
    return var


def anchored(eqn: _compat.JaxprEqn) -> list[Any]:
    """The operands of a product or sum that it multiplies or adds: of sums at places the updates."""
    return eqn.invars[2:] if eqn.primitive.name == "scatter-add" else eqn.invars


def _is_in(atom: Any, variables: set[Any]) -> bool:
    return isinstance(atom, _compat.Var) and atom in variables


def operand_index(eqn: _compat.JaxprEqn, atom: Any) -> int | None:
    """The operand of the region that a variable of its body is, or None."""
    invars = _compat.invars_of(eqn.params["body"])
    return next((k for k, v in enumerate(invars) if v is atom), None)


def weight_position(eqn: _compat.JaxprEqn) -> int | None:
    """Which operand (0 or 1) of the anchor is the constant weight; None if there is none."""
    anchor = anchor_of(eqn)
    if anchor is None or anchor.primitive.name not in classes.PRODUCT:
        return None
    for position in (1, 0):
        k = operand_index(eqn, anchor.invars[position])
        if k is not None and eqn.params["roles"][k] == "weight":
            return position
    return None


def gathered(eqn: _compat.JaxprEqn) -> dict[int, tuple[int, ...]]:
    """Operand of a wide region that rows are gathered from -> its dimensions that indices go along."""
    body = _compat.open_jaxpr(eqn.params["body"])
    rows = {v: k for k, (v, role) in enumerate(zip(body.invars, eqn.params["roles"], strict=True)) if role == "rows"}
    found = {}
    for inner in body.eqns:
        if inner.primitive.name == "gather" and _is_in(inner.invars[0], set(rows)):
            numbers = inner.params["dimension_numbers"]
            found[rows[inner.invars[0]]] = tuple(sorted(numbers.start_index_map))
    return found


def accumulator_scale(eqn: _compat.JaxprEqn, scales: dict[int, np.ndarray]) -> np.ndarray:
    """Scale of the int32 accumulator of a region's product or sum, float32, broadcastable to its result.

    Args:
      eqn: a region with an anchor.
      scales: operand of the region -> its scale.
    """
    anchor, position = anchor_of(eqn), weight_position(eqn)
    product = np.float32(1)
    for k, atom in enumerate(anchored(anchor)):
        scale = np.asarray(scales[operand_index(eqn, atom)])
        product = product * (contraction.on_result(scale, anchor, k) if k == position else scale)
    return np.asarray(product, np.float32)


def weight_shape(eqn: _compat.JaxprEqn) -> str:
    """The shape of a region's weight, or of the table that rows are gathered from, as `3x3x64x64`; empty if none."""
    pairs = zip(eqn.invars, eqn.params["roles"], strict=True)
    return next(("x".join(map(str, v.aval.shape)) for v, role in pairs if role in ("weight", "rows")), "")
