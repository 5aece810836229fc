"""Groups equations into regions that each become one integer op; what fits none stays outside, an island.

    c = conv(x, w); b = add(c, bias); r = max(b, 0)      ->      r = region[kind=conv]{ conv; add; max } x w bias

A region grows back from a value that must be stored (a result, an operand of a product, a value read twice) through
single-use clamps, affine steps and residual adds to at most one product or sum (kinds `dot`, `conv`, `reduce`; `linear`
where there is none). A chain that computes any function of one value is a `table`; shape changes and maxima, which keep
scale and zero point, are a `view`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from qcompiler import ops
from qcompiler.ir import _compat, classes, contraction, identity, replay
from qcompiler.ir.constants import Constants
from qcompiler.ir.program import Builder, Program, rewrite
from qcompiler.passes import _affine

KIND_OF_ANCHOR = {"dot_general": "dot", "conv_general_dilated": "conv", "reduce_sum": "reduce"}


@dataclasses.dataclass
class Region:
    """The plan of one region.

    Attributes:
      kind: see the module's docstring.
      root: equation whose result is the region's.
      members: all equations of the body, in program order, constants computed on the way among them.
      operands: variables read from outside, each with its role: `activation`, `weight`, `bias`, `term`, `reduced`,
        `index`, `value`, `constant`.
      anchor: the product or sum, if any.
    """

    kind: str
    root: _compat.JaxprEqn
    members: list[_compat.JaxprEqn]
    operands: list[tuple[Any, str]]
    anchor: _compat.JaxprEqn | None = None


def partition(program: Program) -> Program:
    """See the module's docstring. Notes `islands`: one entry per equation that stays float."""
    planner = _Planner(program)
    regions, islands = planner.run()
    ids, constants = program.ids, Constants(program)
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
            results = ops.region(
                lambda *args: _run_body(region, args),
                *operands,
                id=name,
                kind=region.kind,
                roles=tuple(role for _, role in region.operands),
            )
            values_of[eqn.outvars[0]] = results[0]
            return results
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
    env = {var: value for (var, _), value in zip(region.operands, args, strict=True)}
    for eqn in region.members:
        values = [v.val if isinstance(v, _compat.Literal) else env[v] for v in eqn.invars]
        with _compat.source_context(eqn.source_info.traceback, eqn.source_info.name_stack, eqn.ctx):
            env.update(zip(eqn.outvars, _compat.bind(eqn, values), strict=True))
    return [env[region.root.outvars[0]]]


