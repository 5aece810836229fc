"""Which equations one integer op can hold: grows the regions of `partition` back from their roots."""

from __future__ import annotations

import dataclasses
import heapq
from typing import Any

import numpy as np

from qcompiler.ir import _compat, classes, contraction
from qcompiler.ir.constants import Constants
from qcompiler.ir.program import Program
from qcompiler.numerics import masks
from qcompiler.passes import _affine, _regions, _sources, _wide

KIND_OF_ANCHOR = {
    "dot_general": "dot",
    "conv_general_dilated": "conv",
    "reduce_sum": "reduce",
    "reduce_window_sum": "reduce",
    "cumsum": "reduce",
    "scatter-add": "reduce",
    "mul": "product",
}
#: More maxima, minima and selections than this in one function of one value are cheaper as a table.
MOST_CHOICES = 3


@dataclasses.dataclass
class Region:
    """The plan of one region.

    Attributes:
      kind: see `partition`.
      root: equation whose result is the region's.
      members: all equations of the body, in program order, constants computed on the way among them.
      roles: (equation, operand position) -> role, of every operand that is read from outside.
      operands: the distinct (variable, role) pairs, in order: one operand of the region each.
      anchor: the product or sum, if any.
      result: the variable of the region's result; None: the root's first.
    """

    kind: str
    root: _compat.JaxprEqn
    members: list[_compat.JaxprEqn]
    roles: dict[tuple[int, int], str]
    operands: list[tuple[Any, str]]
    anchor: _compat.JaxprEqn | None = None
    result: Any = None


@dataclasses.dataclass(frozen=True)
class _Context:
    """What may stand between a value and the rounding of its region.

    Attributes:
      clamps: nothing but what a clamp commutes with, so that the value may be clamped.
      choices: the same for the larger, the smaller or a selection of two values.
      predicate: the value is a truth value that a selection reads.
    """

    clamps: bool = True
    choices: bool = True
    predicate: bool = False

    def both(self, other: _Context) -> _Context:
        return _Context(
            self.clamps and other.clamps, self.choices and other.choices, self.predicate and other.predicate
        )


_TOP, _SUMMED, _PREDICATE = _Context(), _Context(False, False), _Context(False, False, True)


