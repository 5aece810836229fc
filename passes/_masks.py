"""Which values hold masks: numbers so large that they stand for infinity, whatever a model spells it as.

A mask wins or loses a comparison, or makes an exponential zero. It saturates in every encoding, and widens no range.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from qcompiler import ops
from qcompiler.ir import _compat, classes
from qcompiler.ir.constants import Constants
from qcompiler.ir.program import Program
from qcompiler.numerics import masks

_KEEPS_MASKS = frozenset("add sub mul select_n concatenate pad neg convert_element_type".split()) | classes.VIEW


def masked_values(program: Program, constants: Constants, least: float, masks: Iterable[Any] = ()) -> set[Any]:
    """Variables whose values may hold constants of magnitude `least` or more, by sums and selections with those.

    Args:
      program, constants: where they stand.
      least: see above.
      masks: variables that may hold masks themselves.
    """
    known = lambda v: np.asarray(constants.value(v)) if v in constants and classes.is_float(v) else None
    found: set[Any] = set(masks)
    _mark(program.eqns, found, known, least)
    return found


def mask_inputs(program: Program) -> list[Any]:
    """Real inputs that may be masks: nothing but sums and selections reads them, views between."""
    found = []
    for var in program.input_vars:
        todo, readers = [var], set()
        while todo:
            v = todo.pop()
            for eqn, _ in program.users.get(v, ()):
                if eqn.primitive.name in classes.VIEW | classes.IDENTITY or classes.is_float_cast(eqn):
                    todo.append(eqn.outvars[0])
                else:
                    readers.add(eqn.primitive.name)
        if classes.is_float(var) and readers and readers <= {"add", "sub", "select_n"}:
            found.append(var)
    return found


def _mark(eqns: Sequence[_compat.JaxprEqn], found: set[Any], known: Callable[[Any], Any], least: float) -> None:
    for eqn in eqns:
        if eqn.primitive is ops.region_p:
            body = _compat.open_jaxpr(eqn.params["body"])
            outer = dict(zip(body.invars, eqn.invars, strict=True))
            inside = {v for v, atom in outer.items() if isinstance(atom, _compat.Var) and atom in found}
            _mark(
                body.eqns,
                inside,
                lambda v, outer=outer: known(outer.get(v, v) if isinstance(v, _compat.Var) else v),
                least,
            )
            found.update(v for v, inner in zip(eqn.outvars, body.outvars, strict=True) if _is_marked(inner, inside))
        elif eqn.primitive.name in _KEEPS_MASKS or eqn.primitive is ops.observe_p:
            if any(_is_marked(v, found) or masks.is_mask(known(v), least) for v in eqn.invars):
                found.update(eqn.outvars)


def _is_marked(atom: Any, found: set[Any]) -> bool:
    return isinstance(atom, _compat.Var) and atom in found


def never_masks(program: Program) -> set[Any]:
    """Variables whose values products or sums read: large ones among them are numbers like others."""
    found: set[Any] = set()
    for eqn in program.eqns:
        roles = eqn.params["roles"] if eqn.primitive is ops.region_p else ()
        todo = [v for v, role in zip(eqn.invars, roles, strict=False) if role in ("activation", "reduced")]
        while todo:
            var = todo.pop()
            if not isinstance(var, _compat.Var) or var in found:
                continue
            found.add(var)
            made = program.producer.get(var)
            if made is not None and (made.primitive is ops.observe_p or made.params.get("kind") in ("view", "concat")):
                todo += made.invars
    return found
