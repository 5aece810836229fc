"""A program with other constants: what passes that move factors and shifts between layers end with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jax import lax

from qcompiler.ir import _compat
from qcompiler.ir.program import Builder, Program, rewrite

#: An equation, the position of a constant operand, and the array in its place, which broadcasts against the result.
Operand = tuple[_compat.JaxprEqn, int, np.ndarray]


def bind(eqn: _compat.JaxprEqn, values: Sequence[Any]) -> list[Any]:
    """The results of an equation some of whose operands are arrays over the channels now."""
    if eqn.primitive.name == "clamp":
        # Its bounds are numbers, or as large as what they bound.
        low, x, high = values
        return [lax.min_p.bind(lax.max_p.bind(x, low), high)]
    return list(_compat.bind(eqn, values))


def with_constants(
    program: Program,
    stage: str,
    weights: Mapping[str, np.ndarray],
    operands: Sequence[Operand],
    shifts: Sequence[tuple[_compat.JaxprEqn, np.ndarray]] = (),
) -> Program:
    """The program with constants replaced.

    Args:
      program: the program before.
      stage: the pass.
      weights: name -> its new array, for all that read it.
      operands: constants for single equations. A weight that nothing else reads keeps its name.
      shifts: equations and what is added to their results, which it broadcasts against.
    """
    names = program.weight_of
    updates, own = dict(weights), dict[int, dict[int, tuple[str, np.ndarray]]]()
    for eqn, position, array in operands:
        atom = eqn.invars[position]
        name = names.get(atom) if isinstance(atom, _compat.Var) else None
        if name is not None and program.use_count(atom) == 1 and array.shape == atom.aval.shape:
            updates[name] = array
        else:
            name = f"{program.ids[eqn.outvars[0]]}:{position}:{stage}"
            own.setdefault(id(eqn), {})[position] = (name, array)
    shift_of = {id(eqn): (f"{program.ids[eqn.outvars[0]]}:{stage}", array) for eqn, array in shifts}

    def rule(builder: Builder, eqn: _compat.JaxprEqn, values: list[Any]) -> Sequence[Any] | None:
        if id(eqn) not in own and id(eqn) not in shift_of:
            return None
        for position, constant in own.get(id(eqn), {}).items():
            values[position] = builder.weight(*constant)
        results = bind(eqn, values)
        if id(eqn) in shift_of:
            results[0] = lax.add_p.bind(results[0], builder.weight(*shift_of[id(eqn)]))
        return results

    return rewrite(program, rule, stage=stage, weights=updates)