class _Planner:
    def __init__(self, program: Program) -> None:
        self.program = program
        self.constants = Constants(program)
        self.producer = program.producer
        self.order = {id(e): k for k, e in enumerate(program.eqns)}
        self.source = self._sources()
        self.outside: set[int] = set()
        self.needed: set[Any] = {v for v in program.outvars if isinstance(v, _compat.Var)}
        self.regions: list[Region] = []
        self.islands: list[tuple[_compat.JaxprEqn, str]] = []

    def run(self) -> tuple[list[Region], list[tuple[_compat.JaxprEqn, str]]]:
        live = replay.live_equations(self.program.jaxpr)
        needed = self.needed
        for eqn in reversed(live):
            if not any(v in needed for v in eqn.outvars) and not _compat.has_side_effects(eqn):
                continue
            if eqn.outvars[0] in self.constants:
                self.outside.add(id(eqn))
                needed.update(v for v in eqn.invars if isinstance(v, _compat.Var))
                continue
            region = self.grow(eqn)
            if region is None:
                self.outside.add(id(eqn))
                reason = self.why_island(eqn)
                if reason is not None:
                    self.islands.append((eqn, reason))
                needed.update(v for v in eqn.invars if isinstance(v, _compat.Var))
            else:
                self.regions.append(region)
                needed.update(v for v, _ in region.operands)
        return self.regions[::-1], self.islands[::-1]

    def grow(self, root: _compat.JaxprEqn) -> Region | None:
        """The region whose result is that of `root`, or None if `root` must stay float."""
        if len(root.outvars) != 1 or not classes.is_float(root.outvars[0]):
            return None
        if any(not classes.is_float(v) for v in root.invars if v not in self.constants):
            if root.outvars[0] not in self.source:
                return None
        if root.primitive.name in classes.VIEW and root.invars[0] not in self.constants:
            return self.grow_view(root)
        return self.grow_table(root) or self.grow_linear(root)

    # Views

    def grow_view(self, root: _compat.JaxprEqn) -> Region | None:
        if any(v not in self.constants for v in root.invars[1:]):
            return None
        members, var = [root], root.invars[0]
        while self.program.use_count(var) == 1 and self.is_view(self.producer.get(var)):
            members.append(self.producer[var])
            var = self.producer[var].invars[0]
        return self.region("view", root, members, {(id(members[-1]), 0): "value"})

    def is_view(self, eqn: _compat.JaxprEqn | None) -> bool:
        if eqn is None or eqn.primitive.name not in classes.VIEW or len(eqn.outvars) != 1:
            return False
        return eqn.invars[0] not in self.constants and all(v in self.constants for v in eqn.invars[1:])

    # Tables

    def _sources(self) -> dict[Any, Any]:
        """Value -> the one stored value that it is a function of, element by element, by numbers alone."""
        source: dict[Any, Any] = {}
        for eqn in self.program.eqns:
            if eqn.primitive.name not in classes.ELEMENTWISE or len(eqn.outvars) != 1:
                continue
            out, found = eqn.outvars[0], set()
            for v in eqn.invars:
                if v in self.constants:
                    found.update(() if self.constants.uniform(v) is not None else ("array",))
                else:
                    found.add(source.get(v, v))
                    if v.aval.shape != out.aval.shape:
                        found.add("broadcast")
            if len(found) == 1 and isinstance(next(iter(found)), _compat.Var) and classes.is_float(next(iter(found))):
                source[out] = next(iter(found))
        return source

    def cone(self, root: _compat.JaxprEqn, source: Any) -> list[_compat.JaxprEqn]:
        """The equations between a source and a root, in program order."""
        found, todo = {id(root): root}, [root]
        while todo:
            for v in todo.pop().invars:
                eqn = self.producer.get(v) if isinstance(v, _compat.Var) and v is not source else None
                if eqn is not None and v not in self.constants and id(eqn) not in found:
                    found[id(eqn)] = eqn
                    todo.append(eqn)
        return sorted(found.values(), key=lambda e: self.order[id(e)])

    def grow_table(self, root: _compat.JaxprEqn) -> Region | None:
        source = self.source.get(root.outvars[0])
        if source is None:
            return None
        members = self.cone(root, source)
        source = self.index_of(root, source, members)
        members = self.cone(root, source)
        if self.is_plain(members):
            return None
        roles = {(id(e), k): "index" for e in members for k, v in enumerate(e.invars) if v is source}
        return self.region("table", root, members, roles)

    def index_of(self, root: Any, source: Any, members: list[Any]) -> Any:
        """The value that the table of a root reads: its source, or what a linear region makes of that and stores.

        Otherwise the product before a bias that others read too would be stored as well, and computed twice.
        """
        inside = {id(e) for e in members}
        for eqn in reversed(members[:-1]):
            var = eqn.outvars[0]
            users = self.program.users.get(var, [])
            shared = self.program.use_count(var) > len(users) or any(id(user) not in inside for user, _ in users)
            rest = self.cone(root, var) if shared else []
            if (
                shared
                and all(v is not source for e in rest for v in e.invars)
                and self.is_plain(self.cone(eqn, source))
            ):
                return var
        return source

    def is_plain(self, members: list[Any]) -> bool:
        """Whether linear regions compute them, more finely than the index of a table resolves."""
        return all(
            self.is_clamp(e) or self.is_join(e) or self.affine(e) is not None or self.is_identity(e) for e in members
        )

    # Linear regions

    def affine(self, eqn: _compat.JaxprEqn) -> Any:
        return _affine.affine_of(eqn, self.constants)

    def is_identity(self, eqn: _compat.JaxprEqn) -> bool:
        return eqn.primitive.name in classes.IDENTITY or classes.is_float_cast(eqn)

    def is_clamp(self, eqn: _compat.JaxprEqn) -> bool:
        """A max, min or clamp of one value by numbers."""
        if eqn.primitive.name not in classes.CLAMP or not classes.is_float(eqn.outvars[0]):
            return False
        free = [v for v in eqn.invars if v not in self.constants]
        held = [v for v in eqn.invars if v in self.constants]
        return (
            len(free) == 1
            and free[0].aval.shape == eqn.outvars[0].aval.shape
            and all(self.constants.uniform(v) is not None for v in held)
            and (eqn.primitive.name != "clamp" or eqn.invars[1] is free[0])
        )

    def is_join(self, eqn: _compat.JaxprEqn) -> bool:
        same = all(v.aval.shape == eqn.outvars[0].aval.shape for v in eqn.invars)
        return eqn.primitive.name in ("add", "sub") and same and all(v not in self.constants for v in eqn.invars)

    def is_anchor(self, eqn: _compat.JaxprEqn) -> bool:
        name = eqn.primitive.name
        if name not in classes.ANCHOR or not all(classes.is_float(v) for v in (*eqn.invars, *eqn.outvars)):
            return False
        if name == "reduce_sum":
            return True
        if name == "conv_general_dilated":
            return eqn.invars[0] not in self.constants and eqn.invars[1] in self.constants and not _reverses(eqn)
        return not all(v in self.constants for v in eqn.invars)

    def grow_linear(self, root: _compat.JaxprEqn) -> Region | None:
        members: list[_compat.JaxprEqn] = []
        roles: dict[tuple[int, int], str] = {}
        anchor: list[_compat.JaxprEqn] = []

        def absorb(eqn: _compat.JaxprEqn, top: bool) -> bool:
            """Takes the equation, and what it can of its operands, into the region."""
            if self.is_anchor(eqn):
                if anchor:
                    return False
                anchor.append(eqn)
                members.append(eqn)
                for k, v in enumerate(eqn.invars):
                    roles[id(eqn), k] = (
                        "weight" if v in self.constants else "reduced" if len(eqn.invars) == 1 else "activation"
                    )
                return True
            through = (top and self.is_clamp(eqn)) or self.is_identity(eqn)
            join = self.is_join(eqn)
            if not (through or join or self.affine(eqn) is not None):
                return False
            members.append(eqn)
            for k, v in enumerate(eqn.invars):
                if v in self.constants:
                    roles[id(eqn), k] = "constant"
                elif not self.single(v) or not absorb(self.producer[v], top and not join):
                    roles[id(eqn), k] = "term"
            return True

        if not absorb(root, True):
            return None
        kind = KIND_OF_ANCHOR[anchor[0].primitive.name] if anchor else "linear"
        members.sort(key=lambda e: self.order[id(e)])
        if anchor:
            self.mark_bias(anchor[0], members, roles)
        return self.region(kind, root, members, roles, anchor[0] if anchor else None)

    def single(self, var: Any) -> bool:
        """Read once, and not stored for another region that reaches it some other way."""
        return self.program.use_count(var) == 1 and var in self.producer and var not in self.needed

    def mark_bias(self, anchor: Any, members: list[Any], roles: dict[tuple[int, int], str]) -> None:
        """The constant added straight to a product of an activation and a weight is its int32 bias."""
        weights = [k for k in range(len(anchor.invars)) if roles.get((id(anchor), k)) == "weight"]
        uses = self.program.users.get(anchor.outvars[0], [])
        if len(weights) != 1 or len(uses) != 1 or uses[0][0] not in members or uses[0][0].primitive.name != "add":
            return
        eqn, position = uses[0]
        other = eqn.invars[1 - position]
        if other in self.constants and not isinstance(other, _compat.Literal):
            if contraction.on_weight(np.zeros(other.aval.shape, np.int8), anchor, weights[0]) is not None:
                roles[id(eqn), 1 - position] = "bias"

    # Common

    def region(
        self, kind: str, root: Any, members: list[Any], roles: dict[tuple[int, int], str], anchor: Any = None
    ) -> Region:
        """Collects operands; equations on constants (a number broadcast) move into the body."""
        members = sorted(members, key=lambda e: self.order[id(e)])
        operands: list[tuple[Any, str]] = []
        held: dict[int, Any] = {}

        def hold(var: Any, role: str) -> None:
            eqn = self.producer.get(var)
            if eqn is None or var not in self.constants or role == "weight":
                if (var, role) not in operands:
                    operands.append((var, role))
                return
            held[id(eqn)] = eqn
            for v in eqn.invars:
                if isinstance(v, _compat.Var):
                    hold(v, role)

        produced = {v for e in members for v in e.outvars}
        for eqn in members:
            for k, var in enumerate(eqn.invars):
                if isinstance(var, _compat.Var) and var not in produced:
                    hold(var, roles.get((id(eqn), k), "constant"))
        # One variable in two roles (x @ x.T) is one operand: the roles of a body are per variable.
        roles_of: dict[Any, str] = {}
        for var, role in operands:
            roles_of[var] = _stricter(roles_of.get(var), role)
        everything = sorted([*held.values(), *members], key=lambda e: self.order[id(e)])
        return Region(kind, root, everything, list(roles_of.items()), anchor)

    def why_island(self, eqn: _compat.JaxprEqn) -> str | None:
        """Why an equation stays float; None if no real number is computed or read by it."""
        atoms = [*eqn.invars, *eqn.outvars]
        if not any(classes.is_float(v) for v in atoms if v not in self.constants):
            return None
        if not any(map(classes.is_float, eqn.outvars)):
            return "computes no real number from one"
        name = eqn.primitive.name
        if name in ("mul", "div") and all(v not in self.constants for v in eqn.invars):
            return "product or quotient of two activations has no integer rule yet"
        if name == "conv_general_dilated":
            return "convolution whose kernel is no constant, or is reversed, has no integer rule yet"
        return "primitive has no integer rule yet"


_STRICTNESS = ("constant", "bias", "weight", "term", "value", "reduced", "index", "activation")


def _stricter(first: str | None, second: str) -> str:
    """Of two uses of one variable in a region, the one with the narrower type decides."""
    return second if first is None else max(first, second, key=_STRICTNESS.index)


def _reverses(eqn: _compat.JaxprEqn) -> bool:
    return eqn.params.get("batch_group_count", 1) != 1
