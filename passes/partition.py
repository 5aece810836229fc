"""Groups equations into regions that each become one integer op; what fits none stays outside, an island.

    c = conv(x, w); b = add(c, bias); r = max(b, 0)      ->      r = region[kind=conv]{ conv; add; max } x w bias

A region grows back from a value that must be stored (a result, an operand of a product, a value that several read)
through clamps, affine steps, residual adds, maxima and selections to at most one product or sum:

| kind | its anchor | what its operands are |
|---|---|---|
| `dot`, `conv` | a contraction | `activation`, `weight`, `bias` |
| `reduce` | a sum: whole, windowed or cumulative | `reduced` |
| `product` | `x * y`, element by element | `factor` |
| `linear` | none | |
| `table` | none: any function of one value | `index` |
| `view` | none: elements of one value, elsewhere | `value` |
| `concat` | none: elements of several values, in one encoding | `value` |
| `wide` | none: general arithmetic, statistics of rows among it | `rows`: a constant that is gathered from |

In any of them, `term` is a real value that is summed, compared or chosen, `integer` one that the model has as integers,
`constant` what is known. How far each grows is in `_growth`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qcompiler import ops
from qcompiler.ir import _compat, classes, identity, loops, replay
from qcompiler.ir.program import Builder, Program, rewrite
from qcompiler.passes._growth import Grower, Region


def partition(program: Program) -> Program:
    """See the module's docstring. Notes `islands`: one entry per equation that stays float."""
    planner = _Planner(program)
    regions, islands = planner.run()
    ids, constants = program.ids, planner.constants
    root_of = {id(r.root): r for r in regions}
    inside = {id(e) for r in regions for e in r.members} - planner.outside
    values_of: dict[Any, Any] = dict.fromkeys(program.invars)

    def rule(builder: Builder, eqn: _compat.JaxprEqn, values: list[Any]) -> Sequence[Any] | None:
        for atom, value in zip(eqn.invars, values, strict=True):
            if isinstance(atom, _compat.Var) and value is not None:
                values_of[atom] = value
        if id(eqn) in root_of:
            region = root_of[id(eqn)]
            operands = [
                # A weight that the program spreads out from a smaller one or a number is made whole.
                builder.weight(f"{ids[v]}:whole", constants.value(v)) if v in constants and v in program.producer else x
                for v, x in ((v, values_of.get(v)) for v, _ in region.operands)
            ]
            name = ids[(region.anchor or region.root).outvars[0]]
            (result,) = ops.region(
                lambda *args: _run_body(region, args),
                *operands,
                id=name,
                kind=region.kind,
                roles=tuple(role for _, role in region.operands),
            )
            values_of[region.result or eqn.outvars[0]] = result
            return [values_of.get(v) for v in eqn.outvars]
        if id(eqn) in inside:
            return [None] * len(eqn.outvars)
        if eqn.outvars[0] in constants and any(x is None for x in values):
            # Only a region reads it, which has made it whole, and the weight behind it is dropped.
            return [None] * len(eqn.outvars)
        results = _compat.bind(eqn, values)
        values_of.update(zip(eqn.outvars, results, strict=True))
        return results

    islands_note = [
        {
            "id": ids[e.outvars[0]],
            "primitive": e.primitive.name,
            "module_path": identity.module_path(e),
            "source": identity.source_of(e),
            "reason": reason,
            "macs": classes.multiply_adds(e),
        }
        for e, reason in islands
    ]
    out = rewrite(program, _with_inputs(program, values_of, rule), stage="partition")
    total = sum(classes.multiply_adds(e) for e in program.eqns)
    return out.note("islands", islands_note).note("total_macs", total)


def _with_inputs(program: Program, values_of: dict[Any, Any], rule: Any) -> Any:
    """Regions read weights that no equation outside reads, so their traced values come from the builder."""

    def wrapped(builder: Builder, eqn: _compat.JaxprEqn, values: list[Any]) -> Any:
        for var, name in program.weight_of.items():
            values_of[var] = builder.get(name)
        return rule(builder, eqn, values)

    return wrapped


def _run_body(region: Region, args: Sequence[Any]) -> list[Any]:
    """Evaluates the members on the operands' values, each equation under its own source line."""
    read = dict(zip(region.operands, args, strict=True))
    env: dict[Any, Any] = {}

    def value(eqn: _compat.JaxprEqn, k: int, atom: Any) -> Any:
        if isinstance(atom, _compat.Literal):
            return atom.val
        role = region.roles.get((id(eqn), k))
        return env[atom] if role is None else read[atom, role]

    for eqn in region.members:
        values = [value(eqn, k, v) for k, v in enumerate(eqn.invars)]
        with _compat.source_context(eqn.source_info.traceback, eqn.source_info.name_stack, eqn.ctx):
            env.update(zip(eqn.outvars, _compat.bind(eqn, values), strict=True))
    return [env[region.result or region.root.outvars[0]]]


class _Planner:
    """Decides, from the results back, which region each equation joins, or why it stays outside."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.grower = Grower(program)
        self.constants = self.grower.constants
        self.outside: set[int] = set()
        self.regions: list[Region] = []
        self.islands: list[tuple[_compat.JaxprEqn, str]] = []

    def run(self) -> tuple[list[Region], list[tuple[_compat.JaxprEqn, str]]]:
        needed = self.grower.needed
        for eqn in reversed(replay.live_equations(self.program.jaxpr)):
            if not any(v in needed for v in eqn.outvars) and not _compat.has_side_effects(eqn):
                continue
            known = eqn.outvars[0] in self.constants
            region = None if known else self.grower.grow(eqn)
            if region is not None:
                self.regions.append(region)
                needed.update(v for v, _ in region.operands)
                continue
            self.outside.add(id(eqn))
            reason = None if known else self.why_island(eqn)
            if reason is not None:
                self.islands.append((eqn, reason))
            needed.update(v for v in eqn.invars if isinstance(v, _compat.Var))
        return self.regions[::-1], self.islands[::-1]

    def why_island(self, eqn: _compat.JaxprEqn) -> str | None:
        """Why an equation stays float; None if no real number is computed or read by it."""
        atoms = [*eqn.invars, *eqn.outvars]
        if loops.is_loop(eqn):
            return None
        if not any(classes.is_float(v) for v in atoms if v not in self.constants):
            return None
        if not any(map(classes.is_float, eqn.outvars)):
            return "computes no real number from one"
        name = eqn.primitive.name
        if name == "conv_general_dilated":
            return "convolution of a constant has no integer rule yet"
        return classes.FLOAT_ONLY.get(name, "primitive has no integer rule yet")
