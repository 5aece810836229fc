"""How far a region of general arithmetic grows: what no single product, sum or table computes.

    m = reduce_max x; e = exp (sub x m); y = div e (reduce_sum e)      ->      y = region[kind=wide]{ all of it } x

Statistics of rows, and what is computed with them, lose most of their bits when they are stored per tensor on the way,
so they are not: a wide region takes everything between values that must be stored, and rounds once, at its result.
What a product leaves in its epilogue stays there and is stored.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from qcompiler.ir import _compat, classes
from qcompiler.ir.constants import Constants
from qcompiler.ir.program import Program
from qcompiler.passes import _affine, _masks


def members_of(
    root: _compat.JaxprEqn,
    program: Program,
    constants: Constants,
    order: dict[int, int],
    epilogues: set[Any],
    only_inside: Callable[[Any, dict[int, Any]], bool],
) -> list[_compat.JaxprEqn]:
    """The equations of the wide region whose result is that of `root`, in program order; none if it has no rule.

    Args:
      root: an equation with a real result, or one that reads reals.
      program, constants: where it stands.
      order: id of an equation -> its place in the program.
      epilogues: see `epilogues_of`.
      only_inside: `(value, members by id) -> bool`: whether members alone read a value.
    """
    if not is_arithmetic(root, constants):
        return []
    members: dict[int, _compat.JaxprEqn] = {}
    todo = {order[id(root)]: root}
    while todo:
        eqn = todo.pop(max(todo))
        if eqn is not root and not (only_inside(eqn.outvars[0], members) and is_arithmetic(eqn, constants)):
            continue
        members[id(eqn)] = eqn
        for v in eqn.invars:
            made = program.producer.get(v) if isinstance(v, _compat.Var) and v not in constants else None
            if made is not None and v not in epilogues and _is_of_reals(made):
                todo[order[id(made)]] = made
    return sorted(members.values(), key=lambda e: order[id(e)])


def is_arithmetic(eqn: _compat.JaxprEqn, constants: Constants) -> bool:
    """Whether wide regions have a rule for an equation."""
    if eqn.primitive.name not in classes.WIDE or len(eqn.outvars) != 1:
        return False
    return all(classes.is_float(v) or classes.is_integer(v) for v in (*eqn.invars, *eqn.outvars))


def _is_of_reals(eqn: _compat.JaxprEqn) -> bool:
    """Whether it computes from or to reals; integers that the model makes of integers stay as they are."""
    return any(classes.is_float(v) for v in (*eqn.invars, *eqn.outvars))


def role_of(eqn: _compat.JaxprEqn, k: int, constants: Constants) -> str:
    """What an operand of a wide region is to it."""
    atom = eqn.invars[k]
    if atom in constants:
        return "rows" if eqn.primitive.name == "gather" and k == 0 and classes.is_float(atom) else "constant"
    return "term" if classes.is_float(atom) else "integer"


def is_needed(members: Sequence[_compat.JaxprEqn], constants: Constants, is_linear: Callable[[Any], bool]) -> bool:
    """Whether other kinds of region would store a statistic on the way: one that meets other values, or is curved.

    Args:
      members: see `members_of`.
      constants: of the program.
      is_linear: whether a linear region computes an equation.
    """
    statistics: set[Any] = set()
    curved: set[Any] = set()
    for eqn in members:
        name, out = eqn.primitive.name, eqn.outvars[0]
        free = {v for v in eqn.invars if isinstance(v, _compat.Var) and v not in constants and classes.is_float(v)}
        if len(free) > 1 and free & statistics and name not in classes.MERGE:
            return True
        if name in classes.ADDING and free & curved:
            return True
        if name in classes.STATISTIC or free & statistics:
            statistics.add(out)
        if free & curved or (name in classes.ELEMENTWISE and free and not is_linear(eqn)):
            curved.add(out)
    return False


def is_statistic(var: Any, members: Sequence[_compat.JaxprEqn], constants: Constants) -> bool:
    """Whether a value is made of sums and extremes alone: there is one per row, not one per element.

    Args:
      var: the result of a member, or not.
      members: see `members_of`.
      constants: of the program.
    """
    statistics: set[Any] = set()
    for eqn in members:
        free = [v for v in eqn.invars if isinstance(v, _compat.Var) and v not in constants and classes.is_float(v)]
        if eqn.primitive.name in classes.STATISTIC or (free and all(v in statistics for v in free)):
            statistics.update(eqn.outvars)
    return var in statistics


def epilogues_of(program: Program, constants: Constants) -> set[Any]:
    """Values that the region of a dot or conv makes: its product, and what is linear in that and read once.

    A sum with a mask is none: it belongs to what the mask is for.
    """
    found: set[Any] = set()
    masks = _masks.masked_values(program, constants, _masks.MASKS_SCORES)
    for eqn in program.eqns:
        if len(eqn.outvars) != 1:
            continue
        name, out = eqn.primitive.name, eqn.outvars[0]
        free = [v for v in eqn.invars if v not in constants and classes.is_float(v)]
        if out in masks:
            continue
        if name in classes.PRODUCT:
            found.add(out)
            continue
        own = [v for v in free if v in found and program.use_count(v) == 1]
        step = (
            name in classes.IDENTITY
            or classes.is_float_cast(eqn)
            or (name in ("add", "sub") and len(free) == 2)
            or (name in classes.CLAMP and len(free) == 1)
            or _affine.affine_of(eqn, constants, spreads=True) is not None
        )
        if own and step and all(v.aval.shape == out.aval.shape for v in own):
            found.add(out)
    return found
