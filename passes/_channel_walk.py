"""Which factors may move between the weights of a program: a walk from values to their readers.

    max(conv(x, w1) + b1, 0) -> conv w2      ->      w1, b1: / s_k per output channel k   w2: * s_k per input channel k

Every product with a weight makes new scale groups, one per output channel, and absorbs those that its activation comes
with. What stands between passes them on by a rule per primitive (`_channel_rules`): some make groups share a factor, an
addition say, some need a constant of their own divided too, a bias or a bound. What has no rule, inputs and results pin
the groups they meet to 1, so that the outcome is always exact.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from qcompiler.ir import _compat, classes, contraction, identity
from qcompiler.ir.constants import Constants
from qcompiler.ir.program import Program
from qcompiler.passes import _channel_rules
from qcompiler.passes._scale_groups import ScaleGroups, compressed


@dataclasses.dataclass
class Site:
    """A constant operand that factors go into: it is multiplied by those of `inside` and divided by those of `outside`.

    Attributes:
      eqn, position: where it is read.
      outside: groups, laid out to broadcast against the operand.
      inside: the same, of a product's weight; None for other constants.
    """

    eqn: _compat.JaxprEqn
    position: int
    outside: np.ndarray
    inside: np.ndarray | None = None


class Walk:
    """The groups of all values of a program, and the constants that factors go into.

    Attributes:
      groups: the forest.
      of: value -> its groups; of real numbers that inputs reach.
      products: per weight of a product, its sites: several if it is shared.
      numbers: other constants, which are divided.
    """

    def __init__(self, program: Program) -> None:
        self.program, self.constants = program, Constants(program)
        self.groups = ScaleGroups()
        self.of: dict[Any, np.ndarray] = {}
        self.products: dict[str, list[Site]] = {}
        self.numbers: list[Site] = []
        self._weight_of = program.weight_of
        for var, name in zip(program.input_vars, program.signature.input_names, strict=True):
            if classes.is_float(var):
                self.of[var] = self.groups.pinned(var.aval.ndim, f"made of input {name}")
        for eqn in program.eqns:
            if not all(v in self.constants for v in eqn.outvars):
                self._step(eqn)
        for k, var in enumerate(program.outvars):
            if isinstance(var, _compat.Var) and var in self.of:
                self.groups.pin(self.of[var], f"result {k}")
        self._pin_shared_weights()

    def _step(self, eqn: _compat.JaxprEqn) -> None:
        floats = [v for v in eqn.outvars if classes.is_float(v)]
        if not floats and all(self.at(v) is None for v in eqn.invars):
            return
        found = None
        wide = all(v.aval.dtype.itemsize >= 4 for v in (*eqn.invars, *floats) if classes.is_float(v))
        if len(eqn.outvars) == 1 and wide and not classes.is_empty(eqn):
            name = eqn.primitive.name
            rule = Walk.product if name in classes.PRODUCT else _channel_rules.RULES.get(name)
            found = rule(self, eqn) if rule is not None else None
        if found is None:
            for var in eqn.invars:
                if (groups := self.at(var)) is not None:
                    self.groups.pin(groups, f"read by {identity.describe(eqn)}")
            for var in floats:
                self.of[var] = self.groups.pinned(var.aval.ndim, f"made by {identity.describe(eqn)}")
        elif floats:
            self.of[floats[0]] = found

    def at(self, atom: Any) -> np.ndarray | None:
        """The groups of an operand; None for a constant, and for what holds no real numbers."""
        return self.of.get(atom) if isinstance(atom, _compat.Var) else None

    def activations(self, eqn: _compat.JaxprEqn) -> list[int]:
        """Positions of the operands that inputs reach."""
        return [k for k, v in enumerate(eqn.invars) if v not in self.constants]

    def product(self, eqn: _compat.JaxprEqn) -> np.ndarray | None:
        """The groups of a product with a weight; None for another product."""
        held = [k for k in (0, 1) if eqn.invars[k] in self.constants]
        conv = eqn.primitive.name == "conv_general_dilated"
        if len(held) != 1 or (conv and (held != [1] or eqn.params["batch_group_count"] != 1)):
            return None
        (position,) = held
        weight = eqn.invars[position]
        name = self._weight_of.get(weight) if isinstance(weight, _compat.Var) else None
        if name is None:
            return None
        came = self.at(eqn.invars[1 - position])
        if came is None:
            return None
        inside = contraction.from_operand(self.groups.tie_along(came, _unshared(eqn, position)), eqn, position)
        assert inside is not None
        made = set(contraction.weight_dims(eqn, position).values())
        outside = self.groups.new([n if d in made else 1 for d, n in enumerate(weight.aval.shape)])
        site = Site(eqn, position, outside, compressed(inside))
        for other in self.products.setdefault(name, []):
            self.groups.tie(other.outside, site.outside)
            self.groups.tie(other.inside, site.inside)
        self.products[name].append(site)
        return contraction.on_result(outside, eqn, position)

    def divided(self, eqn: _compat.JaxprEqn, position: int, groups: np.ndarray) -> np.ndarray:
        """Notes that a constant operand is divided as its equation's result is, whose groups these are.

        A number becomes an array over the channels; an array keeps its shape. Where it repeats, so does the factor.

        Returns:
          The groups, of which some may be tied now.
        """
        atom = eqn.invars[position]
        number = self.constants.uniform(atom)
        if number is not None and (number == 0 or np.isinf(number)):
            return groups
        shape = atom.aval.shape
        if np.prod(shape) > 1:
            groups = self.groups.tie_along(groups, [d for d, n in enumerate(shape) if n == 1])
        self.numbers.append(Site(eqn, position, groups))
        return groups

    def _pin_shared_weights(self) -> None:
        """Weights that are read by others than products stay as they are."""
        variables = {name: var for var, name in self._weight_of.items()}
        for name, sites in self.products.items():
            if self.program.use_count(variables[name]) != len(sites):
                for site in sites:
                    for groups in (site.outside, site.inside):
                        self.groups.pin(groups, f"weight {name} is read elsewhere, too")


def _unshared(eqn: _compat.JaxprEqn, weight: int) -> list[int]:
    """Dimensions of a product's activation that its weight does not have."""
    if eqn.primitive.name == "conv_general_dilated":
        shared: set[int] = {eqn.params["dimension_numbers"].lhs_spec[1]}
    else:
        contract, batch = eqn.params["dimension_numbers"]
        shared = {*contract[1 - weight], *batch[1 - weight]}
    return [d for d in range(eqn.invars[1 - weight].aval.ndim) if d not in shared]
