"""A program as text, one equation a line: variable, type, primitive, what matters of its parameters, id, source."""

from __future__ import annotations

from typing import Any

from qcompiler.ir import _compat, identity, loops
from qcompiler.ir.program import Program

#: Parameters that repeat what the line says already, or say nothing.
_HIDDEN = frozenset(
    {
        "id",
        "body",
        "sharding",
        "out_sharding",
        "precision",
        "preferred_element_type",
        "accuracy",
        "roles",
        "computation",
        "jaxpr",
        "branches",
        "cond_jaxpr",
        "body_jaxpr",
    }
)


def program_text(program: Program) -> str:
    """The whole program; bodies of regions are indented below them."""
    names: dict[Any, str] = {}
    for var, weight in program.weight_of.items():
        names[var] = weight
    for var, name in zip(program.input_vars, program.signature.input_names, strict=True):
        names[var] = f"%{name}"
    lines = [f"program {program.stage}"]
    lines += [f"  weight {n}: {_type(v.aval)}" for v, n in program.weight_of.items()]
    lines += [
        f"  input %{n}: {_type(v.aval)}" for v, n in zip(program.input_vars, program.signature.input_names, strict=True)
    ]
    lines += _body_lines(program.eqns, names, "  ", program.ids)
    lines.append("  return " + ", ".join(_name(v, names) for v in program.outvars))
    return "\n".join(lines) + "\n"


def _body_lines(eqns: list[Any], names: dict[Any, str], indent: str, ids: dict[Any, str] | None) -> list[str]:
    lines = []
    counter = 0
    for eqn in eqns:
        for var in eqn.outvars:
            counter += 1
            names[var] = f"{'%' if ids else '.'}{counter}"
        results = ", ".join(f"{names[v]}: {_type(v.aval)}" for v in eqn.outvars)
        operands = " ".join(_name(v, names) for v in eqn.invars)
        line = f"{indent}{results} = {eqn.primitive.name}{_params(eqn)} {operands}"
        if ids is not None:
            line += f"    # {ids[eqn.outvars[0]]}  {identity.source_of(eqn)}"
        lines.append(line)
        for body, reads in _bodies(eqn):
            inner: dict[Any, str] = {}
            for place, (var, k) in enumerate(zip(_compat.invars_of(body), reads, strict=True)):
                inner[var] = f".in{place}" if k is None else _name(eqn.invars[k], names)
            inside = _compat.open_jaxpr(body)
            lines += _body_lines(inside.eqns, inner, indent + "    ", None)
            lines.append(f"{indent}    yield " + ", ".join(_name(v, inner) for v in inside.outvars))
    return lines


def _bodies(eqn: _compat.JaxprEqn) -> list[tuple[Any, list[int | None]]]:
    """What an equation holds, and which of its operands each argument is; None where it differs from step to step."""
    if "body" in eqn.params:
        return [(eqn.params["body"], list(range(len(eqn.invars))))]
    if eqn.primitive in _compat.CONTROL_FLOW:
        return [
            (body, [k if place < held else None for place, k in enumerate(reads)])
            for body, reads, held in loops.parts_of(eqn)
        ]
    return []


def _type(aval: Any) -> str:
    return f"{aval.dtype.name}[{','.join(map(str, aval.shape))}]"


def _name(atom: Any, names: dict[Any, str]) -> str:
    if isinstance(atom, _compat.Literal):
        return str(atom.val)
    return names.get(atom, "?")


def _params(eqn: _compat.JaxprEqn) -> str:
    shown = []
    for key, value in eqn.params.items():
        if key in _HIDDEN or value is None:
            continue
        shown.append(f"{key}={getattr(value, 'name', value)}")
    return f"[{' '.join(shown)}]" if shown else ""
