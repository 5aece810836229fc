"""Functions of one value: which values are such, of which value, and by which equations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qcompiler.ir import _compat, classes
from qcompiler.ir.constants import Constants
from qcompiler.ir.program import Program


def sources_of(program: Program, constants: Constants) -> dict[Any, Any]:
    """Value -> the one stored value that it is a function of, element by element, by numbers alone."""
    source: dict[Any, Any] = {}
    for eqn in program.eqns:
        if eqn.primitive.name not in classes.ELEMENTWISE or len(eqn.outvars) != 1:
            continue
        out, found = eqn.outvars[0], set()
        for v in eqn.invars:
            if v in constants:
                found.update(() if constants.uniform(v) is not None else ("array",))
            else:
                found.add(source.get(v, v))
                if v.aval.shape != out.aval.shape:
                    found.add("broadcast")
        if len(found) == 1 and isinstance(next(iter(found)), _compat.Var) and classes.is_float(next(iter(found))):
            source[out] = next(iter(found))
    return source


def cone(
    root: _compat.JaxprEqn, source: Any, program: Program, constants: Constants, order: Mapping[int, int]
) -> list[_compat.JaxprEqn]:
    """The equations between a source and a root, in program order.

    Args:
      root: the equation that makes a function of the source.
      source: a variable.
      program, constants: where they stand.
      order: id of an equation -> its place in the program.
    """
    found, todo = {id(root): root}, [root]
    while todo:
        for v in todo.pop().invars:
            eqn = program.producer.get(v) if isinstance(v, _compat.Var) and v is not source else None
            if eqn is not None and v not in constants and id(eqn) not in found:
                found[id(eqn)] = eqn
                todo.append(eqn)
    return sorted(found.values(), key=lambda e: order[id(e)])