class Grower:
    """Grows regions of one program.

    Attributes:
      needed: values that are stored because something outside of a grown region reads them; the caller adds to it.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.constants = Constants(program)
        self.producer = program.producer
        self.order = {id(e): k for k, e in enumerate(program.eqns)}
        self.needed: set[Any] = {v for v in program.outvars if isinstance(v, _compat.Var)}
        self.source = _sources.sources_of(program, self.constants)
        self.epilogues = _wide.epilogues_of(program, self.constants)

    def grow(self, root: _compat.JaxprEqn) -> Region | None:
        """The region whose result is that of `root`, or None if `root` must stay float."""
        if not any(map(classes.is_float, (*root.invars, *root.outvars))):
            return None
        if len(root.outvars) != 1:
            return self.grow_order(root)
        if root.primitive.name in classes.SEARCH or root.primitive.name in classes.VIEW | classes.MERGE:
            reals = any(map(classes.is_float, (*root.invars, *root.outvars)))
            return self.grow_view(root) or (self.grow_wide(root, None) if reals else None)
        if not classes.is_float(root.outvars[0]):
            reads_reals = any(map(classes.is_float, root.invars))
            compares = root.primitive.name in classes.COMPARE and reads_reals
            plain = self.grow_linear(root) if compares else None
            return (self.grow_wide(root, plain) if reads_reals else None) or plain
        plain = self.grow_table(root) or self.grow_linear(root)
        return self.grow_wide(root, plain) or plain

    # General arithmetic

    def grow_wide(self, root: _compat.JaxprEqn, plain: Region | None) -> Region | None:
        """A region of general arithmetic, where the other kinds have none or would store statistics on the way."""
        if root.outvars[0] in self.epilogues:
            return None
        members = _wide.members_of(root, self.program, self.constants, self.order, self.epilogues, self.only_inside)
        if not members or (
            plain is not None and not _wide.is_needed(members, self.constants, self.is_linear, self.source, self.widens)
        ):
            return None
        if plain is not None and plain.kind == "table" and not self.widens(root.outvars[0]):
            # An activation of what general arithmetic makes per element is faster looked up, its index fine enough.
            (index,) = (v for v, role in plain.operands if role == "index")
            made = any(index in e.outvars for e in members)
            if made and not _wide.is_statistic(index, members, self.constants):
                return None
        roles = {(id(e), k): _wide.role_of(e, k, self.constants) for e in members for k in range(len(e.invars))}
        return self.region("wide", root, members, roles)

    def is_linear(self, eqn: _compat.JaxprEqn) -> bool:
        """Whether a linear region without an anchor computes an equation."""
        context = _PREDICATE if eqn.outvars[0].aval.dtype == bool else _TOP
        return self.operands_of(eqn, context, False) is not None

    def widens(self, var: Any) -> bool:
        source = self.source[var]
        return _wide.widens(self.cone(self.producer[var], source), source, self.constants)

    # Views

    def grow_view(self, root: _compat.JaxprEqn) -> Region | None:
        name = root.primitive.name
        if name in classes.PLACE | {"concatenate"} or (name == "pad" and not self.pads_neutrally(root)):
            return self.grow_concat(root)
        if not self.is_view(root) and not (root.primitive.name in classes.SEARCH and self.is_stored(root.invars[0])):
            return None
        return self.behind_views(root)

    def grow_order(self, root: _compat.JaxprEqn) -> Region | None:
        """Where the elements of a value are once they are in order."""
        if root.primitive.name not in classes.ORDER or not self.is_stored(root.invars[0]):
            return None
        values, places, *rest = root.outvars
        if rest or self.program.use_count(values) or any(v not in self.constants for v in root.invars[1:]):
            return None
        return dataclasses.replace(self.behind_views(root), result=places)

    def behind_views(self, root: _compat.JaxprEqn) -> Region:
        """A region of elements, or their places, of the value behind views."""
        members, var = [root], root.invars[0]
        while self.program.use_count(var) == 1 and self.is_view(self.producer.get(var)):
            members.append(self.producer[var])
            var = self.producer[var].invars[0]
        roles = {
            (id(e), k): "integer" for e in members for k, v in enumerate(e.invars) if k and v not in self.constants
        }
        return self.region("view", root, members, roles | {(id(members[-1]), 0): "value"})

    def grow_concat(self, root: _compat.JaxprEqn) -> Region | None:
        if not classes.is_float(root.outvars[0]):
            return None
        role = lambda v: "value" if classes.is_float(v) else "constant" if v in self.constants else "integer"
        roles = {(id(root), k): role(v) for k, v in enumerate(root.invars) if isinstance(v, _compat.Var)}
        return self.region("concat", root, [root], roles)

    def is_stored(self, atom: Any) -> bool:
        return atom not in self.constants and classes.is_float(atom)

    def is_view(self, eqn: _compat.JaxprEqn | None) -> bool:
        """Whether the result's elements are elements of operand 0, from places that do not depend on reals."""
        if eqn is None or eqn.primitive.name not in classes.VIEW | {"pad"} or len(eqn.outvars) != 1:
            return False
        if not self.is_stored(eqn.invars[0]):
            return False
        if eqn.primitive.name == "pad":
            return self.pads_neutrally(eqn)
        return all(v in self.constants or not classes.is_float(v) for v in eqn.invars[1:])

    def pads_neutrally(self, eqn: _compat.JaxprEqn) -> bool:
        """Whether it pads with what every encoding of the operand has a code for: 0, or for a mask an end."""
        fill = self.constants.uniform(eqn.invars[1])
        return fill is not None and (fill == 0 or bool(np.abs(fill) >= masks.MASK))

    def cone(self, root: _compat.JaxprEqn, source: Any) -> list[_compat.JaxprEqn]:
        """The equations between a source and a root, in program order."""
        return _sources.cone(root, source, self.program, self.constants, self.order)

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
                and classes.is_float(var)
                and all(v is not source for e in rest for v in e.invars)
                and self.is_plain(self.cone(eqn, source))
            ):
                return var
        return source

    def is_plain(self, members: list[Any]) -> bool:
        """Whether linear regions compute them, more finely than the index of a table resolves."""
        choices = sum(self.is_choice(e) for e in members)
        return choices <= MOST_CHOICES and all(
            self.operands_of(e, _PREDICATE if e.outvars[0].aval.dtype == bool else _TOP, False) is not None
            for e in members
        )

    # Linear regions

    def is_identity(self, eqn: _compat.JaxprEqn) -> bool:
        return eqn.primitive.name in classes.IDENTITY or classes.is_float_cast(eqn)

    def is_clamp(self, eqn: _compat.JaxprEqn) -> bool:
        """A max, min or clamp of one value by known numbers."""
        if eqn.primitive.name not in classes.CLAMP or not classes.is_float(eqn.outvars[0]):
            return False
        free = [v for v in eqn.invars if v not in self.constants]
        return (
            len(free) == 1
            and free[0].aval.shape == eqn.outvars[0].aval.shape
            and (eqn.primitive.name != "clamp" or eqn.invars[1] is free[0])
        )

    def is_join(self, eqn: _compat.JaxprEqn) -> bool:
        return eqn.primitive.name in ("add", "sub") and all(self.is_stored(v) for v in eqn.invars)

    def is_choice(self, eqn: _compat.JaxprEqn) -> bool:
        """The larger or smaller of two values, a magnitude, or one of two by a truth value."""
        name, reals = eqn.primitive.name, [v for v in eqn.invars if classes.is_float(v)]
        if not classes.is_float(eqn.outvars[0]):
            return False
        if name in ("max", "min"):
            return all(self.is_stored(v) for v in reals)
        return (name == "abs" and len(reals) == 1) or (
            name == "select_n" and len(reals) == 2 and eqn.invars[0].aval.dtype == bool
        )

    def is_anchor(self, eqn: _compat.JaxprEqn) -> bool:
        name = eqn.primitive.name
        reals = (*_regions.anchored(eqn), *eqn.outvars)
        if name not in KIND_OF_ANCHOR or not all(map(classes.is_float, reals)):
            return False
        free = [v not in self.constants for v in eqn.invars]
        if name == "scatter-add":
            return self.constants.uniform(eqn.invars[0]) == 0 and free[2]
        if name == "dot_general":
            return any(free)
        if name == "conv_general_dilated":
            return free[0] and eqn.params.get("batch_group_count", 1) == 1
        # A product of two functions of one value is a table.
        return all(free) and (name != "mul" or eqn.outvars[0] not in self.source)

    def operands_of(self, eqn: _compat.JaxprEqn, context: _Context, free: bool) -> list[str | _Context] | None:
        """How a linear region that computes an equation reads its operands.

        Args:
          eqn: an equation whose result stands in `context`.
          context: see `_Context`.
          free: whether the region has no anchor yet.

        Returns:
          Per operand its role, or, if the equation behind it may join the region, its context. None: cannot join.
        """
        name = eqn.primitive.name
        if context.predicate:
            if name in classes.COMPARE and all(map(classes.is_float, eqn.invars)):
                return ["constant" if v in self.constants else _SUMMED for v in eqn.invars]
            if name in classes.LOGIC and eqn.outvars[0].aval.dtype == bool:
                return ["constant" if v in self.constants else _PREDICATE for v in eqn.invars]
            return None
        if self.is_anchor(eqn):
            return self.anchor_roles(eqn) if free else None
        if self.is_identity(eqn):
            return [context]
        if name == "convert_element_type" and classes.is_integer(eqn.invars[0]) and classes.is_float(eqn.outvars[0]):
            return ["integer"]
        affine = _affine.affine_of(eqn, self.constants, spreads=True)
        if affine is not None:
            x, factor, _ = affine
            ordered = bool(np.all(factor >= 0) or np.all(factor <= 0))
            inner = dataclasses.replace(context, choices=context.choices and ordered)
            return [inner if v is x else "constant" for v in eqn.invars]
        if self.is_join(eqn):
            return [_SUMMED, _SUMMED]
        if context.clamps and self.is_clamp(eqn):
            return ["constant" if v in self.constants else context for v in eqn.invars]
        if context.choices and self.is_choice(eqn):
            inner = [context if classes.is_float(v) else _PREDICATE for v in eqn.invars]
            return ["constant" if v in self.constants else c for v, c in zip(eqn.invars, inner, strict=True)]
        return None

    def anchor_roles(self, eqn: _compat.JaxprEqn) -> list[str | _Context]:
        name = eqn.primitive.name
        if name in classes.PRODUCT:
            return ["weight" if v in self.constants else "activation" for v in eqn.invars]
        if name == "scatter-add":
            return ["constant", "constant" if eqn.invars[1] in self.constants else "integer", "reduced"]
        return ["factor" if name == "mul" else "reduced" for _ in eqn.invars]

    def grow_linear(self, root: _compat.JaxprEqn) -> Region | None:
        """Takes equations in reverse program order, so that all readers of a value are decided before it is."""
        var = root.outvars[0]
        contexts: dict[Any, _Context] = {var: _TOP if classes.is_float(var) else _PREDICATE}
        members: dict[int, _compat.JaxprEqn] = {}
        roles: dict[tuple[int, int], str] = {}
        # What an anchor reads is stored, whoever else reads it.
        stored: set[Any] = set()
        anchor = None
        todo = [(-self.order[id(root)], root)]
        queued = {id(root)}
        while todo:
            eqn = heapq.heappop(todo)[1]
            if eqn is not root and (eqn.outvars[0] in stored or not self.only_inside(eqn.outvars[0], members)):
                continue
            reads = self.operands_of(eqn, contexts[eqn.outvars[0]], anchor is None)
            if reads is None:
                continue
            members[id(eqn)] = eqn
            anchor = eqn if self.is_anchor(eqn) else anchor
            for k, (v, read) in enumerate(zip(eqn.invars, reads, strict=True)):
                roles[id(eqn), k] = read if isinstance(read, str) else "term" if classes.is_float(v) else "integer"
                if not isinstance(v, _compat.Var):
                    continue
                if isinstance(read, str):
                    stored.add(v)
                    continue
                contexts[v] = read.both(contexts.get(v, read))
                made = self.producer.get(v)
                if made is not None and len(made.outvars) == 1 and id(made) not in queued:
                    queued.add(id(made))
                    heapq.heappush(todo, (-self.order[id(made)], made))
        if not members:
            return None
        kind = KIND_OF_ANCHOR[anchor.primitive.name] if anchor is not None else "linear"
        if anchor is not None:
            self.mark_bias(anchor, members, roles)
        return self.region(kind, root, list(members.values()), roles, anchor)

    def only_inside(self, var: Any, members: dict[int, Any]) -> bool:
        """Whether members alone read a value, and nobody else needs it stored."""
        users = self.program.users.get(var, [])
        every = self.program.use_count(var) == len(users) and all(id(user) in members for user, _ in users)
        return every and var not in self.needed

    def mark_bias(self, anchor: Any, members: dict[int, Any], roles: dict[tuple[int, int], str]) -> None:
        """The constant added straight to a product of an activation and a weight is its int32 bias."""
        weights = [k for k in range(len(anchor.invars)) if roles.get((id(anchor), k)) == "weight"]
        uses = self.program.users.get(anchor.outvars[0], [])
        if len(weights) != 1 or len(uses) != 1 or id(uses[0][0]) not in members or uses[0][0].primitive.name != "add":
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
        produced = {v for e in members for v in e.outvars}
        held: dict[int, Any] = {}
        read: dict[tuple[int, int], str] = {}
        operands: list[tuple[Any, str]] = []

        def hold(eqn: Any, k: int, role: str) -> None:
            var = eqn.invars[k]
            made = self.producer.get(var)
            if made is None or var not in self.constants or role in ("weight", "value", "rows"):
                read[id(eqn), k] = role
                if (var, role) not in operands:
                    operands.append((var, role))
            elif id(made) not in held:
                held[id(made)] = made
                for j, v in enumerate(made.invars):
                    if isinstance(v, _compat.Var):
                        hold(made, j, role)

        for eqn in members:
            for k, var in enumerate(eqn.invars):
                if isinstance(var, _compat.Var) and var not in produced:
                    hold(eqn, k, roles.get((id(eqn), k), "constant"))
        everything = sorted([*held.values(), *members], key=lambda e: self.order[id(e)])
        return Region(kind, root, everything, read, operands, anchor)
