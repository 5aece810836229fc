"""How far a region of general arithmetic grows: what no single product, sum or table computes.

    m = reduce_max x; e = exp (sub x m); y = div e (reduce_sum e)      ->      y = region[kind=wide]{ all of it } x

Statistics of rows, and what is computed with them, lose most of their bits when they are stored per tensor on the way,
so they are not: a wide region takes everything between values that must be stored, and rounds once, at its result.
What a product leaves in its epilogue stays there and is stored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from qcompiler.ir import _compat, classes
from qcompiler.ir.constants import Constants
from qcompiler.ir.program import Program
from qcompiler.numerics import masks
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


def is_needed(
    members: Sequence[_compat.JaxprEqn],
    constants: Constants,
    is_linear: Callable[[Any], bool],
    source: Mapping[Any, Any],
    widens: Callable[[Any], bool],
) -> bool:
    """Whether other kinds of region would store a statistic on the way that meets other values, or what widens ranges.

    Args:
      members: see `members_of`.
      constants: of the program.
      is_linear: whether a linear region computes an equation.
      source: value -> the one value that it is a function of, by numbers alone, if it is.
      widens: whether such a value may spread over more binades than that, as squares do.
    """
    statistics: set[Any] = set()
    spread: set[Any] = set()
    for eqn in members:
        name, out = eqn.primitive.name, eqn.outvars[0]
        free = {v for v in eqn.invars if isinstance(v, _compat.Var) and v not in constants and classes.is_float(v)}
        if len(free) > 1 and free & statistics and name not in classes.MERGE:
            return True
        if name in classes.ADDING and free & spread:
            return True
        if name in classes.STATISTIC or free & statistics:
            statistics.add(out)
        if out in source:
            wider = source[out] in spread or widens(out)
        else:
            wider = bool(free & spread) or (name in classes.ELEMENTWISE and bool(free) and not is_linear(eqn))
        if wider:
            spread.add(out)
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


def widens(cone: Sequence[_compat.JaxprEqn], source: Any, constants: Constants) -> bool:
    """Whether a function of one value may spread it over more binades: squares and exponentials do, activations do not.

    It is looked at far out and close to zero, where it grows as a power of the value. NaN is beside its domain.

    Args:
      cone: its equations, in order, elementwise and with numbers alone as constants; the last makes its result.
      source: the variable it is a function of.
      constants: of the program.
    """
    points = np.array([_FAR / 2, _FAR, 1 / _FAR, 0.5 / _FAR])
    env: dict[Any, Any] = {source: np.stack([points, -points]).astype(source.aval.dtype)}

    def read(atom: Any) -> Any:
        known = constants.uniform(atom) if atom in constants else None
        return env[atom] if known is None else np.full(env[source].shape, known, atom.aval.dtype)

    with jax.ensure_compile_time_eval():
        for eqn in cone:
            env[eqn.outvars[0]] = _compat.bind(eqn, [read(v) for v in eqn.invars])[0]
    found = np.abs(np.asarray(env[cone[-1].outvars[0]]).astype(np.float64))
    half, far, near, nearer = np.max(np.where(np.isnan(found), 0, found), axis=0)
    return bool(np.isinf(far) or far > _FASTER * 2 * half or nearer > _FASTER * near)


#: Where a function shows how it grows, beyond all that activations do around zero; and by how much more a power grows.
_FAR, _FASTER = 2.0**12, 2.0**0.25


def epilogues_of(program: Program, constants: Constants) -> set[Any]:
    """Values that the region of a dot or conv makes: its product, and what is linear in that and read once.

    A sum with a mask is none: it belongs to what the mask is for.
    """
    found: set[Any] = set()
    masked = _masks.masked_values(program, constants, masks.MASKS_SCORES, _masks.mask_inputs(program))
    for eqn in program.eqns:
        if len(eqn.outvars) != 1:
            continue
        name, out = eqn.primitive.name, eqn.outvars[0]
        free = [v for v in eqn.invars if v not in constants and classes.is_float(v)]
        if out in masked:
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
